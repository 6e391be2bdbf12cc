"""Music2Latent's encoder as a frozen encoder: the latents of both channels and their magnitude, 10.77 Hz."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from common.errors import UserError
from common.hub import fetch_model_folder
from embedding_models.audio import AudioError
from embedding_models.base import AudioEmbeddingModel
from embedding_models.kernels.group_norm import GroupNorm, Moments, add_to, moments
from embedding_models.registry import ENCODERS
from embedding_models.weights import load_tensors, read_json, read_tensors

_WEIGHTS = "music2latent.pt"
# Signals in one pass on a CPU, where more are no faster, and at most on CUDA, where the coarse resolutions of few
# signals do not fill the device.
_SIGNALS_ON_CPU, _MOST_SIGNALS = 2, 64
_ACTIVATIONS_HELD = 4  # at the finest resolution, while its blocks run


@dataclass(frozen=True)
class LatentConfig:
    """Shape of the encoder; names and defaults are those of the published hyper-parameters."""

    sample_rate: int = 44_100
    hop: int = 512
    """Samples between STFT frames; frames are 4 x hop long and the lowest 2 x hop frequencies are kept."""
    alpha_rescale: float = 0.65
    beta_rescale: float = 0.34
    """The spectrum's magnitudes m are taken as beta * m ** alpha."""
    sigma_rescale: float = 0.06
    """Latents are divided by this, which brings them near unit variance."""
    base_channels: int = 64
    multipliers_list: tuple[int, ...] = (1, 2, 4, 4, 4)
    """Channels of each resolution, in units of base_channels."""
    layers_list_encoder: tuple[int, ...] = (1, 1, 1, 1, 1)
    """Residual blocks of each resolution."""
    attention_list_encoder: tuple[int, ...] = (0, 0, 1, 1, 1)
    """Whether a resolution's blocks attend over frequency."""
    freq_downsample_list: tuple[int, ...] = (1, 0, 0, 0)
    """1: frequency is divided by 4; 0: frequency and time are divided by 2."""
    heads: int = 4
    bottleneck_base_channels: int = 512
    num_bottleneck_layers: int = 4
    bottleneck_channels: int = 64

    @property
    def time_factor(self) -> int:
        """STFT frames per latent."""
        return 2 ** self.freq_downsample_list.count(0)

    @property
    def frequencies(self) -> int:
        """Frequencies that are left at the coarsest resolution."""
        return self.hop * 2 // 4 ** self.freq_downsample_list.count(1) // self.time_factor


class _TimeMajorConv(nn.Conv2d):
    """A convolution of (batch, channels, time, frequency) whose weights are stored as published: frequency, time.

    Its bias is left to whoever adds something to its output or normalises it. Kernel, stride and padding are given
    as published too.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.weight.transpose(2, 3), None, self.stride[::-1], self.padding[::-1])

    @property
    def bias_of_outputs(self) -> torch.Tensor:
        """The bias that `forward` leaves out, (outputs,)."""
        assert self.bias is not None
        return self.bias


class _FrequencyGain(nn.Module):
    def __init__(self, frequencies: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, frequencies, 1))


class _FrequencyAttention(nn.Module):
    """Self-attention among the frequencies of each time step, with a residual path."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.mha = nn.MultiheadAttention(channels, heads, batch_first=True)  # its parameters alone are used
        self.norm = GroupNorm(channels)

    def forward(self, x: torch.Tensor, of_x: Moments) -> tuple[torch.Tensor, Moments]:
        batch, channels, time, frequencies = x.shape
        steps = self.norm.normalise(x, of_x, silu=False).permute(0, 2, 3, 1).reshape(-1, frequencies, channels)
        projected = functional.linear(steps, self.mha.in_proj_weight, self.mha.in_proj_bias)
        parts = projected.unflatten(2, (3, self.mha.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        projection = self.mha.out_proj
        out = functional.linear(attended, projection.weight).view(batch, time, frequencies, channels)
        out = out.permute(0, 3, 1, 2)
        return out, add_to(out, projection.bias, shortcut=x)


class _ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut; then attention where the resolution has it."""

    def __init__(self, inputs: int, outputs: int, heads: int | None):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(inputs), _TimeMajorConv(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(outputs), _TimeMajorConv(outputs, outputs, 3, padding=1)
        self.res_conv = None if inputs == outputs else _TimeMajorConv(inputs, outputs, 1)
        self.att = None if heads is None else _FrequencyAttention(outputs, heads)

    def forward(self, x: torch.Tensor, of_x: Moments) -> tuple[torch.Tensor, Moments]:
        inner = self.conv1(self.norm1.normalise(x, of_x, silu=True))
        of_inner = moments(inner)
        inner = self.norm2.normalise(inner, of_inner, silu=True, bias=self.conv1.bias_of_outputs, in_place=True)
        inner, bias = self.conv2(inner), self.conv2.bias_of_outputs
        if self.res_conv is not None:
            x, bias = self.res_conv(x), bias + self.res_conv.bias_of_outputs
        of_inner = add_to(inner, bias, shortcut=x)
        return (inner, of_inner) if self.att is None else self.att(inner, of_inner)


class _Downsampling(nn.Module):
    """Norm and a strided convolution: frequency / 4, or frequency / 2 and time / 2."""

    def __init__(self, channels: int, frequency_only: bool):
        super().__init__()
        self.norm = GroupNorm(channels)
        if frequency_only:
            self.c = _TimeMajorConv(channels, channels, (5, 1), stride=(4, 1), padding=(2, 0))
        else:
            self.c = _TimeMajorConv(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor, of_x: Moments) -> tuple[torch.Tensor, Moments]:
        x = self.c(self.norm.normalise(x, of_x, silu=False, in_place=True))
        return x, add_to(x, self.c.bias_of_outputs)


class _BottleneckBlock(nn.Module):
    """Norm, SiLU, convolution over time, twice, with a residual path."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = _plain_norm(channels), nn.Conv1d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = _plain_norm(channels), nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(functional.silu(self.norm1(x)))
        return x + self.conv2(functional.silu(self.norm2(inner)))


def _plain_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels)


class LatentEncoder(nn.Module):
    """The encoder of Music2Latent (https://arxiv.org/abs/2408.06500), with the published parameters.

    Takes real and imaginary parts of rescaled spectra, (batch, 2, 2 * hop, frames), the number of frames divisible
    by `time_factor`; gives (batch, bottleneck_channels, frames / time_factor), in -1..1.

    Inside, time comes before frequency and channels are stored last: a time step's frequencies, over which is
    attended, then lie side by side, and nothing is transposed on the way.
    """

    def __init__(self, config: LatentConfig):
        super().__init__()
        channels = [config.base_channels * multiplier for multiplier in config.multipliers_list]
        self.gain = _FrequencyGain(config.hop * 2)
        self.conv_inp = _TimeMajorConv(2, channels[0], 3, padding=1)
        down: list[nn.Module] = []
        width = channels[0]
        for level, blocks in enumerate(config.layers_list_encoder):
            heads = config.heads if config.attention_list_encoder[level] else None
            for _ in range(blocks):
                down.append(_ResidualBlock(width, channels[level], heads))
                width = channels[level]
            if level < len(config.freq_downsample_list):
                down.append(_Downsampling(width, frequency_only=config.freq_downsample_list[level] == 1))
        self.down_layers = nn.ModuleList(down)
        self.prenorm_1d_to_2d = GroupNorm(width)
        inner = config.bottleneck_base_channels
        to_inner = nn.Conv1d(width * config.frequencies, inner, 1)
        bottleneck = [_BottleneckBlock(inner) for _ in range(config.num_bottleneck_layers)]
        self.bottleneck_layers = nn.ModuleList([to_inner, *bottleneck])
        self.norm_out = _plain_norm(inner)
        self.conv_out = nn.Conv1d(inner, config.bottleneck_channels, 1)

    def forward(self, spectra: torch.Tensor) -> torch.Tensor:
        """Encode spectra; see the class for shapes."""
        x = self.conv_inp(spectra.transpose(2, 3).contiguous(memory_format=torch.channels_last))
        of_x = add_to(x, self.conv_inp.bias_of_outputs, gain=self.gain.scale.flatten())
        for layer in self.down_layers:
            x, of_x = layer(x, of_x)
        x = self.prenorm_1d_to_2d.normalise(x, of_x, silu=False)
        to_inner = cast(nn.Conv1d, self.bottleneck_layers[0])
        # The published weights take channels x frequencies of a time step; here they lie as frequencies x channels.
        weight = to_inner.weight.view(-1, x.shape[1], x.shape[3]).transpose(1, 2).flatten(1)
        x = functional.linear(x.permute(0, 2, 3, 1).flatten(2), weight, to_inner.bias).transpose(1, 2).contiguous()
        for block in list(self.bottleneck_layers)[1:]:
            x = block(x)
        return self.conv_out(functional.silu(self.norm_out(x))).tanh()


class MusicLatentSpaceModel(AudioEmbeddingModel):
    """Music2Latent's encoder: stereo at 44.1 kHz, 10.77 frames a second, 192 wide as published.

    The two channels are encoded apart; a frame is left | right | magnitude sqrt(left^2 + right^2), 64 each.
    `model` is a hub id or a folder with `music2latent.pt` in the published form (a dictionary whose
    `gen_state_dict` has the encoder under `encoder.`; the decoder is not read). A `config.json` beside it may
    give fields of `LatentConfig`; without one the published widths are meant. With
    `precision="float16"` all but the spectra runs in half precision on CUDA. Raises `UserError` for files that are
    not such a checkpoint.
    """

    name = "latent"
    channels = 2
    half_precision = True

    def __init__(
        self,
        model: str | os.PathLike = ENCODERS["latent"].weights.id,
        device: str = "auto",
        precision: str = "float32",
        revision: str | None = None,
    ):
        super().__init__(model, revision, device, precision)
        weights = fetch_model_folder(model, [_WEIGHTS, "config.json"], revision) / _WEIGHTS
        self._config = _read_config(weights.with_name("config.json"))
        self.sample_rate = self._config.sample_rate
        self.frame_dim = 3 * self._config.bottleneck_channels
        try:
            self._encoder = LatentEncoder(self._config)
        except (TypeError, ValueError, ArithmeticError, AssertionError) as error:
            raise UserError(f"{weights.with_name('config.json')}: no shape of an encoder ({error})") from error
        load_tensors(self._encoder, read_tensors(weights, "encoder.", "gen_state_dict"), weights)
        self._encoder.eval().requires_grad_(False).to(self.device)
        self._window = torch.hann_window(4 * self._config.hop, device=self.device)

    def _encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        batch, channels, samples = waveforms.shape
        signals = waveforms.reshape(batch * channels, samples)
        encoder = self._in_precision(self._encoder)
        dtype = encoder.conv_out.weight.dtype
        parts = signals.split(self._signals_at_once(samples, dtype))
        latents = torch.cat([encoder(self._spectra(part).to(dtype)) for part in parts]).float()
        left, right = (latents / self._config.sigma_rescale).unflatten(0, (batch, channels)).unbind(1)
        return torch.cat([left, right, torch.sqrt(left**2 + right**2)], dim=1).transpose(1, 2)

    def _signals_at_once(self, samples: int, dtype: torch.dtype) -> int:
        """Signals in one pass: on CUDA as many as half of the free memory holds."""
        if self.device.type != "cuda":
            return _SIGNALS_ON_CPU
        finest = self._config.base_channels * 2 * self._config.hop * (samples // self._config.hop)
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        free -= torch.cuda.memory_allocated(self.device)
        return max(1, min(_MOST_SIGNALS, int(free / 2 / (_ACTIVATIONS_HELD * finest * dtype.itemsize))))

    def _spectra(self, signals: torch.Tensor) -> torch.Tensor:
        """(signals, samples) -> (signals, 2, 2 * hop, frames): as many frames as make up whole latents."""
        c = self._config
        frames = (signals.shape[1] // c.hop - 3) // c.time_factor * c.time_factor
        if frames < 1:
            needed = (c.time_factor + 3) * c.hop
            raise AudioError("too short", f"latent: {signals.shape[1]} samples, expected {needed} or more")
        signals = signals[:, : (frames + 3) * c.hop]
        x = torch.stft(signals, 4 * c.hop, c.hop, window=self._window, center=False, return_complex=True)
        x = x[:, : 2 * c.hop]  # without the Nyquist frequency
        parts = torch.view_as_real(x).permute(0, 3, 1, 2)
        power = parts.square().sum(dim=1, keepdim=True)
        # m ** alpha in the direction of x is x * m ** (alpha - 1), except where there is nothing.
        scale = c.beta_rescale * power ** ((c.alpha_rescale - 1) / 2)
        return parts * scale.masked_fill_(power == 0, 0)


def _read_config(path: Path) -> LatentConfig:
    """Read fields of `LatentConfig` from a JSON file beside the weights; other fields are not ours to judge."""
    if not path.is_file():
        return LatentConfig()
    names = {field.name for field in fields(LatentConfig)}
    given = {name: value for name, value in read_json(path).items() if name in names}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    config = LatentConfig(**values)
    levels = len(config.multipliers_list)
    lengths = [len(config.layers_list_encoder), len(config.attention_list_encoder)]
    if lengths != [levels, levels] or len(config.freq_downsample_list) != levels - 1:
        raise UserError(f"{path}: expected lists for {levels} resolutions, one less in freq_downsample_list")
    return config
