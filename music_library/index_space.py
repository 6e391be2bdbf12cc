"""How a checkpoint's audio space stands in an index: what becomes of plain vectors and of queries, and its identity."""

import os
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files import publish
from music_library.milvus_index import SERVER_MAX_DIM
from music_library.narrow_index import NarrowForm, projection_identity, text_basis
from text_to_audio.config import TrainingConfig
from text_to_audio.model.checkpoints import read_checkpoint
from text_to_audio.model.head import ProjectionHead


class IndexSpace:
    """The map from plain audio vectors, and from text vectors, to what one collection holds.

    name: the audio space ("muq", ...), which is also the collection's name. narrow: whether the collection holds the
    narrow form; None is for spaces that are wider than a Milvus server takes. folder: where a narrow basis is kept
    between runs; None computes it each time.
    """

    def __init__(
        self,
        name: str,
        projection: ProjectionHead,
        recipe: str,
        encoder: str,
        narrow: bool | None = None,
        folder: Path | None = None,
    ):
        self.name, self.projection = name, projection
        self.audio_dim = projection.audio_dim
        narrow = self.audio_dim > SERVER_MAX_DIM if narrow is None else narrow
        identity = projection_identity(projection, narrow)
        self.identity: dict[str, str | int | bool] = {
            "format": "text-audio-index",
            "space": name,
            "audio_dim": self.audio_dim,
            "recipe": recipe,
            "encoder": encoder,
            "narrow": narrow,
            "projection": identity,
        }
        self._form = NarrowForm(_kept_basis(projection, identity, folder)) if narrow else None

    @property
    def narrow(self) -> bool:
        """Whether the collection holds the narrow form."""
        return self._form is not None

    @property
    def dim(self) -> int:
        """Width of the collection's vectors."""
        return self._form.dim if self._form else self.audio_dim

    @torch.no_grad()
    def standardised(self, plain: np.ndarray) -> np.ndarray:
        """Plain audio vectors (n, audio_dim) -> unit vectors (n, audio_dim) float32 in the space text meets."""
        return self.projection.standardise_audio(torch.from_numpy(np.asarray(plain, np.float32))).cpu().numpy()

    def audio(self, plain: np.ndarray) -> np.ndarray:
        """Plain audio vectors (n, audio_dim) -> what the collection holds, (n, dim) float32 unit vectors."""
        vectors = self.standardised(plain)
        return self._form.audio(vectors) if self._form else vectors

    def queries(self, vectors: np.ndarray) -> np.ndarray:
        """Unit vectors (n, audio_dim) of texts -> what the collection is asked with, (n, dim) float32."""
        return self._form.text(vectors) if self._form else np.asarray(vectors, np.float32)


def read_head(path: str | Path) -> tuple[ProjectionHead, TrainingConfig, dict]:
    """A checkpoint's head, on the CPU and in evaluation mode, its config, and what it says of its audio space.

    The text model is not loaded: indexing has no use for it. The last is {id, revision, dim, sample_rate, recipe}.
    Raises `UserError` where the file is no checkpoint, or does not say which encoder its audio space is of.
    """
    contents = read_checkpoint(path)
    config = TrainingConfig.from_dict(contents["config"], str(path))
    audio_space = recorded_space(contents, path)
    head = ProjectionHead(config.text_dim, config.hidden_dim, config.audio_dim, config.head_dropout)
    try:
        head.load_state_dict(contents["projection_state_dict"])
    except RuntimeError as error:
        raise UserError(f"{path}: its head does not fit its config: {' '.join(str(error).split())[:300]}") from error
    return head.eval(), config, audio_space


def recorded_space(contents: dict, path: str | Path) -> dict:
    """What a checkpoint says of its audio space; `UserError` where it says nothing."""
    if not contents.get("audio_space"):
        raise UserError(f"{path}: expected a checkpoint that names its audio encoder, found none; train it again")
    return contents["audio_space"]


def _kept_basis(projection: ProjectionHead, identity: str, folder: Path | None) -> torch.Tensor:
    """The basis from `folder`, mapped; computed, and left there where the folder exists, if it is not yet."""
    if folder is None or not folder.is_dir():
        return text_basis(projection)
    path = folder / f"narrow-{identity}.npy"
    if not path.is_file():
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(beside, "wb") as file:
                np.save(file, text_basis(projection).numpy())
            publish(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    return torch.from_numpy(np.load(path, mmap_mode="c"))
