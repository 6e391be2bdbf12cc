"""How fast a device is, in the unit in which plans count work: square matrix products."""

import time

import torch


def matmul_tflops(
    device: torch.device, dtype: torch.dtype = torch.float32, size: int = 2048, seconds: float = 1.0
) -> float:
    """Time square matrix products of `size` on `device` for about `seconds`; return TFLOP/s."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    _finish(matrix @ matrix)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or count == 0:
        _finish(matrix @ matrix)
        count += 1
    return count * 2 * size**3 / elapsed / 1e12


def _finish(result: torch.Tensor) -> None:
    result[0, 0].item()  # waits for the device
