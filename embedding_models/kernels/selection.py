"""Order statistics over time as a Triton kernel: every column read once and searched in registers, nothing sorted."""

from typing import Any

import torch

from embedding_models.kernels import device_of, triton

MOST_ROWS = 1024  # a column of more would not stay in registers
_COLUMNS = 8  # that one program searches: few enough for several programs on a multiprocessor

if triton is not None:
    tl: Any = triton.language

    @triton.jit
    def _next(keys, inside, found, k, most):
        """The k + 1-th smallest of every column, whose k-th is `found`."""
        repeated = tl.sum((inside & (keys <= found[None, :])).to(tl.int32), 0) > k + 1
        above = tl.min(tl.where(inside & (keys > found[None, :]), keys, most), 0)
        return tl.where(repeated, found, above)

    @triton.jit
    def _value(key, HALF: tl.constexpr):
        if HALF:
            bits = tl.where(key < 0, key ^ 0x7FFF, key).to(tl.int16)
            return bits.to(tl.float16, bitcast=True).to(tl.float32)
        return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)

    @triton.jit
    def _neighbours_kernel(
        x, out, rows, columns, first, second, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """out[:, 0..3]: the `first`-th smallest of each column and the next, the `second`-th and the next.

        Floats of one sign are in the order of their bits; with all but the sign turned round for the negative ones,
        all are. The k-th smallest is then found bit by bit from the highest, by counting what is below.
        """
        element = tl.program_id(1).to(tl.int64)
        row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(x + (element * rows + row[:, None]) * columns + column[None, :], mask=inside, other=0.0)
        if HALF:
            keys = value.to(tl.int16, bitcast=True).to(tl.int32)
            most, lowest, step = 0x7FFF, -0x8000, 1 << 14
            keys = tl.where(keys < 0, keys ^ 0x7FFF, keys)
        else:
            keys = value.to(tl.int32, bitcast=True)
            most, lowest, step = 0x7FFFFFFF, -0x80000000, 1 << 30
            keys = tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
        negative = tl.sum((inside & (keys < 0)).to(tl.int32), 0)
        low = tl.where(negative <= first, 0, lowest).to(tl.int32)
        high = tl.where(negative <= second, 0, lowest).to(tl.int32)
        for _ in range(15 if HALF else 31):
            below = tl.sum((inside & (keys < (low + step)[None, :])).to(tl.int32), 0)
            low = tl.where(below <= first, low + step, low)
            below = tl.sum((inside & (keys < (high + step)[None, :])).to(tl.int32), 0)
            high = tl.where(below <= second, high + step, high)
            step = step >> 1
        to, kept = out + element * 4 * columns + column, column < columns
        tl.store(to, _value(low, HALF), mask=kept)
        tl.store(to + columns, _value(_next(keys, inside, low, first, most), HALF), mask=kept)
        tl.store(to + 2 * columns, _value(high, HALF), mask=kept)
        tl.store(to + 3 * columns, _value(_next(keys, inside, high, second, most), HALF), mask=kept)


def neighbours(x: torch.Tensor, first: int, second: int) -> torch.Tensor:
    """Of (batch, rows, columns), the `first`-th smallest of each column from 0 and the next, and the same of `second`.

    x is float32 or float16, of 2 to `MOST_ROWS` rows; the result (batch, 4, columns) is float32, the very values of x.
    Not-a-numbers are ordered by their bits, so whoever may have some looks for them elsewhere.
    """
    x = x.contiguous()
    batch, rows, columns = x.shape
    out = torch.empty(batch, 4, columns, device=x.device)
    with device_of(x):
        _neighbours_kernel[(triton.cdiv(columns, _COLUMNS), batch)](
            x, out, rows, columns, first, second,
            x.dtype == torch.float16, triton.next_power_of_2(rows), _COLUMNS, num_warps=4,
        )  # fmt: skip
    return out
