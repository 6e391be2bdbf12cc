"""Which epoch's weights are kept as best_r1: by R@1 as far as validation can tell epochs apart, then by MRR."""

from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from text_to_audio.measuring.metrics import standard_error

_ROUNDING = 1e-9  # one hit's difference is one standard error exactly


@dataclass
class Best:
    """How a space's validation has gone so far, and which epoch is kept by it.

    Of few captions the highest R@1 is the luckiest epoch's. So the epochs whose R@1 is at most one standard error under
    the highest count as alike (as Breiman et al. 1984 take the trees within one error of the best), and of those the
    one is kept whose MRR, averaged with that of the epoch before, is highest. The error is that of the difference,
    caption by caption, since what both epochs find says nothing of which is better. With many captions it is small, and
    the kept epoch has the highest R@1 or one as good.

    An epoch that was passed over is gone. So where a new highest R@1 rules the kept epoch out, the new one is kept.

    r1: R@1 (percent) and MRR of the kept epoch, `r1_epoch`. loss: the lowest. mrr: each epoch's so far. hits: of each,
    (captions,) bool, which captions found their recording first; None in a run from before they were noted, which
    keeps the highest R@1 to its end, MRR breaking ties.
    """

    r1: tuple[float, float] = (-1.0, -1.0)
    r1_epoch: int = 0
    loss: float = float("inf")
    hits: list[Tensor] | None = field(default_factory=list)
    mrr: list[float] = field(default_factory=list)

    def add(self, epoch: int, r1: tuple[float, float], hits: Tensor, caption_audio: np.ndarray) -> bool:
        """Take in an epoch's (R@1, MRR) and hits; returns whether it is the one to keep now.

        caption_audio: (captions,) each caption's recording.
        """
        if self.hits is None:
            kept = r1 > self.r1
        else:
            self.hits.append(hits.cpu())
            self.mrr.append(r1[1])
            epochs = alike(self.hits, caption_audio)
            better = self.r1_epoch not in epochs or self._mean_mrr(epoch) > self._mean_mrr(self.r1_epoch)
            kept = epoch in epochs and better
        if kept:
            self.r1, self.r1_epoch = r1, epoch
        return kept

    def _mean_mrr(self, epoch: int) -> float:
        return mean(self.mrr[max(0, epoch - 2) : epoch])

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"r1": list(self.r1), "r1_epoch": self.r1_epoch, "loss": self.loss, "hits": self.hits, "mrr": self.mrr}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Best":
        """What `state` gave; a checkpoint from before there were hits has none."""
        return cls(tuple(state["r1"]), state["r1_epoch"], state["loss"], state.get("hits"), state.get("mrr", []))


def highest(hits: list[Tensor]) -> int:
    """The epoch, from 1, with the highest R@1; the first of several."""
    return 1 + int(torch.stack(hits).double().mean(1).argmax())


def alike(hits: list[Tensor], caption_audio: np.ndarray) -> list[int]:
    """The epochs, from 1 and in order, whose R@1 is at most one standard error of the difference under the highest."""
    best, audio = hits[highest(hits) - 1].double(), torch.from_numpy(caption_audio)
    lost = [best - each.double() for each in hits]
    errors = [standard_error(each, audio) for each in lost]
    pairs = enumerate(zip(lost, errors, strict=True), start=1)
    return [epoch for epoch, (each, error) in pairs if each.mean().item() <= error + _ROUNDING]


def how_sure(best: Best, caption_audio: np.ndarray) -> str:
    """A line on the kept epoch: the highest R@1 with its standard error, and the epochs that it cannot be told from."""
    r1, mrr = best.r1
    kept = f"kept epoch {best.r1_epoch}, R@1 {r1:.1f}, MRR {mrr:.2f}"
    if not best.hits:
        return f"validation: {kept}, the highest R@1"
    top = best.hits[highest(best.hits) - 1].double()
    error = 100 * standard_error(top, torch.from_numpy(caption_audio))
    recordings, epochs = len(np.unique(caption_audio)), alike(best.hits, caption_audio)
    found = f"validation t2a_R@1 {100 * top.mean().item():.1f} +- {error:.1f} over {recordings} recordings"
    if len(epochs) == 1:
        return f"{found}: no other epoch comes near epoch {epochs[0]}; {kept}"
    return f"{found}: epochs {spans(epochs)} cannot be told apart; {kept}"


def spans(numbers: list[int]) -> str:
    """Rising numbers as text: 1, 2, 3, 5 is "1 to 3, 5"."""
    breaks = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b > a + 1), len(numbers)]
    runs = [numbers[start:stop] for start, stop in pairwise(breaks)]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
