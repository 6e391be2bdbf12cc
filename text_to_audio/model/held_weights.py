"""A text model's weights for queries on a CPU: held in 16 bits where they were published so, computed with in float32.

A 16-bit number is a float32 number, so that what comes out is what float32 weights give, in half the memory.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors names them
RUNTIME_BYTES = 700 << 20  # of a process of search.py besides its weights: Python, torch, transformers, Milvus
_BLOCK_ELEMENTS = 1 << 21  # weights widened at once: 8 MB, which stay in the caches until they are multiplied


def published_dtype(folder: Path) -> torch.dtype:
    """The one 16-bit type that all weights in a model's safetensors have; float32 for any other folder."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - it is no dict
    return NARROW.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def is_narrower(dtype: torch.dtype, computed: torch.dtype) -> bool:
    """Whether weights of `dtype` have to be widened for arithmetic in `computed`."""
    return dtype in NARROW.values() and computed == torch.float32


def widen_around(backbone: nn.Module) -> None:
    """Let a decoder with 16-bit weights compute in float32: what is neither linear nor an embedding becomes float32.

    Embeddings are looked up as they are and handed on in float32; the linear layers are `linear`'s. All weights become
    copies: as they are loaded they are the mapped file, and as long as one of them is, all of its pages that were read
    stay beside what is made of them.
    """
    for module in backbone.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_widened)
        elif not isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def _widened(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output.float()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias as `F.linear`, in the type of x; narrower weights are widened a few rows at a time."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], len(weight))
    rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        y[..., part] = F.linear(x, weight[part].to(x.dtype), None if bias is None else bias[part].to(x.dtype))
    return y


def query_bytes(base: nn.Module, held: torch.dtype, others: list[nn.Module]) -> int:
    """Memory in bytes that a process for queries on a CPU takes.

    base: the text model with LoRA, whose frozen weights are held as `held`. others: heads, in float32.
    """
    frozen = sum(each.numel() for each in base.parameters() if not each.requires_grad)
    trained = sum(each.numel() for each in base.parameters() if each.requires_grad)
    heads = sum(each.numel() for other in others for each in [*other.parameters(), *other.buffers()])
    return frozen * held.itemsize + 4 * (trained + heads) + RUNTIME_BYTES
