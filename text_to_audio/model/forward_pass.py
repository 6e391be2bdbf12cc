"""How a text model's layers are run: which are recomputed, which are compiled, and LoRA in few kernels.

The PEFT model keeps its modules, names and weights; only what is computed with them is told here.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice, repeat
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from common.errors import UserError
from text_to_audio.model.decoder import LayerShape, LayerWeights, Projection, decoder_layer, rotary_tables
from text_to_audio.model.lora import ADAPTER, LoraCopies, LoraGroup, LoraProjection

# layers that compute what `decoder_layer` does, where they have the parts that it knows
DECODERS = ("Qwen3DecoderLayer", "Qwen2DecoderLayer", "LlamaDecoderLayer", "MistralDecoderLayer")

# torch's own random numbers: dropout is that of layers that are not compiled
COMPILED: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}


class ForwardPass(Protocol):
    """Runs a text model on its own weights."""

    def __call__(self, ids: Tensor, mask: Tensor, training: bool) -> Tensor:
        """Hidden states (batch, length, width) of token ids (batch, length), padded on the right, after the norm."""

    def tie(self) -> None:
        """Take the weights from where they are now; to be called after each move of the model."""


class Attention(Protocol):
    """What is used of a decoder layer's attention. Of some families it has q_norm and k_norm too."""

    q_proj: LoraLinear
    k_proj: LoraLinear
    v_proj: LoraLinear
    o_proj: LoraLinear
    config: PretrainedConfig
    head_dim: int
    scaling: float


class GatedMLP(Protocol):
    """What is used of a decoder layer's other half."""

    gate_proj: LoraLinear
    up_proj: LoraLinear
    down_proj: LoraLinear
    act_fn: nn.Module


class Norm(Protocol):
    """What is used of transformers' RMSNorm, which each family defines anew."""

    weight: nn.Parameter
    variance_epsilon: float


class DecoderLayer(Protocol):
    """What a layer of one of `DECODERS` has; torch's own types say of no module what is in it."""

    self_attn: Attention
    mlp: GatedMLP
    input_layernorm: Norm
    post_attention_layernorm: Norm


class Decoder(Protocol):
    """What is used of a backbone whose layers are such."""

    embed_tokens: nn.Embedding
    rotary_emb: nn.Module
    norm: nn.Module


def forward_pass(model: PeftModel, recomputed: int, compiled: bool) -> ForwardPass:
    """That of a PEFT model. recomputed: layers whose activations are computed anew in the backward pass."""
    backbone = model.get_base_model()
    return (DecoderPass if compiles_by_layer(backbone) else ModulePass)(model, recomputed, compiled)


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """The backbone's blocks, through which everything goes one after the other; empty where it is not made of such.

    That is its longest list of modules of one class. Lists of one length side by side are parts of blocks that stand
    apart (XLM's attentions, norms and feed-forward layers), of which none is a block.
    """
    found: list[list[nn.Module]] = []
    for parent in backbone.modules():
        lists = [list(each) for each in parent.children() if isinstance(each, nn.ModuleList)]
        lengths = [len(each) for each in lists]
        found += [each for each in lists if lengths.count(len(each)) == 1 and _alike(each)]
    return max(found, key=len, default=[])


def _alike(modules: list[nn.Module]) -> bool:
    """Whether they are of one class, which is more than a list of further modules."""
    return len({type(module) for module in modules}) == 1 and not isinstance(modules[0], nn.ModuleList)


def compiles_by_layer(backbone: nn.Module) -> bool:
    """Whether the backbone is a decoder whose layers `decoder_layer` computes, so that they are compiled as one."""
    layers = layers_of(backbone)
    return bool(layers) and hasattr(backbone, "rotary_emb") and all(_is_known(layer) for layer in layers)


def _is_known(module: nn.Module) -> bool:
    if type(module).__name__ not in DECODERS:
        return False
    layer = cast(DecoderLayer, module)
    attention, mlp = layer.self_attn, layer.mlp
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_fn"}
    return (
        {name for name, _ in module.get_submodule("self_attn").named_children()} <= known
        and getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)) is None
        and not getattr(attention, "attention_dropout", 0.0)
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and hasattr(layer.input_layernorm, "variance_epsilon")
    )


class DecoderPass:
    """A decoder by `decoder_layer`, which is compiled once for all layers, and in training alone."""

    def __init__(self, model: PeftModel, recomputed: int, compiled: bool):
        backbone = model.get_base_model()
        self.backbone = cast(Decoder, backbone)
        self.recomputed = recomputed
        self.layers = cast(list[DecoderLayer], layers_of(backbone))
        first = self.layers[0].self_attn
        self.dropout = _dropout(first.q_proj)
        self.groups = [
            LoraGroup(linear)
            for layer in self.layers
            for attention, mlp in [(layer.self_attn, layer.mlp)]
            for linear in (
                [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj],
                [mlp.gate_proj, mlp.up_proj], [mlp.down_proj],
            )
        ]  # fmt: skip
        self.copies = LoraCopies(self.groups)
        heads, groups, _ = (width // first.head_dim for width in self.groups[0].outputs)
        epsilon = self.layers[0].input_layernorm.variance_epsilon
        self.shape = LayerShape(heads, groups, first.head_dim, epsilon, first.scaling)
        self.compiled_layer = torch.compile(decoder_layer, options=COMPILED) if compiled else None
        self.tie()

    def tie(self) -> None:
        """Take the weights from where they are now."""
        for group in self.groups:
            group.tie()
        self.norms = [self._norms(layer) for layer in self.layers]

    def _norms(self, layer: DecoderLayer) -> tuple[Tensor, Tensor | None, Tensor]:
        of_heads = None
        q_norm: Norm | None = getattr(layer.self_attn, "q_norm", None)
        k_norm: Norm | None = getattr(layer.self_attn, "k_norm", None)
        if q_norm is not None and k_norm is not None:
            q, k = q_norm.weight.detach(), k_norm.weight.detach()
            of_heads = torch.cat((q.expand(self.shape.heads, -1), k.expand(self.shape.groups, -1)))
        return layer.input_layernorm.weight.detach(), of_heads, layer.post_attention_layernorm.weight.detach()

    def __call__(self, ids: Tensor, mask: Tensor, training: bool) -> Tensor:
        """See `ForwardPass`. The mask is not needed: attention is causal, and the padding comes last."""
        hidden = self.backbone.embed_tokens(ids)
        position = torch.arange(ids.shape[1], device=ids.device)[None]
        cos, sin = rotary_tables(*self.backbone.rotary_emb(hidden, position))
        layer = decoder_layer
        if self.compiled_layer is not None and training:
            layer = self.compiled_layer
            hidden.requires_grad_(torch.is_grad_enabled())  # as it has in all layers but the first: one graph
            for each, dimensions in ((hidden, 2), (cos, 1), (sin, 1)):
                for dimension in range(dimensions):
                    torch._dynamo.maybe_mark_dynamic(each, dimension)
        dropout = self.dropout if training else 0.0
        without_lora = self.groups[0].layers[0].disable_adapters
        copies = repeat((None, None)) if without_lora else iter(self.copies.make(hidden.dtype))
        groups = iter(self.groups)
        for number, norms in enumerate(self.norms):
            parts = [Projection(group.weight, group.bias, *next(copies)) for group in islice(groups, 4)]
            arguments = hidden, cos, sin, LayerWeights(*norms, *parts), self.shape, dropout
            if number < self.recomputed and torch.is_grad_enabled():
                hidden = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden = layer(*arguments)
        return self.backbone.norm(hidden)


class ModulePass:
    """A model by its own modules, of which LoRA's layers compute in few kernels."""

    def __init__(self, model: PeftModel, recomputed: int, compiled: bool):
        self.backbone = model.get_base_model()
        linear = [
            each
            for each in model.modules()
            if isinstance(each, LoraLinear) and isinstance(each.get_base_layer(), nn.Linear)
        ]
        self.groups = [LoraGroup([each]) for each in linear]
        self.copies = LoraCopies(self.groups)
        self.current: list[tuple[Tensor, Tensor]] = []
        for number, each in enumerate(linear):
            module: nn.Module = each  # of which `forward` is a value, where in a class below it is a method
            module.forward = partial(self._project, number, each)
        if compiled and recomputed:
            raise UserError(
                "--compile on: expected --gradient-checkpointing off, since the layers of this text model are compiled "
                "together and dropout cannot be recomputed in that"
            )
        if compiled:
            self.backbone.compile(dynamic=True, options=COMPILED)
        for layer in layers_of(self.backbone)[:recomputed]:
            layer.forward = partial(_recomputed, layer.forward)

    def tie(self) -> None:
        """Take the weights from where they are now."""
        for group in self.groups:
            group.tie()

    def _project(self, number: int, layer: LoraLinear, x: Tensor) -> Tensor:
        if layer.disable_adapters:
            return layer.get_base_layer()(x)
        group = self.groups[number]
        dropout = _dropout(layer) if layer.training else 0.0
        flat = x.to(group.weight.dtype).flatten(0, -2)
        y = LoraProjection.apply(flat, group.weight, group.bias, *self.current[number], dropout)
        return y.unflatten(0, x.shape[:-1])

    def __call__(self, ids: Tensor, mask: Tensor, training: bool) -> Tensor:
        """See `ForwardPass`."""
        dtype = next(self.backbone.parameters()).dtype
        self.current = self.copies.make(dtype)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            # past PEFT, which hands on arguments of its own that CLIP does not take
            return self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state


def _dropout(layer: LoraLinear) -> float:
    return getattr(layer.lora_dropout[ADAPTER], "p", 0.0)  # without one it is an identity


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call `forward`, and once more in the backward pass instead of keeping what it computes."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, **named)
