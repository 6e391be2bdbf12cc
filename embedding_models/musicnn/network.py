"""MusiCNN's network in torch: of its filters, those are computed that a sound can move.

All convolutions are matrix products over windows of their input, the same on a CPU and on CUDA.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from embedding_models.weights import Tensors

BANDS = 96  # of the mel spectrogram
LOUDEST = 65_504.0  # power in a band, the largest float16; what is louder is taken as this
_FRONT = ((7, 38), (7, 67), (128, 1), (64, 1), (32, 1))  # frames and bands of the front end's convolutions
_MID_TAPS = 7
_EPSILON = 1e-3  # of the batch norms
# A filter whose output can move by less than this, for whatever sound, is a constant: float32's rounding of its values
# is of this size, and weight decay has left most of the published filters at weights of 1e-20 and less.
_INVISIBLE = 1e-7
_POSITIONS = 8  # bands along which a timbral filter is laid in one matrix product
# Frames in one piece of the front end's work, which bounds its memory: what stays in a core's cache; what keeps a GPU
# busy.
_FRAMES_AT_ONCE = {"cpu": 1024, "cuda": 1 << 15}


class _Norm(nn.Module):
    """A batch norm over the last dimension, as one product and sum."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, tensors: Tensors, number: int):
        super().__init__()
        name = _numbered("batch_normalization", number)
        gamma, beta, mean, variance = (
            tensors[f"{name}/{part}"].double() for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / torch.sqrt(variance + _EPSILON)
        self.register_buffer("scale", scale.float())
        self.register_buffer("shift", (beta - mean * scale).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class _Branch(nn.Module):
    """A branch of the front end: convolution, ReLU, batch norm, maximum over the bands that are left.

    As a norm rises or falls with its input, the maximum is taken first, over the convolution or its negative, and bias,
    ReLU and norm follow on one value instead of one a band. Filters that no sound can move are left out: `live` says
    which are computed, `constants` what the others give. `low` and `high` bound every input value.
    """

    sign: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    weights: torch.Tensor

    def __init__(self, kernel: torch.Tensor, bias: torch.Tensor, norm: _Norm, low: float, high: float):
        super().__init__()
        self.taps, self.bands = kernel.shape[:2]
        least, most = (scaled.relu() for scaled in _bounds(kernel, bias, low, high))
        ends = torch.stack([least, most]) * norm.scale.double() + norm.shift.double()
        self.live = (ends[0] - ends[1]).abs() > _INVISIBLE
        self.constants = ends.mean(dim=0).float()
        sign = torch.where(norm.scale < 0, -1.0, 1.0)
        kernel = (kernel * sign)[:, :, 0, self.live]  # (taps, bands, filters)
        for name, values in (("sign", sign), ("bias", bias), ("scale", norm.scale), ("shift", norm.shift)):
            self.register_buffer(name, values[self.live].clone())
        self.register_buffer("weights", self._laid_out(kernel))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised spectrograms (batch, frames, 96) -> (batch, frames, live filters)."""
        batch, frames = x.shape[:2]
        before = (self.taps - 1) // 2  # as TensorFlow's "same" padding
        x = functional.pad(x, (0, 0, before, self.taps - 1 - before))
        maxima = x.new_empty(batch, frames, len(self.bias))
        piece = _FRAMES_AT_ONCE["cpu" if x.device.type == "cpu" else "cuda"]
        sounds = max(1, piece // frames)
        for first in range(0, batch, sounds):
            for start in range(0, frames, piece):
                stop = min(start + piece, frames)
                found = self._maxima(x[first : first + sounds, start : stop + self.taps - 1])
                maxima[first : first + sounds, start:stop] = found
        return torch.addcmul(self.shift, (maxima * self.sign + self.bias).relu(), self.scale)

    def _laid_out(self, kernel: torch.Tensor) -> torch.Tensor:
        """The matrix that `_maxima` multiplies with, of a kernel (taps, bands, filters)."""
        raise NotImplementedError

    def _maxima(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, frames + taps - 1, 96) -> (batch, frames, filters): the convolution's maximum over the bands."""
        raise NotImplementedError


class _Timbral(_Branch):
    """Filters over many bands: a few neighbouring positions of all filters are one matrix product."""

    def _laid_out(self, kernel: torch.Tensor) -> torch.Tensor:
        positions = BANDS - self.bands + 1
        self._together = min(_POSITIONS, positions)
        self._starts = [*range(0, positions - self._together, self._together), positions - self._together]
        return _shifted(kernel.transpose(0, 1), self._together)

    def _maxima(self, x: torch.Tensor) -> torch.Tensor:
        # A row holds all taps of one band after another, so that neighbouring bands are neighbouring columns.
        rows = x.unfold(1, self.taps, 1).reshape(-1, x.shape[2] * self.taps)
        best = rows.new_full((len(rows), len(self.bias)), -torch.inf)
        for start in self._starts:
            columns = rows[:, start * self.taps :][:, : len(self.weights)]
            found = (columns @ self.weights).unflatten(1, (self._together, -1)).amax(dim=1)
            torch.maximum(best, found, out=best)
        return best.unflatten(0, (len(x), -1))


class _Temporal(_Branch):
    """Long filters over one band: a few neighbouring frames of all filters are one matrix product."""

    def _laid_out(self, kernel: torch.Tensor) -> torch.Tensor:
        self._together = self.taps // 4  # a fifth of the product is zeros; fewer frames would be copied more often
        return _shifted(kernel[:, 0], self._together)

    def _maxima(self, x: torch.Tensor) -> torch.Tensor:
        frames = x.shape[1] - self.taps + 1
        bands = functional.pad(x.transpose(1, 2), (0, -frames % self._together))
        windows = bands.unfold(2, len(self.weights), self._together)  # (batch, 96, groups, taps + together - 1)
        return (windows @ self.weights).amax(dim=1).reshape(len(x), -1, len(self.bias))[:, :frames]


class _MidConvolution(nn.Module):
    """A convolution over 7 frames of all widths, ReLU, batch norm; the kernel is (7, width, filters)."""

    weights: torch.Tensor
    bias: torch.Tensor

    def __init__(self, kernel: torch.Tensor, bias: torch.Tensor, norm: _Norm):
        super().__init__()
        self.register_buffer("weights", kernel.transpose(0, 1).flatten(0, 1).contiguous())
        self.register_buffer("bias", bias)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        margin = _MID_TAPS // 2
        windows = functional.pad(x, (0, 0, margin, margin)).unfold(1, _MID_TAPS, 1).flatten(2)
        return self.norm((windows @ self.weights + self.bias).relu())


class MusiCNN(nn.Module):
    """MusiCNN (Pons and Serra 2019, https://arxiv.org/abs/1909.06654), built from the tensors of its checkpoint."""

    live: torch.Tensor
    constants: torch.Tensor
    dense_0: torch.Tensor
    dense_1: torch.Tensor
    dense_bias_0: torch.Tensor
    dense_bias_1: torch.Tensor

    def __init__(self, tensors: Tensors):
        super().__init__()
        self.norm = _Norm(tensors, 0)
        silence, loudest = (self.norm(torch.tensor(x)).item() for x in (0.0, math.log10(10_000 * LOUDEST + 1)))
        low, high = min(silence, loudest, 0.0), max(silence, loudest, 0.0)  # zero: what time is padded with
        branches: list[_Branch] = []
        for number, (_, bands) in enumerate(_FRONT):
            kind = _Timbral if bands > 1 else _Temporal
            branches.append(kind(*_convolution(tensors, number), _Norm(tensors, number + 1), low, high))
        self.front = nn.ModuleList(branches)
        live = torch.cat([branch.live for branch in branches])
        self.register_buffer("live", live.nonzero()[:, 0])
        self.register_buffer("constants", torch.cat([branch.constants for branch in branches]))
        layers: list[_MidConvolution] = []
        for number in range(len(_FRONT), len(_FRONT) + 3):
            kernel, bias = _convolution(tensors, number)
            kernel = kernel[:, :, 0]
            if number == len(_FRONT):  # the constants come in as one more channel, of ones
                still = torch.einsum("tcf,c->tf", kernel[:, ~live].double(), self.constants[~live].double())
                kernel = torch.cat([kernel[:, live], still.float()[:, None]], dim=1)
            layers.append(_MidConvolution(kernel, bias, _Norm(tensors, number + 1)))
        self.mid = nn.ModuleList(layers)
        self.width = len(live) + sum(len(layer.bias) for layer in layers)
        self.pooled_norm, self.dense_norm = _Norm(tensors, 9), _Norm(tensors, 10)
        for number, name in enumerate(("dense", "dense_1")):
            self.register_buffer(f"dense_{number}", tensors[f"{name}/kernel"])
            self.register_buffer(f"dense_bias_{number}", tensors[f"{name}/bias"])

    def forward(self, spectrograms: torch.Tensor) -> torch.Tensor:
        """Spectrograms of `model.LogMel`, (batch, frames, 96) -> front end and mid-end, (batch, frames, width)."""
        x = self.norm(spectrograms)
        front = torch.cat([branch(x) for branch in self.front], dim=2)
        first = self.mid[0](functional.pad(front, (0, 1), value=1.0))
        second = self.mid[1](first) + first
        third = self.mid[2](second) + second
        still = self.constants.expand(*front.shape[:2], -1)
        frames = torch.cat([still, first, second, third], dim=2)
        frames[:, :, self.live] = front
        return frames

    def tags(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (batch, frames, width) -> the probability of each tag, (batch, tags)."""
        pooled = torch.stack([frames.amax(dim=1), frames.mean(dim=1)], dim=2).flatten(1)
        hidden = (self.pooled_norm(pooled) @ self.dense_0 + self.dense_bias_0).relu()
        return (self.dense_norm(hidden) @ self.dense_1 + self.dense_bias_1).sigmoid()


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def _convolution(tensors: Tensors, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel (time, bands, in, out) and bias of a convolution."""
    name = _numbered("conv2d", number)
    return tensors[f"{name}/kernel"], tensors[f"{name}/bias"]


def _bounds(kernel: torch.Tensor, bias: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the most that each filter of a convolution can give for inputs in low..high, in float64."""
    weights, bias = kernel.double().flatten(0, 2), bias.double()
    positive, negative = weights.clamp(min=0).sum(dim=0), weights.clamp(max=0).sum(dim=0)
    return bias + positive * low + negative * high, bias + positive * high + negative * low


def _shifted(kernel: torch.Tensor, copies: int) -> torch.Tensor:
    """Lay a kernel (length, ..., filters) out at `copies` neighbouring places of a window `copies` - 1 longer.

    Returns a matrix (window's values, copies * filters), zero where a copy does not reach.
    """
    length = kernel.shape[0]
    laid = kernel.new_zeros(length + copies - 1, *kernel.shape[1:-1], copies, kernel.shape[-1])
    for place in range(copies):
        laid[place : place + length, ..., place, :] = kernel
    return laid.reshape(-1, copies * kernel.shape[-1])


def expected_shapes(tensors: Tensors, tags: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name that fit each other and the lengths of the biases."""
    names = [_numbered("conv2d", number) for number in range(len(_FRONT) + 3)]
    *filters, hidden = (
        tensors[f"{name}/bias"].numel() if f"{name}/bias" in tensors else 0 for name in [*names, "dense"]
    )
    front = sum(filters[: len(_FRONT)])
    kernels = [*_FRONT, *((_MID_TAPS, width) for width in (front, *filters[len(_FRONT) : -1]))]
    expected: dict[str, tuple[int, ...]] = {}
    for name, kernel, count in zip(names, kernels, filters, strict=True):
        expected |= {f"{name}/kernel": (*kernel, 1, count), f"{name}/bias": (count,)}
    pooled = 2 * sum(filters)
    for number, width in enumerate((1, *filters, pooled, hidden)):
        for part in ("gamma", "beta", "moving_mean", "moving_variance"):
            expected[f"{_numbered('batch_normalization', number)}/{part}"] = (width,)
    expected |= {"dense/kernel": (pooled, hidden), "dense/bias": (hidden,)}
    return expected | {"dense_1/kernel": (hidden, tags), "dense_1/bias": (tags,)}
