"""The captions that are trained on or asked with, and which source each comes from."""

from dataclasses import dataclass

import numpy as np

from store.reading import Split


def source_numbers(split: Split) -> np.ndarray:
    """A number per source, (N,) for the split's recordings."""
    _, source = np.unique(np.array(split.source_id, dtype=object).astype(str), return_inverse=True)
    return source.reshape(-1)


@dataclass(frozen=True)
class CaptionSet:
    """The captions of a split that are used: C captions of recordings of sources.

    caption_audio: (C,) row of each caption's recording; caption_source: (C,) a number per source.
    """

    captions: list[str]
    caption_audio: np.ndarray
    caption_source: np.ndarray

    @classmethod
    def of(cls, split: Split) -> "CaptionSet":
        """Every caption of a split, in its order."""
        return cls(split.caption, split.caption_audio, source_numbers(split)[split.caption_audio])

    def __len__(self) -> int:
        return len(self.captions)
