"""The passes of `group_norm` as Triton kernels: a channels_last activation read once, or read and written once."""

from typing import Any

import torch

from embedding_models.kernels import device_of, triton

# Values of a tile, rows of all channels, held in registers. Measured on an H100 at 0.9 G values of float16: 1.2 ms to
# take moments by tiles of 8,192, 0.8 ms by 16,384; to add a shortcut as well 2.2 ms by 8,192, 2.5 ms by 16,384.
_TILE, _READ_TILE = 8192, 16_384
_MOST_PARTS = 64  # parts of an activation whose moments are written apart


if triton is not None:
    tl: Any = triton.language

    @triton.jit
    def _moments_kernel(
        x, bias, shortcut, gain, mean_out, squares_out, rows, frequencies, part, channels,
        ADD: tl.constexpr, SHORTCUT: tl.constexpr, GAIN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """Rows part * i ... of one batch element: add in place if asked for, and the mean and squares per channel."""
        element, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
        channel = tl.arange(0, CHANNELS)
        first = element * rows * channels
        last = tl.minimum(rows, (i + 1) * part)
        mean = tl.zeros([CHANNELS], tl.float32)
        squares = tl.zeros([CHANNELS], tl.float32)
        seen = 0.0
        for start in range(i * part, last, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row < last)[:, None] & (channel < channels)[None, :]
            at = first + row[:, None] * channels + channel[None, :]
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            if ADD:
                value += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
                if GAIN:
                    value *= tl.load(gain + row % frequencies).to(tl.float32)[:, None]
                if SHORTCUT:
                    value += tl.load(shortcut + at, mask=inside, other=0.0).to(tl.float32)
                rounded = value.to(x.dtype.element_ty)
                tl.store(x + at, rounded, mask=inside)
                value = rounded.to(tl.float32)
            count = tl.minimum(ROWS, last - start).to(tl.float32)
            tile_mean = tl.sum(tl.where(inside, value, 0.0), 0) / count
            difference = tl.where(inside, value - tile_mean[None, :], 0.0)
            step = tile_mean - mean
            total = seen + count
            mean += step * (count / total)
            squares += tl.sum(difference * difference, 0) + step * step * (seen * count / total)
            seen = total
        out = (element * tl.num_programs(1) + i) * channels + channel
        tl.store(mean_out + out, mean, mask=channel < channels)
        tl.store(squares_out + out, squares, mask=channel < channels)

    @triton.jit
    def _scale_and_shift_kernel(
        x, out, scale, shift, rows, channels, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
    ):
        """out = x * scale + shift per batch element and channel, then SiLU if asked for."""
        element, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
        channel = tl.arange(0, CHANNELS)
        row = i * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        at = (element * rows + row[:, None]) * channels + channel[None, :]
        factor = tl.load(scale + element * channels + channel, mask=channel < channels, other=0.0)
        offset = tl.load(shift + element * channels + channel, mask=channel < channels, other=0.0)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor[None, :] + offset[None, :]
        if SILU:
            value = value / (1 + tl.exp(-value))
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of `group_norm.Moments` of an activation."""
    return _moments(x, None, None, None)


def add_to(
    x: torch.Tensor, bias: torch.Tensor, shortcut: torch.Tensor | None, gain: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `group_norm.add_to`; the fields of the result's `Moments`."""
    return _moments(x, bias, shortcut, gain)


def _moments(
    x: torch.Tensor, bias: torch.Tensor | None, shortcut: torch.Tensor | None, gain: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, shortcut)
    batch, channels, time, frequencies = x.shape
    rows = time * frequencies
    tile = _tile_rows(channels, _TILE if shortcut is not None else _READ_TILE)
    part = triton.cdiv(triton.cdiv(rows, _MOST_PARTS), tile) * tile
    parts = triton.cdiv(rows, part)
    mean, squares = torch.empty(2, batch, parts, channels, device=x.device, dtype=torch.float32).unbind()
    with device_of(x):
        _moments_kernel[(batch, parts)](
            x, bias, shortcut, gain, mean, squares, rows, frequencies, part, channels,
            bias is not None, shortcut is not None, gain is not None, tile, triton.next_power_of_2(channels),
            num_warps=8,
        )  # fmt: skip
        places = torch.full((parts,), float(part), device=x.device)
        places[-1:].fill_(float(rows - (parts - 1) * part))
    return mean, squares, places


def scale_and_shift(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, silu: bool, out: torch.Tensor) -> None:
    """Put x * scale + shift into out, after SiLU where asked for; scale and shift are (batch, channels) float32."""
    _check(x, out)
    batch, channels, time, frequencies = x.shape
    rows, tile = time * frequencies, _tile_rows(channels, _TILE)
    with device_of(x):
        _scale_and_shift_kernel[(batch, triton.cdiv(rows, tile))](
            x, out, scale, shift, rows, channels, silu, tile, triton.next_power_of_2(channels), num_warps=8
        )


def _tile_rows(channels: int, values: int) -> int:
    return max(1, values // triton.next_power_of_2(channels))


def _check(*activations: torch.Tensor | None) -> None:
    for x in activations:
        if x is not None and not x.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"expected an activation stored channels last, found strides {x.stride()}")
