"""MusiCNN as a frozen encoder: the outputs of its front end and mid-end side by side, 62.5 frames a second.

Its weights come in the PyPI package `musicnn` (ISC licence), whose own code needs TensorFlow; here they run in torch.
"""

import importlib.metadata
import importlib.util
import math
import os
from pathlib import Path

import librosa
import torch
from torch import nn
from torch.nn import functional

from common.errors import UserError
from embedding_models.base import AudioEmbeddingModel, Waveforms
from embedding_models.musicnn_tags import TAGS
from embedding_models.tensor_bundle import read_tensor_bundle
from embedding_models.weights import Tensors, read_json

PUBLISHED = ("MSD_musicnn", "MTT_musicnn")  # folders of the package with such a network
_PACKAGE = "musicnn"
_INSTALL = "pip install --no-deps musicnn==0.1.0"

_SAMPLE_RATE, _N_FFT, _HOP, _BANDS = 16_000, 512, 256, 96
_LOUDEST = 65_504.0  # the largest float16; what is louder is taken as this
_FRONT = ((7, 38), (7, 67), (128, 1), (64, 1), (32, 1))  # frames and bands of the front end's convolutions
_MID_TAPS = 7
_EPSILON = 1e-3  # of the batch norms
# A filter whose output can move by less than this, for whatever sound, is a constant: float32's rounding of its values
# is of this size, and weight decay has left most of the published filters at weights of 1e-20 and less.
_INVISIBLE = 1e-7
_POSITIONS = 8  # bands along which a timbral filter is laid in one matrix product
# Frames in one piece of the front end's work, which bounds its memory. A CPU's caches would like fewer, but each piece
# makes its threads wait for each other some fifty times, which is dear where other programs use the cores.
_FRAMES_AT_ONCE = {"cpu": 1024, "cuda": 1 << 15}


class LogMel(nn.Module):
    """The mel spectrogram of `librosa.feature.melspectrogram`, in float16 as in training, then log10(10,000 x + 1)."""

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        filters = librosa.filters.mel(sr=_SAMPLE_RATE, n_fft=_N_FFT, n_mels=_BANDS)
        self.register_buffer("filters", torch.from_numpy(filters.T.copy()), persistent=False)
        self.register_buffer("window", torch.hann_window(_N_FFT), persistent=False)

    def power(self, waveforms: torch.Tensor) -> torch.Tensor:
        """(batch, samples) at 16 kHz -> power in each band, (batch, 1 + samples // 256, 96)."""
        spectrum = torch.stft(
            waveforms, _N_FFT, _HOP, window=self.window, center=True, pad_mode="constant", return_complex=True
        )
        return (spectrum.real.square() + spectrum.imag.square()).transpose(1, 2) @ self.filters

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        """(batch, samples) at 16 kHz -> (batch, 1 + samples // 256, 96)."""
        # The package stays in float16 for the logarithm, which overflows at a power of 6.6; nothing but that differs.
        power = self.power(waveforms).clamp_(max=_LOUDEST).half().float()
        return torch.log10(10_000 * power + 1)


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
        positions = _BANDS - self.bands + 1
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
        silence, loudest = (self.norm(torch.tensor(x)).item() for x in (0.0, math.log10(10_000 * _LOUDEST + 1)))
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
        """`LogMel`'s spectrograms (batch, frames, 96) -> front end and mid-end, (batch, frames, width)."""
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


class MusiCNNModel(AudioEmbeddingModel):
    """MusiCNN: mono at 16 kHz, 62.5 frames a second, 753 wide as published; always float32.

    A frame is the front end's output (561) and the three of the mid-end (64 each). `model` is "MSD_musicnn" (trained on
    the Million Song Dataset) or "MTT_musicnn" (MagnaTagATune), both of the installed package `musicnn`, or a folder
    with the same files as theirs; `revision` is the package's version where one is asked for. Raises `UserError` for
    what is missing, damaged or another network.
    """

    name = "musicnn"
    channels = 1
    sample_rate = _SAMPLE_RATE

    def __init__(
        self,
        model: str | os.PathLike = PUBLISHED[0],
        device: str = "auto",
        precision: str = "float32",
        revision: str | None = None,
    ):
        super().__init__(model, revision, device, precision)
        folder, self.revision = find_folder(self.model, revision)
        self.tag_names, self._patch = _read_config(folder / "config.json")
        tensors = read_weights(folder)
        _check_shapes(tensors, folder / ".index", len(self.tag_names))
        self.network = MusiCNN(tensors).eval().requires_grad_(False).to(self.device)
        self.spectrogram = LogMel().to(self.device)
        self.frame_dim = self.network.width

    def _encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        return self.network(self.spectrogram(waveforms))

    @torch.no_grad()
    def tags(self, waveforms: Waveforms) -> torch.Tensor:
        """The model's own tags of (batch, samples) at 16 kHz: probabilities (batch, 50) on the CPU, named `tag_names`.

        The mean over patches of 187 frames (3 s) side by side, as the package does it: what is left over at the end is
        not heard. A sound under 3 s, which the package refuses, is one patch of its own length.
        """
        waveforms = torch.as_tensor(waveforms).to(self.device, torch.float32)
        if waveforms.ndim != 2:
            raise ValueError(f"{self.name}: expected waveforms (batch, samples), found {tuple(waveforms.shape)}")
        spectrograms = self.spectrogram(waveforms)
        patch = min(self._patch, spectrograms.shape[1])
        count = spectrograms.shape[1] // patch
        total = torch.zeros(len(waveforms), len(self.tag_names), device=self.device)
        for number in range(count):  # one after another, so that frames of a long sound are not kept
            total += self.network.tags(self.network(spectrograms[:, number * patch :][:, :patch]))
        return (total / count).cpu()


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


def find_folder(model: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a model, and the version of the package where it comes from there; `UserError` for none."""
    if Path(model).is_dir():
        return Path(model), None
    if model not in PUBLISHED:
        raise UserError(f"{model}: expected a folder with MusiCNN's files or one of {', '.join(PUBLISHED)}")
    spec = importlib.util.find_spec(_PACKAGE)  # finds it without running its code, which would ask for TensorFlow
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{model}: comes with the Python package {_PACKAGE}, which is not installed: {_INSTALL}")
    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if revision not in (None, version):
        raise UserError(f"{model}: expected version {revision} of the package {_PACKAGE}, found {version}")
    return Path(spec.submodule_search_locations[0]) / model, version


def read_weights(folder: Path) -> Tensors:
    """The network's own tensors by their names in the checkpoint, without the optimizer's."""
    return read_tensor_bundle(folder, lambda name: not name.endswith(("/Adam", "/Adam_1", "_power")))


def _read_config(path: Path) -> tuple[tuple[str, ...], int]:
    """Names of the tags, and frames of a patch; `UserError` for another kind of input than is computed here."""
    config = read_json(path)
    sound = config.get("audio_rep")
    sound = sound if isinstance(sound, dict) else {}
    expected = {"resample_sr": _SAMPLE_RATE, "hop": _HOP, "n_fft": _N_FFT, "n_mels": _BANDS, "spectrogram_type": "mel"}
    for name, value in expected.items():
        if sound.get(name) != value:
            raise UserError(f"{path}: audio_rep.{name}: expected {value!r}, found {sound.get(name)!r}")
    collection = str(sound.get("identifier"))[:3]
    if collection not in TAGS:
        raise UserError(
            f"{path}: audio_rep.identifier: expected {' or '.join(TAGS)}, found {sound.get('identifier')!r}"
        )
    frames = config.get("n_frames")
    if not isinstance(frames, int) or frames < 1:
        raise UserError(f"{path}: n_frames: expected a number of frames, found {frames!r}")
    return TAGS[collection], frames


def _check_shapes(tensors: Tensors, path: Path, tags: int) -> None:
    """Raise `UserError` unless a checkpoint is MusiCNN's; the numbers of filters are its own."""
    for name, shape in _expected_shapes(tensors, tags).items():
        found = tuple(tensors[name].shape) if name in tensors else "none"
        if found != shape:
            raise UserError(f"{path}: not the weights of MusiCNN: {name}: expected shape {shape}, found {found}")


def _expected_shapes(tensors: Tensors, tags: int) -> dict[str, tuple[int, ...]]:
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
