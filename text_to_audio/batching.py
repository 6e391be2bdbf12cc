"""Which captions meet in a batch, their cached tokens, and the audio vectors that go with them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from text_to_audio.errors import UserError
from text_to_audio.store import EmbeddingStore, Split
from text_to_audio.text_model import TextEncoder

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


def source_numbers(split: Split) -> np.ndarray:
    """A number per source, (N,) for the split's recordings."""
    _, source = np.unique(np.array(split.source_id, dtype=object).astype(str), return_inverse=True)
    return source.reshape(-1)


def drop_sentences(caption: str, probability: float, rng: np.random.Generator) -> str:
    """The caption without the sentences that chance leaves out, each with this probability; one always stays."""
    sentences = re.split(r"(?<=[.!?])\s+", caption.strip())
    kept = rng.random(len(sentences)) >= probability
    kept[rng.integers(len(sentences))] |= not kept.any()
    return " ".join(sentence for sentence, keep in zip(sentences, kept, strict=True) if keep)


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


def batches_per_epoch(source: np.ndarray, batch_size: int) -> int:
    """Fewest batches of at most `batch_size` captions in which no source (C,) is met twice."""
    return max(int(np.bincount(source).max()), -(-len(source) // batch_size))


def plan_epoch(source: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Deal every caption into one batch such that no batch holds two captions of one source.

    source: (C,) a number per source. Returns arrays of caption indices, whose sizes differ by at most one. The
    same seed and epoch give the same batches.

    Captions, source by source, are dealt out in rounds that visit every batch once. A source that runs over the end
    of a round goes on in batches that its first part did not visit. There are at least as many batches as captions
    of any source, so there always are some.
    """
    rng = np.random.default_rng((seed, epoch))
    count = batches_per_epoch(source, batch_size)
    order = rng.permutation(len(source))
    shuffled_source = rng.permutation(int(source.max()) + 1)[source]
    order = order[np.argsort(shuffled_source[order], kind="stable")]  # sources and their captions in random order
    dealt = source[order]
    batch_of = np.empty(len(source), np.int64)
    for start in range(0, len(source), count):
        stop = min(start + count, len(source))
        carried = 0
        if start and dealt[start] == dealt[start - 1]:
            carried = int((dealt[start:stop] == dealt[start]).sum())
            visited = batch_of[start - count : start][dealt[start - count : start] == dealt[start]]
        else:
            visited = np.zeros(0, np.int64)
        free = rng.permutation(np.setdiff1d(np.arange(count), visited))
        rest = rng.permutation(np.concatenate([free[carried:], visited]))
        batch_of[start:stop] = np.concatenate([free[:carried], rest])[: stop - start]
    by_batch = order[np.argsort(batch_of, kind="stable")]
    return np.split(by_batch, np.cumsum(np.bincount(batch_of, minlength=count))[:-1])


def micro_batches(captions: np.ndarray, lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Split an effective batch into equal parts of at most `size` captions of like length.

    Yields positions in `captions`. Equal, since a small rest would leave its texts few others to be told from.
    """
    order = np.argsort(lengths[captions], kind="stable")
    yield from np.array_split(order, -(-len(order) // size))


def padding_share(plan: list[np.ndarray], lengths: np.ndarray, size: int) -> float:
    """Share of padding among all tokens of an epoch's forward passes."""
    padded = sum(
        len(part) * int(lengths[captions[part]].max())
        for captions in plan
        for part in micro_batches(captions, lengths, size)
    )
    return 1 - int(lengths.sum()) / padded
