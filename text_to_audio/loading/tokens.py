"""The captions' tokens, made once and kept."""

import re

import numpy as np
import torch
from torch import Tensor

from text_to_audio.model.text_encoder import TextEncoder


class TokenCache:
    """Every caption's token ids, made once per run and kept in one flat array."""

    def __init__(self, text_encoder: TextEncoder, captions: list[str]):
        rows = text_encoder.tokenise(captions) if captions else []
        self.lengths = np.array([len(row) for row in rows], np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._flat = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        self._pad_token = text_encoder.pad_token

    def padded(self, captions: np.ndarray) -> Tensor:
        """Token ids and attention mask of these captions, (2, batch, longest) int64: one tensor, so one copy."""
        lengths = self.lengths[captions][:, None]
        position = np.arange(lengths.max())
        mask = position < lengths
        ids = self._flat[self._starts[captions][:, None] + np.minimum(position, lengths - 1)].astype(np.int64)
        ids[~mask] = self._pad_token
        return torch.from_numpy(np.stack((ids, mask)))


def drop_sentences(caption: str, probability: float, rng: np.random.Generator) -> str:
    """The caption without the sentences that chance leaves out, each with this probability; one always stays."""
    sentences = re.split(r"(?<=[.!?])\s+", caption.strip())
    kept = rng.random(len(sentences)) >= probability
    kept[rng.integers(len(sentences))] |= not kept.any()
    return " ".join(sentence for sentence, keep in zip(sentences, kept, strict=True) if keep)
