"""Group norm of large channels_last activations in two passes over memory, statistics in float32.

torch's group norm of a channels_last tensor copies it on CUDA, and on a CPU is off by 1e-4 of the largest value where a
group has millions of values. Here the statistics of each channel are taken while whatever is added to a convolution's
output is added, and one more pass scales, shifts and activates. On CUDA both are kernels of `group_norm_kernels`,
elsewhere the same arithmetic in torch's operations.

Activations are (batch, channels, time, frequency), stored channels last, float32 or float16.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from embedding_models import group_norm_kernels as kernels
from embedding_models.precision import float32_products


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
        self,
        x: torch.Tensor,
        moments: Moments,
        silu: bool,
        bias: torch.Tensor | None = None,
        in_place: bool = False,
        split: bool = False,
    ) -> torch.Tensor:
        """Normalise x + bias, where `moments` are those of x and `bias`, (channels,), has not been added yet.

        With `split` the result has three times the channels, for `split_conv2d`. With `in_place` x may be lost.
        """
        scale, shift = self._scale_and_shift(moments, bias)
        if not kernels.serve(x):
            out = torch.addcmul(_along_channels(shift, x), x, _along_channels(scale, x), out=x if in_place else None)
            out = functional.silu(out, inplace=True) if silu else out
            return torch.cat([high := _high(out), out - high, high], dim=1) if split else out
        out = x
        if split:
            shape = (len(x), 3 * x.shape[1], *x.shape[2:])
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        elif not in_place:
            out = torch.empty_like(x)
        kernels.scale_and_shift(x, scale, shift, silu, out)
        return out

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
    if kernels.serve(x):
        return Moments(*kernels.moments(x))
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
    if kernels.serve(x):
        return Moments(*kernels.add_to(x, bias, shortcut, gain))
    x += bias[:, None, None]
    if gain is not None:
        x *= gain
    if shortcut is not None:
        x += shortcut
    return moments(x)


def split_conv2d(
    x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> torch.Tensor:
    """A convolution with float32's accuracy on TF32's units: of (high + low)(high + low) all but low times low.

    x: what `normalise` gave with `split`, high | low | high side by side as channels, so that one convolution sums the
    three products in float32. A high part has the 10 bits of mantissa that TF32 keeps, the low part has the rest, of
    which TF32 keeps 11 bits: together 22 of float32's 24. The scheme is that of NVIDIA's CUTLASS, "3xTF32".
    """
    high = _high(weight)
    with float32_products(x.device, tf32=True):
        return functional.conv2d(x, torch.cat([high, high, weight - high], dim=1), None, stride, padding)


def _high(x: torch.Tensor) -> torch.Tensor:
    """x without the last 13 bits of its mantissa: what TF32 holds exactly."""
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)


def _along_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.to(x.dtype)[:, :, None, None]
