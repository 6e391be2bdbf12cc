"""What a text and a recording are told apart from: micro-batch, effective batch, bank and queue, as the config says."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from text_to_audio.config import TrainingConfig
from text_to_audio.loss.bank import AudioBank, bank_loss
from text_to_audio.loss.info_nce import audio_to_text_loss, contrastive_loss, loss_in_groups


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


def contrastive_objective(
    text: Tensor, parts: list[np.ndarray], candidates: Candidates, temperature: Tensor, config: TrainingConfig
) -> Tensor:
    """Symmetric InfoNCE of texts with the negatives of the config.

    text: (texts, dim) unit vectors of the micro-batches `parts`, one after the other, each an array of its captions'
    positions in the effective batch. Audio -> text compares these texts' recordings with these texts, and with the
    queue's; text -> audio has what `audio_negatives` says.
    """
    positions = np.concatenate(parts)
    own = torch.from_numpy(positions).to(text.device, non_blocking=True)
    every = torch.arange(len(own), device=text.device)
    own_audio, smoothing = candidates.audio[own], config.label_smoothing
    if config.audio_negatives == "batch":
        similarity, target = text @ candidates.audio.T, own
        text_to_audio = contrastive_loss(similarity, target, temperature, smoothing)
    else:
        similarity, target = text @ own_audio.T, every
        if config.audio_negatives == "micro":
            text_to_audio = loss_in_groups(similarity, [len(part) for part in parts], temperature, smoothing)
        else:
            rows = candidates.rows[positions]
            text_to_audio = bank_loss(text, rows, candidates.bank, temperature, smoothing, config.same_source)
    queued = None
    if candidates.queued is not None:
        queued = own_audio @ candidates.queued[0].T, candidates.queued[1][own]
    audio_to_text = audio_to_text_loss(similarity, target, temperature, smoothing, queued)
    return (text_to_audio + audio_to_text) / 2
