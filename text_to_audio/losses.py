"""InfoNCE on matrices of cosines, as pure tensor functions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    similarity: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    label_smoothing: float = 0.0,
    same_source: Tensor | None = None,
    treat_same_source: str = "mask",
) -> Tensor:
    """Mean InfoNCE of queries against any set of candidates: van den Oord et al. (2018), eq. 4.

    similarity: (queries, candidates) cosines. target: (queries,) the column that belongs to each query.
    same_source: (queries, candidates) bool, candidates cut from the query's own source; they are never negatives:
    "mask" leaves them out, "positive" makes them targets of equal weight, as in supervised contrastive learning
    (Khosla et al. 2020, L_out). Label smoothing spreads its share evenly over the candidates that are not left out.
    """
    rows = torch.arange(len(target), device=target.device)
    positive = torch.zeros_like(similarity, dtype=torch.bool)
    positive[rows, target] = True
    left_out = torch.zeros_like(positive)
    if same_source is not None and treat_same_source == "mask":
        left_out = same_source & ~positive
    elif same_source is not None and treat_same_source == "positive":
        positive = positive | same_source
    elif same_source is not None:
        raise ValueError(f"treat_same_source is 'mask' or 'positive', not {treat_same_source!r}")

    log_p = F.log_softmax((similarity / temperature).masked_fill(left_out, -torch.inf), dim=1)
    log_p = log_p.masked_fill(left_out, 0.0)  # -inf times a weight of 0 would be nan
    loss = -(log_p * positive).sum(1) / positive.sum(1)
    if label_smoothing:
        even = -log_p.sum(1) / (~left_out).sum(1)
        loss = (1 - label_smoothing) * loss + label_smoothing * even
    return loss.mean()


def symmetric_loss(
    similarity: Tensor, target: Tensor, temperature: float | Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Mean of both directions for texts against recordings, where the recordings may outnumber the texts.

    similarity: (texts, recordings). Text -> audio compares each text with every column; audio -> text compares
    the texts' own recordings, columns `target`, with the texts. With as many columns as rows this is CLIP's loss.
    """
    text_to_audio = contrastive_loss(similarity, target, temperature, label_smoothing)
    own = torch.arange(len(target), device=target.device)
    audio_to_text = contrastive_loss(similarity[:, target].T, own, temperature, label_smoothing)
    return (text_to_audio + audio_to_text) / 2


def in_batch_loss(
    text: Tensor, audio: Tensor, own: Tensor, audio_negatives: str, temperature: float, label_smoothing: float
) -> Tensor:
    """Symmetric InfoNCE of one forward pass's texts.

    text: (texts, dim) unit vectors. audio: (recordings, dim) unit vectors of the whole effective batch. own: (texts,)
    row of each text's recording. audio_negatives "batch": every text sees all of them; "micro": only the recordings
    of this forward pass.
    """
    if audio_negatives == "micro":
        audio, own = audio[own], torch.arange(len(own), device=own.device)
    return symmetric_loss(text @ audio.T, own, temperature, label_smoothing)
