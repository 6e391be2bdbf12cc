"""The layers of Qwen3-like decoders in few kernels, as a function of tensors that all layers share when compiled."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from text_to_audio.model.lora import LoraGroup, LoraProjection, lora_copies

KNOWN = {"Qwen2DecoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer", "MistralDecoderLayer"}


class Shape(NamedTuple):
    """What is the same for all layers. heads, groups: of queries, and of keys and values; head_dim: of each."""

    heads: int
    groups: int
    head_dim: int
    epsilon: float
    scale: float
    scaling: float


class Projection(NamedTuple):
    """Frozen weight (outputs, inputs) and bias of stacked projections, and their LoRA: see `LoraProjection`."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b_t: Tensor


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
    def forward(ctx, x, weight, epsilon):
        wide = x.float() if x.dtype == torch.bfloat16 else x
        scale = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        unit = (wide * scale).to(x.dtype) if wide is not x else wide * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit if weight is None else unit * weight

    @staticmethod
    def backward(ctx, grad):
        unit, scale, weight = ctx.saved_tensors
        grad = grad.clone() if weight is None else grad * weight
        along = (grad * unit).mean(-1, keepdim=True)
        return grad.addcmul_(unit, along, value=-1).mul_(scale.to(grad.dtype) if scale.dtype != grad.dtype else scale), None, None


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension."""
    if x.is_cuda:  # torch has kernels of its own for it there, forward and backward
        return F.rms_norm(x, x.shape[-1:], weight, epsilon)
    return RMSNorm.apply(x, weight, epsilon)


class Rotary(torch.autograd.Function):
    """Rotary position embedding (Su et al. 2021): x cos + roll(x) sin, the sign of the half in `sin`."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return (grad * cos).add_((grad * sin).roll(grad.shape[-1] // 2, -1)), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020) of (tokens, 2 x width), gate first; saves its input alone."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)), -1)


def project(x: Tensor, weights: Projection, shape: Shape, dropout: float) -> Tensor:
    """A group of LoRA projections of (tokens, inputs)."""
    return LoraProjection.apply(x, *weights, shape.scaling, dropout)


def decoder_layer(
    hidden: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, shape: Shape, dropout: float
) -> Tensor:
    """One layer: hidden states (batch, length, width) of texts padded on the right to the same.

    cos, sin: (length, 1, head_dim) of the rotary embedding. The attention is causal, so that padding, which comes after
    the text, is seen by no token of it.
    """
    batch, length, width = hidden.shape
    hidden = hidden.view(-1, width)
    normed = rms_norm(hidden, weights.before_attention, shape.epsilon)
    qkv = project(normed, weights.qkv, shape, dropout).view(batch, length, -1, shape.head_dim)
    qk, v = qkv.split([shape.heads + shape.groups, shape.groups], 2)
    if weights.head_norm is not None:
        qk = rms_norm(qk, None, shape.epsilon)
        cos, sin = cos * weights.head_norm, sin * weights.head_norm.roll(shape.head_dim // 2, -1)
    q, k = Rotary.apply(qk, cos, sin).split([shape.heads, shape.groups], 2)
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=shape.scale,
        enable_gqa=shape.heads != shape.groups,
    )  # fmt: skip
    attended = attended.transpose(1, 2).reshape(batch * length, -1)
    hidden = hidden + project(attended, weights.out, shape, dropout)
    normed = rms_norm(hidden, weights.before_mlp, shape.epsilon)
    hidden = hidden + project(SwiGLU.apply(project(normed, weights.gate_up, shape, dropout)), weights.down, shape, dropout)
    return hidden.view(batch, length, width)


class Decoder:
    """The backbone of a PEFT model computed by `decoder_layer`, on the model's own parameters."""

    def __init__(self, backbone: nn.Module, dropout: float):
        self.backbone, self.dropout = backbone, dropout
        self.layers = list(backbone.layers)
        first = self.layers[0].self_attn
        self.groups = []
        for layer in self.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.groups += [
                LoraGroup([attention.q_proj, attention.k_proj, attention.v_proj]),
                LoraGroup([attention.o_proj]),
                LoraGroup([mlp.gate_proj, mlp.up_proj]),
                LoraGroup([mlp.down_proj]),
            ]
        head_dim = first.head_dim
        heads, groups = (self.groups[0].outputs[i] // head_dim for i in (0, 1))
        epsilon = self.layers[0].input_layernorm.variance_epsilon
        self.shape = Shape(heads, groups, head_dim, epsilon, first.scaling, self.groups[0].scaling)
        self.recomputed = 0
        self.layer = decoder_layer
        self.compiled = False

    def compile(self) -> None:
        self.layer = torch.compile(decoder_layer)
        self.compiled = True

    def __call__(self, ids: Tensor, training: bool) -> Tensor:
        """Hidden states (batch, length, width) of token ids (batch, length) before the last norm."""
        backbone, shape = self.backbone, self.shape
        hidden = backbone.embed_tokens(ids)
        position = torch.arange(ids.shape[1], device=ids.device)[None]
        cos, sin = (each[0].unsqueeze(1) for each in backbone.rotary_emb(hidden, position))
        half = shape.head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        copies = lora_copies(self.groups, hidden.dtype)
        dropout = self.dropout if training else 0.0
        if self.compiled:
            if torch.is_grad_enabled():
                hidden.requires_grad_()
            for each, dims in ((hidden, (0, 1)), (cos, (0,)), (sin, (0,))):
                for dim in dims:
                    torch._dynamo.maybe_mark_dynamic(each, dim)
        for number, layer in enumerate(self.layers):
            at = 4 * number
            parts = [
                Projection(group.weight, group.bias, *copy)
                for group, copy in zip(self.groups[at : at + 4], copies[at : at + 4], strict=True)
            ]
            attention = layer.self_attn
            head_norm = None
            if hasattr(attention, "q_norm"):
                head_norm = torch.cat(
                    (attention.q_norm.weight.expand(shape.heads, -1), attention.k_norm.weight.expand(shape.groups, -1))
                )
            weights = LayerWeights(
                layer.input_layernorm.weight, head_norm, layer.post_attention_layernorm.weight, *parts
            )
            arguments = hidden, cos, sin, weights, shape, dropout
            if number < self.recomputed and torch.is_grad_enabled():
                hidden = checkpoint(self.layer, *arguments, use_reentrant=False)
            else:
                hidden = self.layer(*arguments)
        return hidden
