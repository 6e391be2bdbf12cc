"""What a text and a recording are told apart from: micro-batch, effective batch or bank, as the config says."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from text_to_audio.bank import AudioBank, bank_loss
from text_to_audio.config import TrainingConfig
from text_to_audio.losses import audio_to_text_loss, in_batch_loss


@dataclass(frozen=True)
class Candidates:
    """The recordings of one effective batch of B captions, and the bank where there is one.

    audio: (B, dim) unit vectors. rows: (B,) the recordings' rows in the train split.
    """

    audio: Tensor
    rows: np.ndarray
    bank: AudioBank | None = None


def contrastive_objective(
    text: Tensor, parts: list[np.ndarray], candidates: Candidates, temperature: Tensor, config: TrainingConfig
) -> Tensor:
    """Symmetric InfoNCE of texts with the negatives of the config.

    text: (texts, dim) unit vectors of the micro-batches `parts`, one after the other, each an array of its captions'
    positions in the effective batch. Audio -> text compares these texts' recordings with these texts; text -> audio
    has what `audio_negatives` says.
    """
    positions = np.concatenate(parts)
    own = torch.from_numpy(positions).to(text.device)
    smoothing = config.label_smoothing
    if config.audio_negatives != "bank":
        sizes = [len(part) for part in parts]
        return in_batch_loss(text, candidates.audio, own, config.audio_negatives, temperature, smoothing, sizes)
    rows = torch.from_numpy(candidates.rows[positions]).to(text.device)
    text_to_audio = bank_loss(text, rows, candidates.bank, temperature, smoothing, config.same_source)
    similarity = text @ candidates.audio[own].T
    target = torch.arange(len(own), device=text.device)
    return (text_to_audio + audio_to_text_loss(similarity, target, temperature, smoothing)) / 2
