"""LoRA linear layers in few kernels: one autograd function for all projections of one input, backward by hand.

PEFT builds, names, saves and loads the layers; this computes what they compute. For projections of one input x with
frozen weights W (stacked), y = x W^T + scaling * dropout(x) A^T B^T, where A (r, inputs) is the projections' matrices
one below the other and B^T (r, outputs) their transposed ones in blocks along the diagonal (Hu et al. 2021).
The projections of one input share one dropout mask.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


class LoraProjection(torch.autograd.Function):
    """y = x W^T + bias + scaling * dropout(x) A^T B^T; saves x and the mask, nothing as wide as y.

    x: (tokens, inputs). weight: (outputs, inputs) and bias: (outputs,) or None, frozen. a: (r, inputs), b_t:
    (r, outputs), of x's type. Returns (tokens, outputs).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b_t, scaling, dropout):
        y = F.linear(x, weight, bias)
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        h = F.linear(dropped, a)
        y.addmm_(h, b_t, alpha=scaling)
        ctx.save_for_backward(x, mask, h, weight, a, b_t)
        ctx.scaling, ctx.dropout = scaling, dropout
        return y

    @staticmethod
    def backward(ctx, grad):
        x, mask, h, weight, a, b_t = ctx.saved_tensors
        scaling, keep = ctx.scaling, 1 - ctx.dropout
        grad = grad.contiguous()
        g = F.linear(grad, b_t)
        grad_b = torch.addmm(b_t, h.t(), grad, beta=0, alpha=scaling)
        dropped = x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / keep)
        grad_a = torch.addmm(a, g.t(), dropped, beta=0, alpha=scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight)
            if mask is None:
                grad_x.addmm_(g, a, alpha=scaling)
            else:
                grad_x.addcmul_(torch.mm(g, a), mask, value=scaling / keep)
        return grad_x, None, None, grad_a, grad_b, None, None


class LoraGroup:
    """PEFT's linear layers of one input, computed together. Their frozen weights become views of one tensor."""

    def __init__(self, layers: Iterable[LoraLinear], adapter: str = "default"):
        self.layers = list(layers)
        self._a = [layer.lora_A[adapter].weight for layer in self.layers]
        self._b = [layer.lora_B[adapter].weight for layer in self.layers]
        (self.scaling,) = {layer.scaling[adapter] for layer in self.layers}
        self.rank = self._a[0].shape[0]
        self.outputs = [each.shape[0] for each in self._b]
        self.inputs = self._a[0].shape[1]
        self.weight = self.bias = None
        self.tie()

    def tie(self) -> None:
        """Make the frozen weights views of one tensor, where they are not; to be called when they were moved."""
        self.weight = stacked([layer.base_layer.weight for layer in self.layers], self.weight)
        biases = [layer.base_layer.bias for layer in self.layers]
        if biases[0] is not None:
            self.bias = stacked(biases, self.bias)

    def parameters(self) -> list[nn.Parameter]:
        """The trained matrices: all A, then all B."""
        return [*self._a, *self._b]


def stacked(parameters: list[nn.Parameter], known: Tensor | None) -> Tensor:
    """These frozen parameters one below the other, of which they become views; `known` where they are its views."""
    if len(parameters) == 1:
        return parameters[0].data
    storages = {each.untyped_storage()._cdata for each in parameters}
    if known is not None and storages == {known.untyped_storage()._cdata}:
        return known
    whole = torch.cat([each.data for each in parameters])
    for each, part in zip(parameters, whole.split([len(each) for each in parameters]), strict=True):
        each.data = part
    return whole


class LoraCopies(torch.autograd.Function):
    """The trained matrices of many groups in the type of the computation: per group A stacked, and B^T in blocks.

    Made once for each pass of a micro-batch instead of at each use. groups: `LoraGroup`s; matrices: their parameters.
    Returns a, b_t of each group.
    """

    @staticmethod
    def forward(ctx, groups, dtype, *matrices):
        ctx.groups = groups
        ctx.dtype = matrices[0].dtype
        flat = matrices[0].new_zeros(sum(_sizes(groups)), dtype=dtype)
        result = _views(flat, groups)
        targets = _slots(result, groups)
        torch._foreach_copy_(targets, _as_laid(matrices, groups))
        return tuple(result)

    @staticmethod
    def backward(ctx, *grads):
        slots = _slots(grads, ctx.groups)
        copies = [torch.empty(each.shape, dtype=ctx.dtype, device=each.device) for each in slots]
        torch._foreach_copy_(copies, slots)
        return None, None, *_as_laid(copies, ctx.groups)


def _sizes(groups: list[LoraGroup]) -> list[int]:
    return [
        len(group.layers) * group.rank * width for group in groups for width in (group.inputs, sum(group.outputs))
    ]


def _views(flat: Tensor, groups: list[LoraGroup]) -> list[Tensor]:
    """Of one flat tensor: each group's A (r, inputs) and B^T (r, outputs)."""
    ranks = [len(group.layers) * group.rank for group in groups for _ in range(2)]
    return [part.view(rank, -1) for part, rank in zip(flat.split(_sizes(groups)), ranks, strict=True)]


def _slots(matrices: list[Tensor], groups: list[LoraGroup]) -> list[Tensor]:
    """Where in the groups' matrices each layer's are: per group every A, then every B^T."""
    slots = []
    for group, a, b_t in zip(groups, matrices[::2], matrices[1::2], strict=True):
        slots += a.split(group.rank)
        columns = b_t.split(group.outputs, 1)
        slots += [each[i * group.rank : (i + 1) * group.rank] for i, each in enumerate(columns)]
    return slots


def _as_laid(matrices: list[Tensor], groups: list[LoraGroup]) -> list[Tensor]:
    """The parameters' shapes to those of `_slots`, or back: every B is transposed."""
    laid, start = [], 0
    for group in groups:
        count = len(group.layers)
        laid += matrices[start : start + count]
        laid += [each.t() for each in matrices[start + count : start + 2 * count]]
        start += 2 * count
    return laid


def lora_copies(groups: list[LoraGroup], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(A, B^T) of each group in this type, with their graph."""
    matrices = LoraCopies.apply(groups, dtype, *(each for group in groups for each in group.parameters()))
    return list(zip(matrices[::2], matrices[1::2], strict=True))
