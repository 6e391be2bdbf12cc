"""One layer of a Qwen3-like decoder in few kernels, as a function of tensors: what transformers' layer computes.

Its pieces have their backward pass by hand, which keeps less and launches less than the one that autograd makes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from text_to_audio.model.held_weights import linear
from text_to_audio.model.lora import LoraProjection


class LayerShape(NamedTuple):
    """What all layers of a decoder have in common.

    heads: of queries. groups: heads of keys and values. head_dim: width of each. epsilon: of the norms. scale: what
    the products of queries and keys are multiplied with. dropout: before LoRA.
    """

    heads: int
    groups: int
    head_dim: int
    epsilon: float
    scale: float


class Projection(NamedTuple):
    """The projections of one input: see `LoraProjection`. a, b_t: None without LoRA."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b_t: Tensor | None


class LayerWeights(NamedTuple):
    """One layer's tensors. head_norm: (heads + groups, head_dim) weights of the norms of queries and keys, or None."""

    before_attention: Tensor
    head_norm: Tensor | None
    before_mlp: Tensor
    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (Zhang and Sennrich 2019), the weight frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
        wide = _wide(x)
        factor = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        unit = _as(wide * factor, x.dtype)
        ctx.save_for_backward(unit, factor, weight)
        return unit if weight is None else unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        unit, factor, weight = ctx.saved_tensors
        grad = _wide(grad if weight is None else grad * weight)
        along = (grad * unit).mean(-1, keepdim=True)
        return _as(torch.addcmul(grad, _wide(unit), along, value=-1).mul_(factor), unit.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """`RMSNorm`, which torch has kernels of its own for on CUDA."""
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, epsilon)
    return RMSNorm.apply(x, weight, epsilon)


class Rotary(torch.autograd.Function):
    """Rotary position embedding (Su et al. 2021) of (..., head_dim): x cos + roll(x) sin, the halves' signs in sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grad * cos).add_((grad * sin).roll(grad.shape[-1] // 2, -1)), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020) of (tokens, 2 x width), the gate first; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)), -1)


def project(x: Tensor, weights: Projection, dropout: float) -> Tensor:
    """The projections of (tokens, inputs)."""
    if weights.a is None:
        return linear(x, weights.weight, weights.bias)
    return LoraProjection.apply(x, *weights, dropout)


def rotary_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """For `Rotary`, from transformers' cosines and sines (1, length, head_dim): (length, 1, head_dim) each."""
    half = sin.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    return cos[0].unsqueeze(1), signed[0].unsqueeze(1)


def decoder_layer(
    hidden: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, shape: LayerShape, dropout: float
) -> Tensor:
    """One layer: hidden states (batch, length, width) to the same, of texts that are padded on the right.

    cos, sin: see `rotary_tables`. dropout: before LoRA. Attention is causal, so that no token sees the padding, which
    comes after it, and needs no mask. What comes out for padding is of no use.
    """
    batch, length, width = hidden.shape
    hidden = hidden.view(-1, width)
    qkv = project(rms_norm(hidden, weights.before_attention, shape.epsilon), weights.qkv, dropout)
    attended = attention(qkv.view(batch, length, -1, shape.head_dim), cos, sin, weights.head_norm, shape)
    hidden = hidden + project(attended, weights.out, dropout)
    gate_up = project(rms_norm(hidden, weights.before_mlp, shape.epsilon), weights.gate_up, dropout)
    hidden = hidden + project(SwiGLU.apply(gate_up), weights.down, dropout)
    return hidden.view(batch, length, width)


def attention(qkv: Tensor, cos: Tensor, sin: Tensor, head_norm: Tensor | None, shape: LayerShape) -> Tensor:
    """Causal attention of (batch, length, heads + 2 groups, head_dim) to (batch x length, heads x head_dim)."""
    qk, v = qkv.split([shape.heads + shape.groups, shape.groups], 2)
    if head_norm is not None:
        qk = rms_norm(qk, None, shape.epsilon)
        # a weight on x is one on the tables, which have no batch
        cos, sin = cos * head_norm, sin * head_norm.roll(shape.head_dim // 2, -1)
    q, k = Rotary.apply(qk, cos, sin).split([shape.heads, shape.groups], 2)
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=shape.scale,
        enable_gqa=shape.heads != shape.groups,
    )  # fmt: skip
    return attended.transpose(1, 2).reshape(-1, shape.heads * shape.head_dim)
