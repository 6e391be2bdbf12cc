"""Every training recording as a candidate of every text: held or streamed in tiles, and the loss against them all."""

from collections.abc import Iterator

import numpy as np
import psutil
import torch
from torch import Tensor

from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.captions import source_numbers
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.model.head import ProjectionHead

TILE_ELEMENTS = 1 << 25  # elements of the bank in hand at once: 128 MB in float32
HELD_ON_CPU_BYTES = 2 << 30  # without a GPU a wider bank is read from the store's file, which the system caches


def bank_place(nbytes: int, device: torch.device) -> str:
    """Where a standardised bank of this size is kept: "device", "host" (pinned memory) or "file" (not kept)."""
    if device.type != "cuda":
        return "device" if nbytes <= HELD_ON_CPU_BYTES else "file"
    if nbytes <= torch.cuda.mem_get_info(device)[0] / 2:  # activations and the optimizer need the rest
        return "device"
    return "host" if nbytes <= psutil.virtual_memory().available / 2 else "file"


class AudioBank:
    """The N recordings of a split as unit vectors in the standardised space, given out in tiles.

    source: (N,) a number per source. copies: (N,) how many recordings each one's source has. place: see `bank_place`;
    "file" standardises each tile anew whenever it is read.
    """

    def __init__(
        self,
        vectors: AudioVectors,
        source: np.ndarray,
        projection: ProjectionHead,
        dtype: torch.dtype,
        place: str | None = None,
    ):
        device = projection.mean.device
        self._vectors, self._projection = vectors, projection
        self.source_numbers = source  # on the host, so that no step waits for the device to look something up
        self.source = torch.from_numpy(source).to(device)
        self.copies = torch.from_numpy(np.bincount(source)[source]).to(device)
        self.nbytes = len(vectors) * vectors.dim * dtype.itemsize
        self.place = place or bank_place(self.nbytes, device)
        self._held = None
        if self.place == "file":
            return
        where = {"device": device} if self.place == "device" else {"pin_memory": True}
        self._held = torch.empty(len(vectors), vectors.dim, dtype=dtype, **where)
        for start, stop in self.spans():
            self._held[start:stop] = projection.standardise_audio(vectors.block(start, stop))

    def __len__(self) -> int:
        return len(self._vectors)

    def spans(self) -> Iterator[tuple[int, int]]:
        """First row and end of each tile."""
        step = max(1, TILE_ELEMENTS // self._vectors.dim)
        for start in range(0, len(self), step):
            yield start, min(start + step, len(self))

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, (rows, dim) unit vectors on the head's device and in its float type) until all were given."""
        for start, stop in self.spans():
            if self._held is None:
                yield start, self._projection.standardise_audio(self._vectors.block(start, stop))
            else:
                tile = self._held[start:stop].to(self._projection.mean.device, non_blocking=True)
                yield start, tile.to(self._projection.mean.dtype)


def build_bank(
    config: TrainingConfig, store: EmbeddingStore, vectors: AudioVectors, projection: ProjectionHead
) -> AudioBank:
    """Every training recording in the standardised space, in the training's float type."""
    dtype = torch.bfloat16 if config.bf16 else projection.mean.dtype
    return AudioBank(vectors, source_numbers(store.split("train")), projection, dtype)


def bank_loss(
    text: Tensor,
    rows: np.ndarray,
    bank: AudioBank,
    temperature: float | Tensor,
    label_smoothing: float = 0.0,
    same_source: str = "mask",
) -> Tensor:
    """Mean InfoNCE of texts against every recording of the bank, which is swept once, in tiles.

    text: (texts, dim) unit vectors. rows: (texts,) each text's recording in the bank. It equals `contrastive_loss` over
    the full matrix of cosines with its same-source mask, gradients included, in memory of a tile and three times the
    texts. `same_source`: other recordings of a text's source are left out ("mask") or are targets too ("positive").
    """
    log_sum, expected, target = _sweep(text.detach(), rows, bank, temperature, label_smoothing, same_source)
    # the derivative of a log-sum-exp is the mean derivative of the scores under its softmax
    expected_score = (expected * text).sum(1) / temperature
    log_sum = log_sum + (expected_score - expected_score.detach())
    return (log_sum - (target * text).sum(1) / temperature).mean()


@torch.no_grad()
def _sweep(text, rows, bank, temperature, label_smoothing, same_source) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each text's scores (texts,), and two mean recordings (texts, dim): softmax's and the target's.

    The softmax's mean is kept relative to the highest score so far, as in online softmax (Milakov and Gimelshein 2018).
    """
    # the few columns whose share of the target is not the even one
    near = np.flatnonzero(np.isin(bank.source_numbers, bank.source_numbers[rows]))
    near_of = iter(np.split(near, np.searchsorted(near, [stop for _, stop in bank.spans()])))
    rows = torch.from_numpy(rows).to(text.device, non_blocking=True)
    source, copies = bank.source[rows], bank.copies[rows].to(text.dtype)
    positives = copies if same_source == "positive" else torch.ones_like(copies)
    allowed = len(bank) - copies + 1 if same_source == "mask" else torch.full_like(copies, len(bank))
    highest = (-1.01 / temperature) * torch.ones_like(text[:, 0])  # below every score, and finite
    total = torch.zeros_like(highest)
    expected, target = torch.zeros_like(text), torch.zeros_like(text)
    for start, audio in bank.tiles():
        columns = torch.arange(start, start + len(audio), device=text.device)
        own = rows[:, None] == columns
        same = source[:, None] == bank.source[columns]
        left_out = same & ~own if same_source == "mask" else torch.zeros_like(own)
        scores = (text @ audio.T / temperature).masked_fill_(left_out, -torch.inf)
        previous, highest = highest, torch.maximum(highest, scores.amax(1))
        shrink = torch.exp(previous - highest)
        weight = torch.exp(scores - highest[:, None])
        total = total * shrink + weight.sum(1)
        expected.mul_(shrink[:, None]).addmm_(weight, audio)
        near = torch.from_numpy(next(near_of) - start).to(text.device, non_blocking=True)
        share = (same if same_source == "positive" else own)[:, near] * ((1 - label_smoothing) / positives)[:, None]
        if label_smoothing:
            target += (label_smoothing / allowed)[:, None] * audio.sum(0)
            share = share - left_out[:, near] * (label_smoothing / allowed)[:, None]
        target.addmm_(share, audio[near])
    return highest + total.log(), expected / total[:, None], target
