"""Texts of the steps before as further negatives: cross-batch memory."""

import numpy as np
import torch
from torch import Tensor


class TextQueue:
    """The sentence embeddings of the last texts that were trained on, as they were then: cross-batch memory.

    Wang et al. (2020): weights move slowly, so that old embeddings are still good negatives. embeddings: (Q, text_dim),
    the newest last. source: (Q,) a number per source. At most `size` are kept.
    """

    def __init__(self, size: int, text_dim: int, device: torch.device):
        self.size = size
        self.embeddings = torch.zeros(0, text_dim, device=device)
        self.source = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def blank(self) -> Tensor:
        """Embeddings of nothing, (0, text_dim), on the device of all others."""
        return self.embeddings[:0]

    def add(self, embeddings: Tensor, source: np.ndarray) -> None:
        """Put texts at the end; the oldest leave."""
        self.embeddings = torch.cat([self.embeddings, embeddings.detach()])[-self.size :]
        self.source = np.concatenate([self.source, source])[-self.size :]

    def state(self) -> dict:
        """Plain values for a checkpoint."""
        return {"embeddings": self.embeddings.cpu(), "source": torch.from_numpy(self.source)}

    def restore(self, state: dict) -> None:
        """Put `state` back."""
        self.embeddings, self.source = state["embeddings"].to(self.embeddings.device), state["source"].numpy()
