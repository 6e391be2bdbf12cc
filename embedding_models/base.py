"""What the three audio encoders share: devices, checks, precision, and a track as the mean of its windows."""

import os
from typing import BinaryIO

import numpy as np
import torch

from common.errors import UserError
from embedding_models.audio import MIN_SECONDS, AudioError, AudioFormat, stacked, track_windows
from embedding_models.averaging import WindowMean
from embedding_models.enrichment import enrich

_WINDOWS_AT_ONCE = 4  # of a long track in `embed_file`

Waveforms = torch.Tensor | np.ndarray


class AudioEmbeddingModel:
    """A frozen audio encoder whose frames are enriched into one vector per window.

    A subclass loads its weights, sets the attributes below and defines `_encode`.
    """

    name: str  # the audio space, as in the registry
    channels: int  # 1 (mono) or 2 (stereo)
    half_precision = False  # whether float16 is safe enough to be tried on CUDA

    sample_rate: int  # samples per second
    frame_dim: int  # width of a frame

    def __init__(self, model: str | os.PathLike, revision: str | None, device: str, precision: str):
        if precision not in ("float32", "float16"):
            raise UserError(f'precision: expected "float32" or "float16", found {precision!r}')
        self.model = str(model)
        self.revision = revision
        self.device = choose_device(device)
        use_half = precision == "float16" and self.half_precision and self.device.type == "cuda"
        self.precision = "float16" if use_half else "float32"

    @property
    def format(self) -> AudioFormat:
        """The sample rate and channels of the waveforms this encoder takes."""
        return AudioFormat(self.sample_rate, self.channels)

    @property
    def dim(self) -> int:
        """Width of an enriched vector: three blocks of `frame_dim`."""
        return 3 * self.frame_dim

    def _encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Encode float32 waveforms on the encoder's device to frames (batch, frames, frame_dim)."""
        raise NotImplementedError

    @torch.no_grad()
    def frames(self, waveforms: Waveforms) -> torch.Tensor:
        """Encode windows of equal length to float32 frames (batch, frames, frame_dim) on `device`.

        `waveforms` is (batch, samples) for a mono encoder and (batch, 2, samples) for a stereo one, at
        `sample_rate`, on any device; not checked for length or finiteness (`embed_windows` does).
        """
        waveforms = torch.as_tensor(waveforms).to(self.device, torch.float32)
        expected = "(batch, samples)" if self.channels == 1 else "(batch, 2, samples)"
        if waveforms.ndim != 1 + self.channels or (self.channels == 2 and waveforms.shape[1] != 2):
            raise ValueError(f"{self.name}: expected waveforms {expected}, found {tuple(waveforms.shape)}")
        with torch.autocast(self.device.type, torch.float16, enabled=self.precision == "float16"):
            return self._encode(waveforms).float()

    @torch.no_grad()
    def embed_windows(self, waveforms: Waveforms) -> torch.Tensor:
        """Encode and enrich windows of equal length, shaped as for `frames`, to (batch, dim) float32, CPU.

        A half-precision result that is not finite is computed again in float32. Raises `AudioError` for
        windows under 0.5 s and for input or output that is not finite.
        """
        waveforms = torch.as_tensor(waveforms)
        seconds = waveforms.shape[-1] / self.sample_rate
        if seconds < MIN_SECONDS:
            expected = f"expected {MIN_SECONDS} or more"
            raise AudioError("too short", f"{self.name}: {seconds:.3f} s of audio, {expected}")
        if not torch.isfinite(waveforms).all():
            raise AudioError("not finite", f"{self.name}: input samples that are not finite")
        vectors = enrich(self.frames(waveforms))
        if self.precision == "float16" and not torch.isfinite(vectors).all():
            vectors = self._embed_in_float32(waveforms)
        if not torch.isfinite(vectors).all():
            raise AudioError("not finite", f"{self.name}: the encoder's output is not finite")
        return vectors.cpu()

    def _embed_in_float32(self, waveforms: Waveforms) -> torch.Tensor:
        self.precision = "float32"
        try:
            return enrich(self.frames(waveforms))
        finally:
            self.precision = "float16"

    def embed_file(self, file: str | os.PathLike | BinaryIO) -> np.ndarray:
        """Embed an audio file (a path or a binary file object) to (dim,) float32: the mean over its windows.

        Raises `AudioError` where the file cannot be read as audio or one of its windows cannot be embedded.
        """
        mean, waiting = WindowMean(), []
        for window in track_windows(file, [self.format]):
            waiting.append(window[self.format])
            if len(waiting) == _WINDOWS_AT_ONCE:
                mean.add(self.embed_windows(stacked(waiting)).numpy())
                waiting = []
        if waiting:
            mean.add(self.embed_windows(stacked(waiting)).numpy())
        return mean.mean()


def choose_device(device: str) -> torch.device:
    """Return the device of a name; "auto" is CUDA where there is one. Raises `UserError` for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f'device: expected "auto", "cpu", "cuda" or "cuda:N", found {device!r}') from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f'device: {device!r} was asked for, but torch sees no CUDA device; use "cpu"')
    return chosen
