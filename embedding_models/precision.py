"""What a precision means on a device, and the float32 products of one forward pass without touching anyone else's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.errors import UserError

PRECISIONS = ("float32", "tf32", "float16")


def check_precision(precision: str) -> None:
    """Raise `UserError` for a precision that is none of `PRECISIONS`."""
    if precision not in PRECISIONS:
        expected = ", ".join(f'"{name}"' for name in PRECISIONS)
        raise UserError(f"precision: expected one of {expected}, found {precision!r}")


def precision_on(device: torch.device, precision: str, half_precision: bool) -> str:
    """What `precision` comes to on a device: the lower ones are CUDA's, elsewhere everything is float32.

    `half_precision` tells whether the network may be tried in float16; one that may not runs in TF32 instead.
    """
    if device.type != "cuda":
        return "float32"
    return "tf32" if precision == "float16" and not half_precision else precision


def stored_type(precision: str) -> str:
    """The type on disk of vectors that are computed in a precision."""
    return "float16" if precision == "float16" else "float32"


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Within it, float32 convolutions and matrix products on `device` use TF32 or do not.

    torch's own default is TF32 in convolutions and not in matrix products. Both are set, and afterwards as they were
    before: training in the same process keeps its own. Nothing is changed for a CPU.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
