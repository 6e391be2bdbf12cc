"""Times and memory on a device: work is waited for, the peak starts anew."""

import gc
import statistics
import time
from collections.abc import Callable

import torch


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int = 3, warm: int = 1) -> float:
    """Median seconds of `rounds` calls after `warm` that do not count."""
    taken = []
    for number in range(warm + rounds):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if number >= warm:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def forget(device: torch.device) -> None:
    """Give back what is no longer used, and let the peak of memory start anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Peak of allocated device memory in GiB since `forget`; 0 on a CPU, where torch does not count it."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def ceilings(device: torch.device, small: bool) -> dict[str, float]:
    """What the card gives at best: TFLOP/s of square products, TB/s of a copy (bytes read and written)."""
    size = 256 if small else 8192
    found = {}
    for name, dtype in (("bf16 product, TFLOP/s", torch.bfloat16), ("float32 product, TFLOP/s", torch.float32)):
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        found[name] = 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, device, 10, 3) / 1e12
    source = torch.randn(2**20 if small else 2**30, device=device)
    target = torch.empty_like(source)
    found["copy, TB/s"] = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, 10, 3) / 1e12
    return found
