"""MuQ-MuLan's audio tower as a frozen encoder: 25 frames a second, each a vector of its music-text space."""

import os
from pathlib import Path

import librosa
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import Wav2Vec2ConformerConfig
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoder

from common.errors import UserError
from embedding_models.base import AudioEmbeddingModel
from embedding_models.registry import ENCODERS
from embedding_models.weights import fetch_config, fetch_weights, load_tensors, read_tensors

_SAMPLE_RATE = 24_000
_N_FFT = 2048
# What is read from `w2v2_config`; dropouts and the rest play no part in a frozen encoder.
_CONFORMER_FIELDS = (
    "intermediate_size",
    "hidden_act",
    "num_attention_heads",
    "layer_norm_eps",
    "position_embeddings_type",
    "rotary_embedding_base",
    "max_source_positions",
    "conv_depthwise_kernel_size",
)


class _LogMel(nn.Module):
    """Mel spectrogram in decibels, (batch, samples) -> (batch, bins, time), on the published scale."""

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self, hop_length: int, bins: int, mean: float, std: float):
        super().__init__()
        self.hop_length, self.mean, self.std = hop_length, mean, std
        filters = librosa.filters.mel(sr=_SAMPLE_RATE, n_fft=_N_FFT, n_mels=bins, htk=True, norm=None)
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)
        self.register_buffer("window", torch.hann_window(_N_FFT), persistent=False)

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(waveforms, _N_FFT, self.hop_length, window=self.window, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        decibels = 10 * torch.log10((self.filters @ power).clamp(min=1e-10))
        return (decibels[..., :-1] - self.mean) / self.std


class _ResidualStage(nn.Module):
    """Two convolutions with batch norm beside a third that is the shortcut; all strides in the first."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int]):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv3 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inner + self.bn3(self.conv3(x))).relu()


class _Subsampling(nn.Module):
    """(batch, bins, time) -> (batch, time / 4, width) at 25 labels a second (time / 2 at 50)."""

    def __init__(self, bins: int, channels: int, width: int, time_strides: tuple[int, int]):
        super().__init__()
        first, second = time_strides
        stages = [_ResidualStage(1, channels, (2, first)), _ResidualStage(channels, channels, (2, second))]
        self.conv = nn.Sequential(*stages)
        self.linear = nn.Linear(channels * (bins // 4), width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x[:, None])  # (batch, channels, bins / 4, time / 4)
        return self.linear(x.flatten(1, 2).transpose(1, 2))


class MuQBackbone(nn.Module):
    """MuQ: log-mel spectrogram, two convolutional stages, a conformer (https://arxiv.org/abs/2501.01108).

    Built from the `config.json` of a MuQ checkpoint; parameters bear the published names without `model.`.
    """

    def __init__(self, config: dict):
        super().__init__()
        stat, width = config["stat"], config["encoder_dim"]
        self.mel = _LogMel(config["hop_length"], config["n_mels"], stat["melspec_2048_mean"], stat["melspec_2048_std"])
        strides = {25: (2, 2), 50: (2, 1)}[config["label_rate"]]
        self.conv = _Subsampling(config["n_mels"], config["conv_dim"], width, strides)
        fields = {name: config["w2v2_config"][name] for name in _CONFORMER_FIELDS}
        fields |= {"hidden_size": width, "num_hidden_layers": config["encoder_depth"], "attn_implementation": "sdpa"}
        self.conformer = Wav2Vec2ConformerEncoder(Wav2Vec2ConformerConfig(**fields))
        del self.conformer.pos_conv_embed  # published and never used: position is in the rotary embedding

    def forward(self, waveforms: torch.Tensor) -> list[torch.Tensor]:
        """Encode (batch, samples) at 24 kHz to the input of every layer and the normed output of the last.

        `encoder_depth` + 1 states of shape (batch, frames, encoder_dim).
        """
        x = self.conv(self.mel(waveforms))
        positions = self.conformer.embed_positions(x)
        states = []
        for layer in self.conformer.layers:
            states.append(x)
            x = layer(x, relative_position_embeddings=positions)
        return [*states, self.conformer.layer_norm(x)]


def read_backbone(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a MuQ checkpoint by `MuQBackbone`'s names; `prefix` ends in `model.`.

    What serves pre-training alone is left out: codebooks, the projection to them, the class token.
    """
    tensors = {k: v for k, v in read_tensors(path, prefix).items() if k.startswith(("conv.", "conformer."))}
    return {name: tensor for name, tensor in tensors.items() if "pos_conv_embed" not in name}


class MuQEmbeddingModel(AudioEmbeddingModel):
    """MuQ-MuLan's audio tower: mono at 24 kHz, 25 frames a second, 512 wide as published.

    A frame is the MuLan latent before its L2 norm. The published head is linear in the frames (projection,
    mean over time, projection): the normalised time mean of these frames is the published latent of the clip.

    `model` is a MuQ-MuLan checkpoint, `backbone` the MuQ checkpoint that it names in its config: of that one
    only `config.json` is read. Hub ids or folders. The weights come from `model` alone, the text tower is
    never read. Half precision gives NaN, so `precision="float16"` is TF32 on CUDA. Raises `UserError` for files
    that are no such checkpoint.
    """

    name = "muq"
    channels = 1

    def __init__(
        self,
        model: str | os.PathLike = ENCODERS["muq"].weights.id,
        backbone: str | os.PathLike | None = None,
        device: str = "auto",
        precision: str = "float32",
        revision: str | None = None,
    ):
        super().__init__(model, revision, device, precision)
        config, path = fetch_config(model, "config.json", revision)
        try:
            head = config["audio_transformer"]
            if head["tf_depth"] != 0:
                raise UserError(f"{path}: audio_transformer.tf_depth: expected 0, found {head['tf_depth']}")
            self.sample_rate = config["mulan"]["sr"]
            self.frame_dim = config["mulan"]["dim_latent"]
            self._layer = config["audio_model"]["use_layer_idx"]
            backbone = backbone or config["audio_model"]["name"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: not the config of a MuQ-MuLan model: no {error}") from error
        self._backbone = _build_backbone(backbone)
        width = self._backbone.conformer.config.hidden_size
        self._projection = nn.Linear(width, head["dim"])
        self._to_latents = nn.Linear(head["dim"], self.frame_dim)
        self._load(fetch_weights(model, revision))
        for part in (self._backbone, self._projection, self._to_latents):
            part.eval().requires_grad_(False).to(self.device)

    def _load(self, path: Path) -> None:
        if read_tensors(path, "mulan.audio.transformer."):
            raise UserError(f"{path}: expected an audio head without a transformer, found one")
        optional = ("conformer.embed_positions.inv_freq",)  # a constant, and built as such
        load_tensors(self._backbone, read_backbone(path, "mulan.audio.model.model."), path, optional)
        load_tensors(self._projection, read_tensors(path, "mulan.audio.proj."), path)
        load_tensors(self._to_latents, read_tensors(path, "mulan.audio_to_latents."), path)

    def _encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        return self._to_latents(self._projection(self._backbone(waveforms)[self._layer]))


def _build_backbone(backbone: str | os.PathLike) -> MuQBackbone:
    config, path = fetch_config(backbone, "config.json")
    try:
        return MuQBackbone(config)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: not the config of a MuQ model ({reason})") from error
