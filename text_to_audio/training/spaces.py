"""The audio spaces of a run: each one's head, spread, temperature, recordings and validation."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from store.reading import EmbeddingStore
from text_to_audio.config import BEFORE, TrainingConfig
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.loss.bank import build_bank
from text_to_audio.measuring.curves import CurveWriter
from text_to_audio.measuring.evaluation import Evaluator
from text_to_audio.model.head import ProjectionHead, space_statistics
from text_to_audio.model.temperature import Temperature
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.processes import ALONE, Processes
from text_to_audio.training.keeping import Best
from text_to_audio.training.resuming import Checkpoint
from text_to_audio.training.step_models import SpaceModels

SPREAD_FROM = 1024  # recordings that a spread is measured on, 315 MB of MERT's: |mean|^2 is a thousandth too large
SPREAD_WANTED = 0.9  # that `mean_removed auto` aims at: docs/ablation.md
LEAST_SPREAD = 0.01  # the rounding of float16 vectors is not far below


@dataclass(kw_only=True)
class Space(SpaceModels):
    """One audio space of a run: also its recordings, how it is measured, and how well it has done so far.

    writer: after `open_curves` in the process that writes, else None.
    """

    vectors: AudioVectors
    validation: Evaluator
    writer: CurveWriter | None = None
    best: Best = field(default_factory=Best)

    @property
    def caption_audio(self) -> np.ndarray:
        """Each validation caption's recording, (captions,)."""
        return self.validation.gallery.captions.caption_audio


def build_spaces(
    config: TrainingConfig,
    store: EmbeddingStore,
    text_encoder: TextEncoder,
    processes: Processes = ALONE,
    resumed: Checkpoint | None = None,
) -> list[Space]:
    """A head, temperature, recordings and validation for each audio space of the config."""
    spaces: list[Space] = []
    for name in config.audio_encoders:
        own = replace(config, audio_encoder=name, audio_dim=store.dim(name))
        vectors = AudioVectors(store, "train", name)
        own = as_begun(own, resumed) if resumed else measured_space(own, store, vectors)
        projection = build_projection(own, store)
        bank = build_bank(own, store, vectors, projection) if config.audio_negatives == "bank" else None
        temperature = Temperature(config.temperature, config.learn_temperature, own.spread).to(config.torch_device)
        tokens = spaces[0].validation.tokens if spaces else None
        validation = Evaluator(text_encoder, store, "val", own, processes, tokens)
        spaces.append(
            Space(
                config=own, projection=projection, temperature=temperature, bank=bank, vectors=vectors,
                validation=validation,
            )
        )  # fmt: skip
    return spaces


def build_projection(config: TrainingConfig, store: EmbeddingStore) -> ProjectionHead:
    """The head with the store's statistics, on the config's device; `UserError` where they are not finite."""
    head = ProjectionHead(config.text_dim, config.hidden_dim, config.audio_dim, config.head_dropout)
    with finite(store, config.audio_encoder):
        head.set_statistics(
            *store.statistics(config.audio_encoder), config.standardise, config.mean_removed, config.std_floor
        )
    return head.to(config.torch_device)


@contextmanager
def finite(store: EmbeddingStore, encoder: str) -> Iterator[None]:
    """Statistics that are not finite become a `UserError` that names the store."""
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"{store.path}: {encoder}: {error}, so a train vector is not; prepare_dataset.py --verify names it"
        ) from error


def as_begun(config: TrainingConfig, resumed: Checkpoint) -> TrainingConfig:
    """The settings of one space with what was measured of it when the run began."""
    state = resumed.contents["spaces"][config.audio_encoder]
    return replace(config, **state.get("measured", {name: BEFORE[name] for name in ("mean_removed", "spread")}))


@torch.no_grad()
def measured_space(config: TrainingConfig, store: EmbeddingStore, vectors: AudioVectors) -> TrainingConfig:
    """The settings of one space with its spread, and with what a `mean_removed` of auto is there.

    Measured on `SPREAD_FROM` recordings, evenly taken.
    """
    with finite(store, config.audio_encoder):
        whole_mean, divisor = space_statistics(
            *store.statistics(config.audio_encoder), config.standardise, mean_removed=1.0, std_floor=config.std_floor
        )
    device = config.torch_device
    rows = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), SPREAD_FROM)).astype(np.int64))
    scaled, mean = vectors[rows].to(device, torch.float32) / divisor.to(device), (whole_mean / divisor).to(device)
    removed = config.mean_removed
    if config.standardise == "none":
        removed = 0.0
    elif removed < 0:
        removed = least_removed(scaled, mean, SPREAD_WANTED)
    return replace(config, mean_removed=removed, spread=spread_of(scaled, mean, removed))


def spread_of(vectors: Tensor, mean: Tensor, removed: float = 0.0) -> float:
    """How far vectors (n, dim), less a share of `mean` (dim,), point in different directions.

    sqrt(1 - |mean unit vector|^2): 1 where they point everywhere, 0 where they are parallel; at least `LEAST_SPREAD`.
    """
    # without a copy of the vectors: each is weighted by what makes it a unit vector
    squares = (vectors.square().sum(1) - 2 * removed * (vectors @ mean) + removed**2 * mean.square().sum()).double()
    weights = squares.clamp_min(1e-24).rsqrt() / len(vectors)
    centre = vectors.T @ weights.to(vectors) - removed * weights.sum().to(vectors) * mean
    return max(LEAST_SPREAD, math.sqrt(max(0.0, 1 - centre.double().square().sum().item())))


def least_removed(vectors: Tensor, mean: Tensor, spread: float) -> float:
    """The least share of the mean, in hundredths, without which vectors (n, dim) have this spread; 1 where none does.

    What all recordings have in common says what is music; the less of it is taken off, the better words find music of
    another kind (docs/ablation.md). It is taken off as far as it hides the differences.
    """
    low, high = 0, 100
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if spread_of(vectors, mean, middle / 100) >= spread else (middle + 1, high)
    return low / 100
