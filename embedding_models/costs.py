"""How fast a device is, in the unit in which the registry gives what an encoder costs."""

import time

import torch


def matmul_tflops(device: torch.device, size: int = 2048, seconds: float = 1.0) -> float:
    """Time square float32 matrix products of `size` on `device` for about `seconds`; return TFLOP/s."""
    matrix = torch.ones(size, size, device=device)
    _finish(matrix @ matrix)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or count == 0:
        _finish(matrix @ matrix)
        count += 1
    return count * 2 * size**3 / elapsed / 1e12


def _finish(result: torch.Tensor) -> None:
    result[0, 0].item()  # waits for the device
