"""The rules that kept_checkpoint.py compares: which epoch each would keep, from the validation's ranks and losses."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from text_to_audio.measuring.metrics import standard_error, text_to_audio_ranks
from text_to_audio.training.keeping import Best, alike


@dataclass
class Curve:
    """What a run's validation showed: ranks (epochs, captions) from 1, loss (epochs,), (captions,) their recordings."""

    ranks: Tensor
    loss: Tensor
    audio: Tensor

    @classmethod
    def of(cls, scores: Tensor, audio: Tensor, recordings: Tensor, temperature: float) -> "Curve":
        """That of a validation which has these recordings alone.

        scores: (epochs, captions, all recordings), audio: (captions,) rows in it. The loss is text -> audio against the
        whole gallery.
        """
        place = torch.full((scores.shape[2],), -1).scatter(0, recordings, torch.arange(len(recordings)))
        asked = torch.nonzero(place[audio] >= 0)[:, 0]
        own = place[audio[asked]]
        scores = scores[:, asked][:, :, recordings]
        ranks = torch.stack([text_to_audio_ranks(each, own) for each in scores])
        logits = scores.double() / temperature
        found = logits.gather(2, own[None, :, None].expand(len(scores), -1, 1))[..., 0]
        return cls(ranks, (logits.logsumexp(2) - found).mean(1), own)

    def until(self, epochs: int) -> "Curve":
        """That of the first epochs."""
        return Curve(self.ranks[:epochs], self.loss[:epochs], self.audio)

    @cached_property
    def hits(self) -> list[Tensor]:
        """Of each epoch, which captions found their recording first."""
        return list(self.ranks == 1)

    @cached_property
    def r1(self) -> np.ndarray:
        """R@1 from 0 to 1, (epochs,)."""
        return (self.ranks == 1).double().mean(1).numpy()

    @cached_property
    def mrr(self) -> np.ndarray:
        """MRR, (epochs,)."""
        return (1 / self.ranks.double()).mean(1).numpy()

    @cached_property
    def error(self) -> float:
        """The standard error of the highest R@1."""
        return standard_error(self.hits[int(self.r1.argmax())].double(), self.audio)


def highest_r1(curve: Curve) -> int:
    """The highest R@1, MRR breaking ties: what best_r1 was."""
    return max(range(len(curve.r1)), key=lambda e: (curve.r1[e], curve.mrr[e], -e))


def the_product_s(curve: Curve) -> int:
    """As training decides it, epoch by epoch."""
    best = Best()
    for epoch, hits in enumerate(curve.hits, start=1):
        best.add(epoch, (100 * curve.r1[epoch - 1], curve.mrr[epoch - 1]), hits, curve.audio.numpy())
    return best.r1_epoch - 1


def _within(curve: Curve, paired: bool) -> list[int]:
    if paired:
        return [epoch - 1 for epoch in alike(curve.hits, curve.audio.numpy())]
    return [int(e) for e in np.flatnonzero(curve.r1 >= curve.r1.max() - curve.error - 1e-9)]


def smoothed(values: np.ndarray, before: int, after: int) -> int:
    """The latest with the highest mean over its neighbours."""
    means = [values[max(0, e - before) : e + after + 1].mean() for e in range(len(values))]
    return int(len(means) - 1 - np.argmax(means[::-1]))


RULES: dict[str, Callable[[Curve], int]] = {
    "highest R@1 (the old rule)": highest_r1,
    "last epoch": lambda curve: len(curve.r1) - 1,
    "highest MRR": lambda curve: int(curve.mrr.argmax()),
    "lowest loss": lambda curve: int(curve.loss.argmin()),
    "within 1 SE of R@1: MRR": lambda curve: max(_within(curve, False), key=lambda e: curve.mrr[e]),
    "within 1 SE of R@1: loss": lambda curve: min(_within(curve, False), key=lambda e: curve.loss[e]),
    "within 1 SE of R@1: latest": lambda curve: _within(curve, False)[-1],
    "within 1 SE of the difference: MRR": lambda curve: max(_within(curve, True), key=lambda e: curve.mrr[e]),
    "within 1 SE of the difference: loss": lambda curve: min(_within(curve, True), key=lambda e: curve.loss[e]),
    "within 1 SE of the difference: latest": lambda curve: _within(curve, True)[-1],
    "within 1 SE of the difference: MRR with the epoch before (the rule)": the_product_s,
    "mean R@1 with the epoch before": lambda curve: smoothed(curve.r1, 1, 0),
    "mean R@1 of three epochs": lambda curve: smoothed(curve.r1, 1, 1),
    "mean MRR with the epoch before": lambda curve: smoothed(curve.mrr, 1, 0),
}


def stopped_at(curve: Curve, rule: Callable[[Curve], int], patience: int) -> int:
    """Epochs until a run stops that waits for another epoch to be kept."""
    epochs = len(curve.r1)
    return next((e for e in range(1, epochs) if e - 1 - rule(curve.until(e)) >= patience), epochs)
