"""MusiCNN as a frozen encoder: the outputs of its front end and mid-end side by side, 62.5 frames a second.

Its weights come in the PyPI package `musicnn` (ISC licence), whose own code needs TensorFlow; here they run in torch.
"""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import librosa
import torch
from torch import nn

from common.errors import UserError
from embedding_models.base import AudioEmbeddingModel, Waveforms
from embedding_models.musicnn.network import BANDS, LOUDEST, MusiCNN, expected_shapes
from embedding_models.musicnn.tags import TAGS
from embedding_models.musicnn.tensor_bundle import read_tensor_bundle
from embedding_models.weights import Tensors, read_json

PUBLISHED = ("MSD_musicnn", "MTT_musicnn")  # folders of the package with such a network
_PACKAGE = "musicnn"
_INSTALL = "pip install --no-deps musicnn==0.1.0"
_SAMPLE_RATE, _N_FFT, _HOP = 16_000, 512, 256


class LogMel(nn.Module):
    """The mel spectrogram of `librosa.feature.melspectrogram`, in float16 as in training, then log10(10,000 x + 1)."""

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        filters = librosa.filters.mel(sr=_SAMPLE_RATE, n_fft=_N_FFT, n_mels=BANDS)
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
        power = self.power(waveforms).clamp_(max=LOUDEST).half().float()
        return torch.log10(10_000 * power + 1)


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
    expected = {"resample_sr": _SAMPLE_RATE, "hop": _HOP, "n_fft": _N_FFT, "n_mels": BANDS, "spectrogram_type": "mel"}
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
    for name, shape in expected_shapes(tensors, tags).items():
        found = tuple(tensors[name].shape) if name in tensors else "none"
        if found != shape:
            raise UserError(f"{path}: not the weights of MusiCNN: {name}: expected shape {shape}, found {found}")
