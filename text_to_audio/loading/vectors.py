"""The audio vectors that go with a batch, read by rows."""

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from store.reading import EmbeddingStore

IN_MEMORY_BYTES = 2 << 30  # spaces up to this size are read once; wider ones stay mapped


class AudioVectors:
    """The audio vectors of one split and space, (recordings, dim), read by rows.

    Small spaces are held in memory, wide ones stay in the file. Indexing by an array of rows gives a float32 or
    float16 tensor; a vector that is not finite is a `UserError` that names its recording.
    """

    def __init__(self, store: EmbeddingStore, split: str, encoder: str):
        self._vectors = store.vectors(split, encoder)
        self._audio_id = store.split(split).audio_id
        self._where = f"{store.path}: {split} vector of {encoder}"
        if self._vectors.nbytes <= IN_MEMORY_BYTES:
            self._vectors = np.array(self._vectors)
        self.nbytes = self._vectors.nbytes

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def dim(self) -> int:
        """Width of the space."""
        return self._vectors.shape[1]

    def block(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, unchecked: one that is not finite makes the space's statistics so."""
        return torch.from_numpy(np.array(self._vectors[start:stop]))

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        order = np.argsort(rows, kind="stable")  # the file is read front to back
        found = np.empty((len(rows), self.dim), self._vectors.dtype)
        found[order] = self._vectors[rows[order]]
        vectors = torch.from_numpy(found)
        finite = torch.isfinite(vectors).all(1)
        if not finite.all():
            bad = self._audio_id[rows[int((~finite).nonzero()[0])]]
            raise UserError(f"{self._where}: expected finite numbers for {bad}, found nan or infinity")
        return vectors
