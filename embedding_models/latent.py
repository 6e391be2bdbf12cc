"""Music2Latent's encoder as a frozen encoder: the latents of both channels and their magnitude, 10.77 Hz."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from common.hub import fetch_model_folder
from embedding_models.audio import AudioError
from embedding_models.base import AudioEmbeddingModel
from embedding_models.registry import ENCODERS
from embedding_models.weights import load_tensors, read_json, read_tensors

_WEIGHTS = "music2latent.pt"
# Signals in one pass: at the published widths one 10 s signal needs 0.22 GB per tensor at full resolution.
_SIGNALS_AT_ONCE = 8


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


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels)


class _FrequencyGain(nn.Module):
    def __init__(self, frequencies: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, frequencies, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class _FrequencyAttention(nn.Module):
    """Self-attention among the frequencies of each time step, with a residual path."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.mha = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = _norm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, frequencies, time = x.shape
        steps = self.norm(x).permute(0, 3, 2, 1).reshape(batch * time, frequencies, channels)
        attended = self.mha(steps, steps, steps, need_weights=False)[0]
        return x + attended.reshape(batch, time, frequencies, channels).permute(0, 3, 2, 1)


class _ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut; in two dimensions or one."""

    def __init__(self, conv: type[nn.Module], inputs: int, outputs: int, heads: int | None = None):
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), conv(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _norm(outputs), conv(outputs, outputs, 3, padding=1)
        self.res_conv = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)
        self.att = nn.Identity() if heads is None else _FrequencyAttention(outputs, heads)
        self.activation = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(self.activation(self.norm1(x)))
        inner = self.conv2(self.activation(self.norm2(inner)))
        return self.att(inner + self.res_conv(x))


class _Downsampling(nn.Module):
    """Norm and a strided convolution: frequency / 4, or frequency / 2 and time / 2."""

    def __init__(self, channels: int, frequency_only: bool):
        super().__init__()
        self.norm = _norm(channels)
        if frequency_only:
            self.c = nn.Conv2d(channels, channels, (5, 1), stride=(4, 1), padding=(2, 0))
        else:
            self.c = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.norm(x))


class LatentEncoder(nn.Module):
    """The encoder of Music2Latent (https://arxiv.org/abs/2408.06500), with the published parameter names.

    Takes real and imaginary parts of rescaled spectra, (batch, 2, 2 * hop, frames), the number of frames divisible
    by `time_factor`; gives (batch, bottleneck_channels, frames / time_factor), in -1..1.
    """

    def __init__(self, config: LatentConfig):
        super().__init__()
        channels = [config.base_channels * multiplier for multiplier in config.multipliers_list]
        self.gain = _FrequencyGain(config.hop * 2)
        self.conv_inp = nn.Conv2d(2, channels[0], 3, padding=1)
        down, width = [], channels[0]
        for level, blocks in enumerate(config.layers_list_encoder):
            heads = config.heads if config.attention_list_encoder[level] else None
            for _ in range(blocks):
                down.append(_ResidualBlock(nn.Conv2d, width, channels[level], heads))
                width = channels[level]
            if level < len(config.freq_downsample_list):
                down.append(_Downsampling(width, frequency_only=config.freq_downsample_list[level] == 1))
        self.down_layers = nn.ModuleList(down)
        self.prenorm_1d_to_2d = _norm(width)
        inner = config.bottleneck_base_channels
        blocks = [_ResidualBlock(nn.Conv1d, inner, inner) for _ in range(config.num_bottleneck_layers)]
        self.bottleneck_layers = nn.ModuleList([nn.Conv1d(width * config.frequencies, inner, 1), *blocks])
        self.norm_out = _norm(inner)
        self.activation_out = nn.SiLU()
        self.conv_out = nn.Conv1d(inner, config.bottleneck_channels, 1)

    def forward(self, spectra: torch.Tensor) -> torch.Tensor:
        """Encode spectra; see the class for shapes."""
        x = self.gain(self.conv_inp(spectra))
        for layer in self.down_layers:
            x = layer(x)
        x = self.prenorm_1d_to_2d(x)
        x = x.reshape(x.shape[0], -1, x.shape[3])  # (batch, channels * frequencies, time)
        for layer in self.bottleneck_layers:
            x = layer(x)
        return self.conv_out(self.activation_out(self.norm_out(x))).tanh()


class MusicLatentSpaceModel(AudioEmbeddingModel):
    """Music2Latent's encoder: stereo at 44.1 kHz, 10.77 frames a second, 192 wide as published.

    The two channels are encoded apart; a frame is left | right | magnitude sqrt(left^2 + right^2), 64 each.
    `model` is a hub id or a folder with `music2latent.pt` in the published form (a dictionary whose
    `gen_state_dict` has the encoder under `encoder.`; the decoder is not read). A `config.json` beside it may
    give fields of `LatentConfig`; without one the published widths are meant. Everything runs in float32 unless
    `precision="float16"` on CUDA. Raises `UserError` for files that are not such a checkpoint.
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
        # Not in channels_last on a CPU: torch's group norm is then off by 1.7e-5 of the largest value.
        try:
            self._encoder = LatentEncoder(self._config)
        except (TypeError, ValueError, ArithmeticError, AssertionError) as error:
            raise UserError(f"{weights.with_name('config.json')}: no shape of an encoder ({error})") from error
        load_tensors(self._encoder, read_tensors(weights, "encoder.", "gen_state_dict"), weights)
        self._encoder.eval().requires_grad_(False).to(self.device)
        self._window = torch.hann_window(4 * self._config.hop, device=self.device)

    def _encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        batch, channels, samples = waveforms.shape
        signals = waveforms.reshape(batch * channels, samples).split(_SIGNALS_AT_ONCE)
        latents = torch.cat([self._encoder(self._spectra(part)) for part in signals]).float()
        left, right = (latents / self._config.sigma_rescale).unflatten(0, (batch, channels)).unbind(1)
        return torch.cat([left, right, torch.sqrt(left**2 + right**2)], dim=1).transpose(1, 2)

    def _spectra(self, signals: torch.Tensor) -> torch.Tensor:
        """(signals, samples) -> (signals, 2, 2 * hop, frames): as many frames as make up whole latents."""
        c = self._config
        frames = (signals.shape[1] // c.hop - 3) // c.time_factor * c.time_factor
        if frames < 1:
            needed = (c.time_factor + 3) * c.hop
            raise AudioError("too short", f"latent: {signals.shape[1]} samples, expected {needed} or more")
        signals = signals[:, : (frames + 3) * c.hop]
        with torch.autocast(signals.device.type, enabled=False):
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
    config = LatentConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    levels = len(config.multipliers_list)
    lengths = [len(config.layers_list_encoder), len(config.attention_list_encoder)]
    if lengths != [levels, levels] or len(config.freq_downsample_list) != levels - 1:
        raise UserError(f"{path}: expected lists for {levels} resolutions, one less in freq_downsample_list")
    return config
