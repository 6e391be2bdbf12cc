"""The projection head: a sentence embedding into an audio space, whose statistics it carries."""

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_STD = 1e-3  # of the median standard deviation: the least divisor, so that dead dimensions do not explode


class Projection(Protocol):
    """What takes both sides into the standardised space: the trained head, or the baseline in its place."""

    @property
    def audio_dim(self) -> int:
        """Width of the audio space."""
        ...

    def project_text(self, text: Tensor) -> Tensor:
        """Sentence embeddings (batch, text_dim) -> unit vectors (batch, audio_dim)."""
        ...

    def standardise_audio(self, audio: Tensor) -> Tensor:
        """Stored audio vectors (batch, audio_dim) -> unit vectors (batch, audio_dim)."""
        ...


def space_statistics(
    mean: np.ndarray, std: np.ndarray, mode: str, mean_removed: float = 1.0, std_floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What is taken off audio vectors, and what they are divided by: float32 (audio_dim,) each.

    From mean and standard deviation (audio_dim,), of which mode "zscore" uses both, "centre" the mean and "none"
    nothing. mean_removed: the share of the mean that is taken off. std_floor: the least divisor of "zscore", in root
    mean squares of the deviations. A dimension that hardly varied in training and does in other music would else hold
    all the energy of that music's vectors. Raises `ValueError` where the statistics are not finite.
    """
    centre, spread = torch.as_tensor(mean, dtype=torch.float32), torch.as_tensor(std, dtype=torch.float32)
    if not (torch.isfinite(centre).all() and torch.isfinite(spread).all()):
        raise ValueError("the space's mean and standard deviation are not finite")
    alive = spread[spread > 0]
    least = LEAST_STD * alive.median() if len(alive) else torch.tensor(1.0)
    floor = torch.maximum(std_floor * spread.double().square().mean().sqrt().float(), least)
    shift = torch.zeros_like(centre) if mode == "none" else mean_removed * centre
    return shift, spread.clamp_min(floor) if mode == "zscore" else torch.ones_like(spread)


class ProjectionHead(nn.Module):
    """Linear - GELU - Dropout - Linear from a sentence embedding into an audio space.

    Holds the space's mean and standard deviation (0 and 1 until `set_statistics`), so that text and audio vectors
    meet in the standardised space. Inputs may be on any device and of any float type; outputs are on the head's
    device and of its type, float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, text_dim: int, hidden_dim: int, audio_dim: int, dropout: float = 0.1):
        super().__init__()
        self.text_dim, self.hidden_dim, self.audio_dim = text_dim, hidden_dim, audio_dim
        self.layers = nn.Sequential(
            nn.Linear(text_dim, hidden_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_dim, audio_dim)
        )
        self.register_buffer("mean", torch.zeros(audio_dim))
        self.register_buffer("std", torch.ones(audio_dim))

    def set_statistics(
        self, mean: np.ndarray, std: np.ndarray, mode: str, mean_removed: float = 1.0, std_floor: float = 0.0
    ) -> None:
        """Set the space from mean and standard deviation (audio_dim,); see `space_statistics`."""
        shift, divisor = space_statistics(mean, std, mode, mean_removed, std_floor)
        self.mean.copy_(shift)
        self.std.copy_(divisor)

    @property
    def standardises(self) -> bool:
        """Whether audio vectors are shifted or scaled before they are given unit length."""
        return bool((self.mean != 0).any() or (self.std != self.std[0]).any())

    @property
    def last_layer(self) -> nn.Linear:
        """The linear layer that ends in the audio space."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def project_text(self, text: Tensor) -> Tensor:
        """Sentence embeddings (batch, text_dim) -> unit vectors (batch, audio_dim) in the standardised space."""
        text = text.to(self.mean)
        # models differ in the length of what they return; at unit mean square the first layer's scale fits them all
        return F.normalize(self.layers(F.rms_norm(text, (self.text_dim,))), dim=-1)

    def standardise_audio(self, audio: Tensor) -> Tensor:
        """Stored audio vectors (batch, audio_dim) -> unit vectors (batch, audio_dim) in the standardised space."""
        audio = audio.to(self.mean)
        return F.normalize((audio - self.mean) / self.std, dim=-1)

    def forward(self, text: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides in the standardised space: (batch, audio_dim) unit vectors of text, and of audio."""
        return self.project_text(text), self.standardise_audio(audio)
