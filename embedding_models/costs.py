"""What an encoder costs before it is fetched: its published checkpoint, width, licence, and time per clip."""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Published:
    """The published checkpoint of one space.

    `tflop` is the work of one 10 s clip in float32, in units of a square matrix product on the same device: on 2 CPU
    cores, seconds per clip (benchmarks/preparing/full_size.py) times the TFLOP/s of `matmul_tflops`, measured in one
    process.
    """

    model: str
    files: tuple[str, ...]
    dim: int
    licence: str
    tflop: float


PUBLISHED = {
    "muq": Published("OpenMuQ/MuQ-MuLan-large", ("model.safetensors", "config.json"), 1536, "CC-BY-NC-4.0", 1.0),
    "mert": Published("m-a-p/MERT-v1-330M", ("pytorch_model.bin", "config.json"), 76_800, "CC-BY-NC-4.0", 0.8),
    "latent": Published("SonyCSLParis/music2latent", ("music2latent.pt",), 576, "CC-BY-NC-4.0", 3.1),
}


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
