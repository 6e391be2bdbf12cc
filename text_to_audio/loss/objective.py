"""Where the loss is computed: what texts and recordings are told apart from, as the config says, and InfoNCE of it.

Training hands in features (`Features`), validation the scores that its metrics need anyway (`Scores`); what is compared
with what is decided for both in `contrastive_objective`.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from text_to_audio.config import TrainingConfig
from text_to_audio.loss.bank import AudioBank, bank_loss
from text_to_audio.loss.info_nce import audio_to_text_loss, contrastive_loss, loss_in_groups


class Compared(Protocol):
    """The texts of some micro-batches of one effective batch of B captions, in their order, and their cosines."""

    def with_batch(self) -> Tensor:
        """Cosines with the recordings of the whole effective batch, (texts, B)."""

    def with_own(self) -> Tensor:
        """Cosines with these texts' own recordings, in the texts' order, (texts, texts)."""

    def with_queue(self) -> tuple[Tensor, Tensor] | None:
        """Cosines of the texts' recordings with the text queue, (texts, Q), and (texts, Q) bool: of the same source."""

    def loss_against_all(self, temperature: float | Tensor, config: TrainingConfig) -> Tensor:
        """Mean InfoNCE of the texts against every recording of the bank."""


def together(parts: list[np.ndarray], config: TrainingConfig) -> list[list[int]]:
    """The micro-batches, by number, whose texts share one loss: all with `text_negatives` "batch", else each alone."""
    numbers = list(range(len(parts)))
    return [numbers] if config.text_negatives == "batch" else [[number] for number in numbers]


def contrastive_objective(
    compared: Compared, parts: list[np.ndarray], temperature: float | Tensor, config: TrainingConfig
) -> Tensor:
    """Symmetric InfoNCE of the texts of the micro-batches `parts`, the mean over the texts.

    parts: those that `together` puts in one loss, each the positions of its captions in the effective batch.
    Text -> audio compares a text with the recordings of its micro-batch, of the effective batch, or of the bank
    (`audio_negatives`), where the config's `same_source` says what other recordings of its source are. Audio -> text
    compares the texts' recordings with these texts, and in training with the queue's.
    """
    smoothing = config.label_smoothing
    similarity = compared.with_batch() if config.audio_negatives == "batch" else compared.with_own()
    target = torch.arange(len(similarity), device=similarity.device)
    if config.audio_negatives == "batch":
        target = torch.from_numpy(np.concatenate(parts)).to(similarity.device, non_blocking=True)
        text_to_audio = contrastive_loss(similarity, target, temperature, smoothing)
    elif config.audio_negatives == "micro":
        text_to_audio = loss_in_groups(similarity, [len(part) for part in parts], temperature, smoothing)
    else:
        text_to_audio = compared.loss_against_all(temperature, config)
    audio_to_text = audio_to_text_loss(similarity, target, temperature, smoothing, compared.with_queue())
    return (text_to_audio + audio_to_text) / 2


@dataclass(frozen=True)
class Candidates:
    """The recordings of one effective batch of B captions, and what they have besides in this space.

    audio: (B, dim) unit vectors. rows: (B,) the recordings' rows in the train split. bank: where there is one.
    queued: (Q, dim) unit vectors of earlier texts, and (B, Q) bool, which of them are of the recording's source.
    """

    audio: Tensor
    rows: np.ndarray
    bank: AudioBank | None = None
    queued: tuple[Tensor, Tensor] | None = None


class Features:
    """What training compares: texts (texts, dim), unit vectors of the micro-batches `parts`, with `candidates`.

    The bank is swept in tiles, so that there is never a whole matrix of its scores.
    """

    def __init__(self, text: Tensor, parts: list[np.ndarray], candidates: Candidates):
        self._text, self._candidates, self._positions = text, candidates, np.concatenate(parts)
        self._own = torch.from_numpy(self._positions).to(text.device, non_blocking=True)
        self._own_audio = candidates.audio[self._own]

    def with_batch(self) -> Tensor:
        """See `Compared`."""
        return self._text @ self._candidates.audio.T

    def with_own(self) -> Tensor:
        """See `Compared`."""
        return self._text @ self._own_audio.T

    def with_queue(self) -> tuple[Tensor, Tensor] | None:
        """See `Compared`; None without a queue, or while it is empty."""
        if self._candidates.queued is None:
            return None
        texts, same_source = self._candidates.queued
        return self._own_audio @ texts.T, same_source[self._own]

    def loss_against_all(self, temperature: float | Tensor, config: TrainingConfig) -> Tensor:
        """See `Compared`."""
        rows, bank = self._candidates.rows[self._positions], self._candidates.bank
        if bank is None:
            raise ValueError("audio_negatives is 'bank', and the candidates have none")
        return bank_loss(self._text, rows, bank, temperature, config.label_smoothing, config.same_source)


class Scores:
    """What validation compares: scores (C, N) of C captions and the N recordings of a gallery, which is the bank here.

    audio: (C,) each caption's recording. source: (N,) a number per recording's source. batch: the captions of one
    effective batch. parts: as in `contrastive_objective`.
    """

    def __init__(
        self, scores: Tensor, audio: np.ndarray, source: np.ndarray, batch: np.ndarray, parts: list[np.ndarray]
    ):
        self._texts = batch[np.concatenate(parts)]
        self._scores, self._audio, self._source, self._batch = scores[self._texts], audio, source, batch

    def with_batch(self) -> Tensor:
        """See `Compared`."""
        return self._scores[:, self._audio[self._batch]]

    def with_own(self) -> Tensor:
        """See `Compared`."""
        return self._scores[:, self._audio[self._texts]]

    def with_queue(self) -> None:
        """None: validation has no steps before this one, so no text queue."""
        return None

    def loss_against_all(self, temperature: float | Tensor, config: TrainingConfig) -> Tensor:
        """See `Compared`; the gallery's scores are there anyway."""
        own = self._audio[self._texts]
        same = torch.from_numpy(self._source[own][:, None] == self._source)
        target = torch.from_numpy(own)
        return contrastive_loss(self._scores, target, temperature, config.label_smoothing, same, config.same_source)
