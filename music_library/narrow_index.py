"""Wide audio spaces indexed exactly in few dimensions: the subspace that text can reach, and one coordinate more."""

import hashlib

import numpy as np
import torch

from text_to_audio.model.head import ProjectionHead

_TILE_ELEMENTS = 1 << 24  # float32 elements of audio in hand at once: 64 MB


def projection_identity(projection: ProjectionHead, narrow: bool) -> str:
    """A name for the map from plain vectors to indexed ones: equal for heads that index alike.

    It covers the space's mean and standard deviation; in the narrow form also the head's last layer.
    """
    parts = [projection.mean, projection.std]
    if narrow:
        parts += [projection.last_layer.weight, projection.last_layer.bias]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part.detach().cpu().numpy(), dtype="<f4").data)
    return digest.hexdigest()[:32]


def text_basis(projection: ProjectionHead) -> torch.Tensor:
    """An orthonormal basis (audio_dim, hidden_dim + 1) float32 of every vector that the head gives a text.

    The head ends in W h + b, so that text lies in the column space of [W b]; Q of its QR decomposition spans it. The
    signs are fixed (R's diagonal is not negative), so that two machines agree on Q.
    """
    last = projection.last_layer
    columns = torch.cat([last.weight.detach(), last.bias.detach()[:, None]], dim=1).float().cpu()
    q, r = torch.linalg.qr(columns)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


class NarrowForm:
    """Audio and text in hidden_dim + 2 dimensions, with the L2 ranking of audio_dim dimensions.

    For a text t in the span of Q and unit audio a, t.a = (Q^T t).(Q^T a). Audio becomes (Q^T a, sqrt(1 - |Q^T a|^2))
    and text (Q^T t, 0): both have unit length and their inner product is the same. Audio against audio is not: what
    of it lies outside the subspace is a length alone.
    """

    def __init__(self, basis: torch.Tensor):
        self.basis = torch.as_tensor(basis)
        self.dim = self.basis.shape[1] + 1

    def audio(self, vectors: np.ndarray) -> np.ndarray:
        """Unit vectors (n, audio_dim) -> unit vectors (n, dim), float32."""
        inside = self._inside(vectors)
        rest = np.sqrt(np.clip(1 - np.square(inside, dtype=np.float64).sum(1), 0, None))
        return np.concatenate([inside, rest[:, None].astype(np.float32)], axis=1)

    def text(self, vectors: np.ndarray) -> np.ndarray:
        """Unit vectors (n, audio_dim) of texts -> (n, dim) float32, the last coordinate 0."""
        return np.pad(self._inside(vectors), ((0, 0), (0, 1)))

    def _inside(self, vectors: np.ndarray) -> np.ndarray:
        step = max(1, _TILE_ELEMENTS // self.basis.shape[0])
        parts = [
            torch.from_numpy(np.asarray(vectors[i : i + step], np.float32)) @ self.basis
            for i in range(0, len(vectors), step)
        ]
        return torch.cat(parts).numpy() if parts else np.zeros((0, self.dim - 1), np.float32)
