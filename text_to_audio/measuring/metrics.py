"""Retrieval metrics from a matrix of scores: R@K in percent, MRR in 0..1, median rank from 1."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
_CHUNK_ELEMENTS = 1 << 24  # scores compared at once: 16 MB of booleans


def text_to_audio_ranks(scores: Tensor, caption_audio: Tensor) -> Tensor:
    """Rank of each caption's recording among all recordings, from 1; a tie counts against the system.

    scores: (captions, recordings). caption_audio: (captions,) each caption's row in the gallery.
    """
    own = scores.gather(1, caption_audio[:, None])
    return _chunked(lambda part: (scores[part] >= own[part]).sum(1), *scores.shape)


def audio_to_text_ranks(scores: Tensor, caption_audio: Tensor) -> Tensor:
    """Best rank among each recording's own captions, from 1, of the recordings that have one.

    A tie with another recording's caption counts against the system; own captions do not compete with each other.
    """
    by_audio = scores.T
    recordings = torch.unique(caption_audio)

    def ranks(part: slice) -> Tensor:
        rows = recordings[part]
        own = caption_audio[None, :] == rows[:, None]
        best = by_audio[rows].masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        return 1 + ((by_audio[rows] >= best) & ~own).sum(1)

    return _chunked(ranks, len(recordings), len(caption_audio))


def _chunked(ranks: Callable[[slice], Tensor], rows: int, columns: int) -> Tensor:
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return torch.cat([ranks(slice(start, start + step)) for start in range(0, rows, step)])


def retrieval_metrics(scores: Tensor, caption_audio: Tensor) -> dict[str, float]:
    """Every metric of both directions: t2a_R@1, t2a_R@5, t2a_R@10, t2a_MRR, t2a_median_rank, a2t_...

    scores: (captions, recordings) in the gallery's order; caption_audio: (captions,) int64. Raises `ValueError`
    for scores that are not finite, since a comparison with nan would rank them first.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("scores are not finite")
    return {
        **_summarise("t2a", text_to_audio_ranks(scores, caption_audio)),
        **_summarise("a2t", audio_to_text_ranks(scores, caption_audio)),
    }


def standard_error(values: Tensor, caption_audio: Tensor) -> float:
    """Standard error of the mean of `values` (captions,), taken over recordings; infinite of a single one.

    Captions of one recording are not independent, so their deviations are summed first: with n recordings, C captions,
    sqrt(n / (n - 1) * sum over recordings of (sum of (value - mean))^2) / C (a ratio estimate; Cochran 1977).
    """
    recordings, own = torch.unique(caption_audio, return_inverse=True)
    n, values = len(recordings), values.double()
    if n < 2:
        return math.inf
    sums = values.new_zeros(n).index_add_(0, own, values - values.mean())
    return math.sqrt(n / (n - 1) * sums.square().sum().item()) / len(values)


def _summarise(direction: str, ranks: Tensor) -> dict[str, float]:
    ranks = ranks.double()
    recalls = {f"{direction}_R@{k}": 100 * (ranks <= k).double().mean().item() for k in RECALL_AT}
    return {
        **recalls,
        f"{direction}_MRR": (1 / ranks).mean().item(),
        f"{direction}_median_rank": float(np.median(ranks.numpy(force=True))),
    }


def chance_level(gallery: int) -> dict[str, float]:
    """What a random ranking of `gallery` recordings is expected to reach, text -> audio, under the same names."""
    ranks = np.arange(1, gallery + 1)
    return {
        **{f"t2a_R@{k}": 100 * min(k, gallery) / gallery for k in RECALL_AT},
        "t2a_MRR": float((1 / ranks).mean()),
        "t2a_median_rank": (gallery + 1) / 2,
    }


def rounded(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics as they are written: percents to 2 places, MRR to 4."""
    places = {name: 4 if "MRR" in name else 2 for name in metrics}
    return {name: round(value, places[name]) if isinstance(value, float) else value for name, value in metrics.items()}
