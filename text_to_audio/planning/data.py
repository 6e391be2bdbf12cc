"""How much a run is planned for: what its store holds, or what is published of a data set that is not prepared yet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.planning.footprint import Shape


@dataclass(frozen=True)
class PlannedData:
    """The data of a planned run. captions: the texts of the train split, None where nobody has them yet."""

    shape: Shape
    captions: list[str] | None
    origin: str

    @classmethod
    def of_store(cls, config: TrainingConfig) -> "PlannedData":
        """What the run's store holds. `UserError` where it is not there or lacks a space."""
        store = EmbeddingStore(config.data_path)
        return cls(Shape.of(store, config.audio_encoders), store.split("train").caption, config.data_path)

    @classmethod
    def counted(
        cls, dims: Mapping[str, int], recordings: int, copies: int, captions: int, origin: str
    ) -> "PlannedData":
        """So many recordings, `copies` of each source, with so many captions each, in float32.

        dims: width of each space.
        """
        source = np.arange(recordings) // copies
        shape = Shape(dict(dims), torch.float32, source, np.repeat(np.arange(recordings), captions))
        return cls(shape, None, origin)


def has_store(config: TrainingConfig) -> bool:
    """Whether the store that the run reads is there, or was named: one that is named has to be there."""
    return config.data_path != TrainingConfig.data_path or Path(config.data_path).exists()
