"""A track's vector: the mean over its windows', the same to the last bit for preparing, indexing and single files."""

import numpy as np


class WindowMean:
    """The mean of vectors (dim,) that are added in the order of a track's windows.

    They are added one after another in float64, so that the mean does not depend on how windows were put in batches.
    """

    def __init__(self) -> None:
        self._total: np.ndarray | None = None
        self.count = 0

    def add(self, vectors: np.ndarray) -> None:
        """Take the next windows' vectors, (n, dim) or one of (dim,)."""
        for vector in np.atleast_2d(vectors):
            if self._total is None:
                self._total = vector.astype(np.float64)
            else:
                self._total += vector
            self.count += 1

    def mean(self) -> np.ndarray:
        """The mean of what was added, (dim,) float32."""
        if self._total is None:
            raise ValueError("expected at least one vector to take the mean of, found none")
        return (self._total / self.count).astype(np.float32)
