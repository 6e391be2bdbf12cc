"""The audio spaces of a run: each one's head, spread, temperature, recordings and validation."""

import math
from collections.abc import Iterable
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
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.temperature import Temperature
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.processes import ALONE, Processes
from text_to_audio.training.resuming import Best, Checkpoint
from text_to_audio.training.step_models import SpaceModels

SPREAD_FROM = 4096  # recordings that a spread is measured on: a twentieth of a percent of error, 630 MB of MERT's
LEAST_SPREAD = 0.01  # the rounding of float16 vectors is not far below
_TILE_ELEMENTS = 1 << 24  # audio elements in hand at once: 64 MB in float32


@dataclass(kw_only=True)
class Space(SpaceModels):
    """One audio space of a run: also its recordings, how it is measured, and how well it has done so far.

    writer: after `open_curves` in the process that writes, else None.
    """

    vectors: AudioVectors
    validation: Evaluator
    writer: CurveWriter | None = None
    best: Best = field(default_factory=Best)


def build_spaces(
    config: TrainingConfig,
    store: EmbeddingStore,
    text_encoder: TextEncoder,
    processes: Processes = ALONE,
    resumed: Checkpoint | None = None,
) -> list[Space]:
    """A head, temperature, recordings and validation for each audio space of the config.

    The spread of a run that is gone on with is what it was when the run began.
    """
    spaces: list[Space] = []
    for name in config.audio_encoders:
        own = replace(config, audio_encoder=name, audio_dim=store.dim(name))
        projection = build_projection(own, store)
        vectors = AudioVectors(store, "train", name)
        if resumed:
            own = replace(own, spread=resumed.contents["spaces"][name].get("spread", BEFORE["spread"]))
        else:
            own = replace(own, spread=measure_spread(vectors, projection))
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
    mean, std = store.statistics(config.audio_encoder)
    try:
        head.set_statistics(mean, std, config.standardise, config.mean_removed, config.std_floor)
    except ValueError as error:
        raise UserError(
            f"{store.path}: {config.audio_encoder}: {error}, so a train vector is not; "
            f"prepare_dataset.py --verify names it"
        ) from error
    return head.to(config.torch_device)


@torch.no_grad()
def measure_spread(vectors: AudioVectors, projection: ProjectionHead) -> float:
    """The `unit_spread` of recordings in the head's space, measured on `SPREAD_FROM` of them, evenly taken."""
    rows = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), SPREAD_FROM)).astype(np.int64))
    parts = np.array_split(rows, max(1, len(rows) * vectors.dim // _TILE_ELEMENTS))
    return unit_spread(projection.standardise_audio(vectors[part]) for part in parts)


def unit_spread(parts: Iterable[Tensor]) -> float:
    """How far unit vectors, (n, dim) in each part, point in different directions: sqrt(1 - |their mean|^2).

    1 where they point everywhere, 0 where they are parallel; at least `LEAST_SPREAD`.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        total, count = total + part.sum(0, dtype=torch.float64).cpu(), count + len(part)
    return max(LEAST_SPREAD, math.sqrt(max(0.0, 1 - (total / count).square().sum().item())))
