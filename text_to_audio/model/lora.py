"""LoRA linear layers in few kernels: one autograd function for all projections of one input, its backward by hand.

PEFT builds, names, saves and loads the layers; here is what they compute. Of projections that share their input x, the
frozen weights W are one tensor and y = x W^T + bias + dropout(x) A^T B^T, where A (rank, inputs) are their A one below
the other and B^T (rank, outputs) their B, transposed and times alpha / rank, in blocks along the diagonal (Hu et al.
2021). They share one dropout mask, where PEFT draws one for each.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from text_to_audio.model.held_weights import linear

ADAPTER = "default"  # PEFT's name for the one that a model is given


class LoraProjection(torch.autograd.Function):
    """y = x W^T + bias + dropout(x) A^T B^T. Keeps dropout(x) and the mask, and nothing as wide as y.

    x: (tokens, inputs). weight: (outputs, inputs) and bias: (outputs,) or None, both frozen. a: (rank, inputs),
    b_t: (rank, outputs). All of one type. Returns (tokens, outputs).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b_t: Tensor, dropout: float
    ) -> Tensor:
        y = linear(x, weight, bias)
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        h = F.linear(dropped, a)
        # torch 2.11 compiles a function that changes its result in place to one without gradients; and compiled, the
        # sum goes into the next kernel
        y = y + torch.mm(h, b_t) if torch.compiler.is_compiling() else y.addmm_(h, b_t)
        ctx.save_for_backward(dropped, mask, h, weight, a, b_t)
        ctx.dropout = dropout
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        dropped, mask, h, weight, a, b_t = ctx.saved_tensors
        grad_h = F.linear(grad, b_t)
        grad_b = torch.tensordot(h, grad, dims=([0], [0]))
        grad_a = torch.tensordot(grad_h, dropped, dims=([0], [0]))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight.to(grad.dtype))
            if mask is None:
                grad_x.addmm_(grad_h, a)
            else:
                grad_x.addcmul_(torch.mm(grad_h, a), mask, value=1 / (1 - ctx.dropout))
        return grad_x, None, None, grad_a, grad_b, None


class LoraGroup:
    """PEFT's linear layers of one input, computed together. Their frozen weights become views of one tensor.

    weight: (outputs, inputs) and bias: (outputs,) or None, of all layers. matrices: A and B of each layer in turn.
    """

    def __init__(self, layers: Iterable[LoraLinear]):
        self.layers = list(layers)
        self.scaling = [float(layer.scaling[ADAPTER]) for layer in self.layers]
        self._find(None, None)

    def tie(self) -> None:
        """Find the layers' parameters, and make views of one tensor of the frozen ones.

        To be called after each move of the model, which may put other objects in their place.
        """
        self._find(self.weight, self.bias)

    def _find(self, weight: Tensor | None, bias: Tensor | None) -> None:
        base = [_linear(layer.base_layer) for layer in self.layers]
        self.weight = _stacked([each.weight for each in base], weight)
        biases = [each.bias for each in base if each.bias is not None]  # of projections of one input all or none has
        self.bias = _stacked(biases, bias) if biases else None
        pairs = [(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for layer in self.layers]
        self.matrices = [_linear(each).weight for pair in pairs for each in pair]
        self.rank, self.inputs = self.matrices[0].shape
        self.outputs = [len(each) for each in self.matrices[1::2]]

    @property
    def signature(self) -> tuple[float, ...]:
        """What two groups must have in common for their matrices to be stacked."""
        return self.inputs, *self.outputs, self.rank, *self.scaling


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear), f"LoRA is computed on linear layers, found {type(module).__name__}"
    return module


def _stacked(parameters: Sequence[Tensor], known: Tensor | None) -> Tensor:
    """These frozen parameters one below the other; they become views of it. `known`, where they already are its."""
    if len(parameters) == 1:
        return parameters[0].detach()
    if known is not None and all(
        each.untyped_storage()._cdata == known.untyped_storage()._cdata for each in parameters
    ):
        return known
    whole = torch.cat([each.detach() for each in parameters])
    for each, part in zip(parameters, whole.split([len(each) for each in parameters]), strict=True):
        each.data = part
    return whole


class _Copies(torch.autograd.Function):
    """(A, B^T) of n groups of one signature, (n, rank, inputs) and (n, rank, outputs), from their `matrices` in turn.

    A few kernels for all of them, since there are hundreds of matrices and each is small.
    """

    @staticmethod
    def forward(ctx: Any, group: LoraGroup, dtype: torch.dtype, *matrices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.dtype = group, matrices[0].dtype
        layers, rank = len(group.layers), group.rank
        kinds = [torch.stack(matrices[i :: 2 * layers]) for i in range(2 * layers)]
        a = torch.cat(kinds[::2], 1).to(dtype)
        b_t = a.new_zeros(len(a), layers * rank, sum(group.outputs))  # zeros beside the blocks
        for block, b, scaling in zip(_blocks(b_t, group), kinds[1::2], group.scaling, strict=True):
            block.copy_(b.transpose(1, 2) * scaling)
        return a, b_t

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor | None, ...]:
        group: LoraGroup = ctx.group
        kinds: list[tuple[Tensor, ...]] = []
        for a, b_t, scaling in zip(grad_a.split(group.rank, 1), _blocks(grad_b, group), group.scaling, strict=True):
            b = b_t.transpose(1, 2)
            like_a, like_b = (torch.empty(each.shape, dtype=ctx.dtype, device=each.device) for each in (a, b))
            kinds += [like_a.copy_(a).unbind(), like_b.copy_(b).mul_(scaling).unbind()]
        return None, None, *(each for matrices in zip(*kinds, strict=True) for each in matrices)


def _blocks(b_t: Tensor, group: LoraGroup) -> list[Tensor]:
    """The blocks along the diagonal of (n, rank, outputs), one of each layer."""
    rows = b_t.split(group.rank, 1)
    return [each.split(group.outputs, 2)[i] for i, each in enumerate(rows)]


class LoraCopies:
    """The trained matrices of many groups as they are computed with, made once for each pass of a micro-batch."""

    def __init__(self, groups: list[LoraGroup]):
        self.groups = groups
        self._kept: tuple[tuple, list] = ((), [])

    def make(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """(A, B^T) of each group in this type, with their graph; without one they are kept until a weight changes."""
        if torch.is_grad_enabled():
            return self._made(dtype)
        matrices = [each for group in self.groups for each in group.matrices]
        state = dtype, *((id(each), each._version) for each in matrices)
        if self._kept[0] != state:
            self._kept = state, self._made(dtype)
        return self._kept[1]

    def _made(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        alike: dict[tuple, list[int]] = {}
        for number, group in enumerate(self.groups):
            alike.setdefault(group.signature, []).append(number)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for numbers in alike.values():
            matrices = [each for number in numbers for each in self.groups[number].matrices]
            a, b_t = _Copies.apply(self.groups[numbers[0]], dtype, *matrices)
            found.update(zip(numbers, zip(a.unbind(), b_t.unbind(), strict=True), strict=True))
        return [found[number] for number in range(len(self.groups))]
