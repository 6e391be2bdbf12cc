"""Whether Triton's kernels can be used: Triton comes with torch for CUDA and needs a C compiler to launch a kernel."""

import importlib
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

try:
    triton: Any = importlib.import_module("triton")
    importlib.import_module("triton.language")
except ImportError:  # torch for a CPU, or a platform that Triton is not built for
    triton = None

__all__ = ["available", "device_of", "serve", "triton"]


@cache
def available() -> bool:
    """Whether kernels can be built here; where not, torch's own operations do the same work, more slowly."""
    return triton is not None and bool(os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang"))))


def serve(x: torch.Tensor) -> bool:
    """Whether kernels take this tensor."""
    return x.is_cuda and available()


def device_of(x: torch.Tensor) -> AbstractContextManager:
    """Make a tensor's device the current one: kernels are launched there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
