"""Group norm of large channels_last activations in two passes over memory, statistics in float32.

torch's group norm of a channels_last tensor copies it on CUDA, and on a CPU is off by 1e-4 of the largest value where a
group has millions of values. Here the statistics of each channel are taken while whatever is added to a convolution's
output is added, and one more pass scales, shifts and activates. On CUDA both are kernels of `group_norm_passes`,
elsewhere the same arithmetic in torch's operations.

Activations are (batch, channels, time, frequency), stored channels last, float32 or float16.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from embedding_models.kernels import group_norm_passes, serve


@dataclass(frozen=True)
class Moments:
    """Statistics of every channel over parts of an activation's places, put together by `Moments.whole`.

    mean: (batch, parts, channels), the mean of each part. squares: the sum of squared differences from it. places:
    (parts,) how many places (time x frequency) each part has. All float32.
    """

    mean: torch.Tensor
    squares: torch.Tensor
    places: torch.Tensor

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of every channel over all places, (batch, channels) each.

        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
        """
        places = self.places[:, None]
        mean = (self.mean * places).sum(dim=1) / places.sum()
        squares = self.squares + places * (self.mean - mean[:, None]).square()
        return mean, squares.sum(dim=1) / places.sum()


class GroupNorm(nn.GroupNorm):
    """Group norm whose statistics are handed to it, with the parameters of torch's own; SiLU after it if wanted."""

    def __init__(self, channels: int):
        super().__init__(min(channels // 4, 32), channels)

    def normalise(
        self, x: torch.Tensor, moments: Moments, silu: bool, bias: torch.Tensor | None = None, in_place: bool = False
    ) -> torch.Tensor:
        """Normalise x + bias, where `moments` are those of x and `bias`, (channels,), has not been added yet."""
        scale, shift = self._scale_and_shift(moments, bias)
        out = x if in_place else torch.empty_like(x)
        if serve(x):
            group_norm_passes.scale_and_shift(x, scale, shift, silu, out)
            return out
        torch.addcmul(_along_channels(shift, x), x, _along_channels(scale, x), out=out)
        return functional.silu(out, inplace=True) if silu else out

    def _scale_and_shift(self, moments: Moments, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, channels) each, float32: the norm of x + bias is x * scale + shift."""
        mean, variance = moments.whole()
        if bias is not None:
            mean = mean + bias.float()
        grouped = mean.unflatten(1, (self.num_groups, -1))
        centre = grouped.mean(dim=2, keepdim=True)
        spread = variance.unflatten(1, (self.num_groups, -1)) + (grouped - centre).square()
        scale = torch.rsqrt(spread.mean(dim=2, keepdim=True) + self.eps)
        scale = scale.expand_as(grouped).flatten(1) * self.weight.float()
        centre = centre.expand_as(grouped).flatten(1)
        return scale, self.bias.float() + (-centre if bias is None else bias.float() - centre) * scale


def moments(x: torch.Tensor) -> Moments:
    """The statistics of an activation."""
    if serve(x):
        return Moments(*group_norm_passes.moments(x))
    rows = x.permute(0, 2, 3, 1).float()  # (batch, time, frequency, channels)
    near = rows[:, 0].mean(dim=1)  # a value near the mean: sums of squares lose no digits where the mean is large
    rows = rows - near[:, None, None]
    mean = rows.mean(dim=2).mean(dim=1)
    places = rows.shape[1] * rows.shape[2]
    squares = rows.square_().sum(dim=2).sum(dim=1) - places * mean.square()
    count = torch.full((1,), float(places), device=x.device)
    return Moments((near + mean)[:, None], squares[:, None], count)


def add_to(
    x: torch.Tensor, bias: torch.Tensor, shortcut: torch.Tensor | None = None, gain: torch.Tensor | None = None
) -> Moments:
    """Make x, in place, (x + bias) * gain + shortcut; returns the statistics of the result.

    bias: (channels,). shortcut: an activation like x. gain: (frequency,).
    """
    if serve(x):
        return Moments(*group_norm_passes.add_to(x, bias, shortcut, gain))
    x += bias[:, None, None]
    if gain is not None:
        x *= gain
    if shortcut is not None:
        x += shortcut
    return moments(x)


def _along_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.to(x.dtype)[:, :, None, None]
