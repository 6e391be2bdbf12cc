"""Every training recording as a candidate of every text: held or streamed in tiles, and the loss against them all."""

from collections.abc import Iterator
from typing import Protocol

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
UNCOPIED_TILES = 16  # times as many where a tile is a view of the bank: only its scores take memory
HELD_ON_CPU_BYTES = 2 << 30  # without a GPU a wider bank is read from the store's file, which the system caches


def bank_place(nbytes: int, device: torch.device) -> str:
    """Where a standardised bank of this size is kept: "device", "host" (pinned memory) or "file" (not kept)."""
    if device.type != "cuda":
        return "device" if nbytes <= HELD_ON_CPU_BYTES else "file"
    if nbytes <= torch.cuda.mem_get_info(device)[0] / 2:  # activations and the optimizer need the rest
        return "device"
    return "host" if nbytes <= psutil.virtual_memory().available / 2 else "file"


class VectorBlocks(Protocol):
    """Audio vectors (recordings, dim) of which a block of rows can be had, as of `AudioVectors`."""

    @property
    def dim(self) -> int:
        """Width of the space."""

    def __len__(self) -> int: ...

    def block(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`."""


class AudioBank:
    """The N recordings of a split as unit vectors in the standardised space, given out in tiles.

    source: (N,) a number per source. copies: (N,) how many recordings each one's source has. place: see `bank_place`;
    "file" standardises each tile anew whenever it is read.
    """

    def __init__(
        self,
        vectors: VectorBlocks,
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
        for start, stop in self._spans(TILE_ELEMENTS):
            self._held[start:stop] = projection.standardise_audio(vectors.block(start, stop))

    def __len__(self) -> int:
        return len(self._vectors)

    def spans(self) -> Iterator[tuple[int, int]]:
        """First row and end of each tile."""
        uncopied = self._held is not None and self._held.is_cuda
        return self._spans(TILE_ELEMENTS * (UNCOPIED_TILES if uncopied else 1))

    def _spans(self, elements: int) -> Iterator[tuple[int, int]]:
        step = max(1, elements // self._vectors.dim)
        for start in range(0, len(self), step):
            yield start, min(start + step, len(self))

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, (rows, dim) unit vectors on the head's device, as they are held) until all were given."""
        for start, stop in self.spans():
            if self._held is None:
                yield start, self._projection.standardise_audio(self._vectors.block(start, stop))
            else:
                yield start, self._held[start:stop].to(self._projection.mean.device, non_blocking=True)


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
    with torch.no_grad():
        log_sum, expected, target = _sweep(text.detach(), rows, bank, temperature, label_smoothing, same_source)
    # the derivative of a log-sum-exp is the mean derivative of the scores under its softmax
    expected_score = (expected * text).sum(1) / temperature
    log_sum = log_sum + (expected_score - expected_score.detach())
    return (log_sum - (target * text).sum(1) / temperature).mean()


def _sweep(
    text: Tensor,
    rows: np.ndarray,
    bank: AudioBank,
    temperature: float | Tensor,
    label_smoothing: float,
    same_source: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go through the bank once; arguments as in `bank_loss`.

    Returns log-sum-exp of each text's scores (texts,), and two weighted means of the recordings, (texts, dim): by the
    softmax's weights and by the target's. From these the loss and its gradient follow without the scores.
    """
    softmax = _RunningSoftmax(text, temperature)
    targets = _Targets(text, rows, bank, label_smoothing, same_source)
    near = np.flatnonzero(np.isin(bank.source_numbers, bank.source_numbers[rows]))
    bounds = np.searchsorted(near, [start for start, _ in bank.spans()] + [len(bank)]).tolist()
    near_rows = torch.from_numpy(near).to(text.device, non_blocking=True)  # one copy for all tiles
    for number, (start, audio) in enumerate(bank.tiles()):
        tile_rows = near_rows[bounds[number] : bounds[number + 1]]
        own, same = targets.relation(tile_rows)
        columns = tile_rows - start
        scores = _product(text, audio.T) / temperature
        if same_source == "mask":
            scores[:, columns] = scores[:, columns].masked_fill(same & ~own, -torch.inf)
        softmax.add(scores, audio)
        targets.add(audio, columns, own, same)
    return softmax.log_sum(), softmax.mean(), targets.mean


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in left's type, where right may be a bank in half precision.

    On CUDA such a bank is multiplied as it is held, with sums in float32. Elsewhere, and with a torch that cannot, it
    is copied first.
    """
    if right.dtype == left.dtype:
        return left @ right
    if right.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(left.to(right.dtype), right, out_dtype=left.dtype)
    return left @ right.to(left.dtype)


class _RunningSoftmax:
    """Log-sum-exp of scores that come tile by tile, and the mean recording under their softmax.

    Sums are kept relative to the highest score so far and shrunk when a higher one comes, so that nothing overflows:
    online softmax (Milakov and Gimelshein 2018).
    """

    def __init__(self, text: Tensor, temperature: float | Tensor):
        self._highest = (-1.01 / temperature) * torch.ones_like(text[:, 0])  # below every score, and finite
        self._total = torch.zeros_like(self._highest)
        self._weighted = torch.zeros_like(text)

    def add(self, scores: Tensor, audio: Tensor) -> None:
        """Take in a tile: scores (texts, rows), -inf where a recording is left out, and audio (rows, dim)."""
        previous, self._highest = self._highest, torch.maximum(self._highest, scores.amax(1))
        shrink = torch.exp(previous - self._highest)
        weight = torch.exp(scores - self._highest[:, None])
        self._total = self._total * shrink + weight.sum(1)
        self._weighted.mul_(shrink[:, None]).add_(_product(weight, audio))

    def log_sum(self) -> Tensor:
        """Log-sum-exp of each text's scores, (texts,)."""
        return self._highest + self._total.log()

    def mean(self) -> Tensor:
        """The mean recording of each text under its softmax, (texts, dim)."""
        return self._weighted / self._total[:, None]


class _Targets:
    """The mean recording of each text under its target: `mean`, (texts, dim), whole when every tile was added.

    A target is spread evenly over the positives, less the label smoothing, and that evenly over all recordings that are
    not left out. Only recordings near the batch, of a source that is in it, can differ from the even share, so only
    these few columns of a tile are multiplied.
    """

    def __init__(self, text: Tensor, rows: np.ndarray, bank: AudioBank, label_smoothing: float, same_source: str):
        self.mean = torch.zeros_like(text)
        self._rows = torch.from_numpy(rows).to(text.device, non_blocking=True)
        self._bank_source, self._source = bank.source, bank.source[self._rows]
        copies = bank.copies[self._rows].to(text.dtype)
        positives = copies if same_source == "positive" else torch.ones_like(copies)
        allowed = len(bank) - copies + 1 if same_source == "mask" else torch.full_like(copies, len(bank))
        self._of_positive = ((1 - label_smoothing) / positives)[:, None]
        self._even = (label_smoothing / allowed)[:, None] if label_smoothing else None
        self._same_source = same_source

    def relation(self, near: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these rows of the bank are each text's own recording, and of its source; (texts, near) bool."""
        return self._rows[:, None] == near, self._source[:, None] == self._bank_source[near]

    def add(self, audio: Tensor, near: Tensor, own: Tensor, same: Tensor) -> None:
        """Take in a tile (rows, dim). near: its columns near the batch; own, same: their `relation`."""
        share = (same if self._same_source == "positive" else own) * self._of_positive
        if self._even is not None:
            self.mean += self._even * audio.sum(0, dtype=self.mean.dtype)
            if self._same_source == "mask":
                share = share - (same & ~own) * self._even
        self.mean.addmm_(share, audio[near].to(self.mean.dtype))
