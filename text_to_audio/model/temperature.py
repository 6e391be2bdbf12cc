"""The InfoNCE temperature, fixed or learnt."""

import math

import torch
from torch import Tensor, nn

from text_to_audio.config import TEMPERATURE_RANGE


class Temperature(nn.Module):
    """The InfoNCE temperature of a space: fixed, or learnt by its logarithm as in CLIP (Radford et al. 2021).

    Called without arguments it returns what cosines are divided by, a tensor of no dimensions. It starts at `start`
    times the space's `spread`, and a learnt one stays between CLIP's bounds, 0.01 and 1, times that.
    """

    def __init__(self, start: float, learnt: bool, spread: float = 1.0):
        super().__init__()
        self._bounds = [math.log(spread * bound) for bound in TEMPERATURE_RANGE]
        self.log = nn.Parameter(torch.tensor(math.log(start * spread)), requires_grad=learnt)

    def forward(self) -> Tensor:
        return self.log.exp()

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Put a learnt temperature back between the bounds; call it after each optimizer step."""
        if self.log.requires_grad:
            self.log.clamp_(*self._bounds)
