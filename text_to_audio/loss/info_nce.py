"""InfoNCE on matrices of cosines, as pure tensor functions, and its temperature."""

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
    positive = torch.zeros_like(similarity, dtype=torch.bool)
    positive.scatter_(1, target[:, None], True)  # by indexing, the True would be copied to the device and waited for
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


def audio_to_text_loss(
    similarity: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    label_smoothing: float = 0.0,
    queued: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean InfoNCE of the texts' own recordings against the texts.

    similarity: (texts, recordings). target: (texts,) the column of each text's recording. queued: (texts, Q) cosines of
    these recordings with Q texts more, and (texts, Q) bool, which of those are of the recording's source: left out.
    """
    own = torch.arange(len(target), device=similarity.device)
    by_audio = similarity[:, target].T
    if queued is None:
        return contrastive_loss(by_audio, own, temperature, label_smoothing)
    cosines, same = queued
    left_out = torch.cat([torch.zeros_like(by_audio, dtype=torch.bool), same], dim=1)
    return contrastive_loss(torch.cat([by_audio, cosines], dim=1), own, temperature, label_smoothing, left_out)


def loss_in_groups(
    similarity: Tensor, sizes: list[int], temperature: float | Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Mean InfoNCE over texts of which each sees the columns of its own group alone.

    similarity: (texts, their recordings). sizes: texts of each of the consecutive groups.
    """
    total, start = similarity.new_zeros(()), 0
    for size in sizes:
        group = similarity[start : start + size, start : start + size]
        own = torch.arange(size, device=similarity.device)
        total = total + size * contrastive_loss(group, own, temperature, label_smoothing)
        start += size
    return total / start
