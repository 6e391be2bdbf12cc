"""What the three audio encoders share: devices, checks, precision, and a track as the mean of its windows."""

import copy
import hashlib
import os
import time
from typing import BinaryIO, TypeVar, cast

import numpy as np
import torch
from torch import nn

from common.device import choose_device
from embedding_models.audio import MIN_SECONDS, AudioError, AudioFormat, stacked, track_windows
from embedding_models.averaging import WindowMean
from embedding_models.enrichment import enrich
from embedding_models.precision import check_precision, float32_products, precision_on

_WINDOWS_AT_ONCE = 4  # of a long track in `embed_file`

Waveforms = torch.Tensor | np.ndarray
Network = TypeVar("Network", bound=nn.Module)


class AudioEmbeddingModel:
    """A frozen audio encoder whose frames are enriched into one vector per window.

    A subclass loads its weights, sets the attributes below and defines `_encode`.

    `precision` is what was asked for: "float32"; "tf32", float32 whose products CUDA rounds to 10 bits of mantissa;
    "float16", half precision on CUDA where the network bears it (`half_precision`), else TF32. The attribute of that
    name says what it came to on this device.
    """

    name: str  # the audio space, as in the registry
    channels: int  # 1 (mono) or 2 (stereo)
    half_precision = False  # whether float16 is safe enough to be tried on CUDA

    sample_rate: int  # samples per second
    frame_dim: int  # width of a frame

    def __init__(self, model: str | os.PathLike, revision: str | None, device: str, precision: str):
        check_precision(precision)
        self.model = str(model)
        self.revision = revision
        self.device = choose_device(device)
        self.precision = precision_on(self.device, precision, self.half_precision)
        self._halves: dict[int, nn.Module] = {}  # by the id of the network in float32

    @property
    def format(self) -> AudioFormat:
        """The sample rate and channels of the waveforms this encoder takes."""
        return AudioFormat(self.sample_rate, self.channels)

    @property
    def dim(self) -> int:
        """Width of an enriched vector: three blocks of `frame_dim`."""
        return 3 * self.frame_dim

    def weights_digest(self) -> str:
        """BLAKE2b (16 bytes, in hex) of the parameters and buffers of its networks, by their names.

        What computes its vectors, wherever its files were; a second for MERT.
        """
        digest = hashlib.blake2b(digest_size=16)
        networks = {name: value for name, value in vars(self).items() if isinstance(value, nn.Module)}
        for name, network in sorted(networks.items()):
            for key, tensor in sorted(network.state_dict().items()):
                values = tensor.detach().cpu().contiguous()
                digest.update(f"{name} {key} {values.dtype} {tuple(values.shape)}\n".encode())
                digest.update(values.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def runs_ahead(self) -> bool:
        """Whether `begin` returns while the device still computes."""
        return self.device.type == "cuda"

    def _encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Encode float32 waveforms on the encoder's device to frames (batch, frames, frame_dim) of any float type."""
        raise NotImplementedError

    def _in_precision(self, network: Network) -> Network:
        """A network with the weights of `precision`: itself, or its copy in half precision, made once."""
        if self.precision != "float16":
            return network
        if id(network) not in self._halves:
            self._halves[id(network)] = copy.deepcopy(network).half()
        return cast(Network, self._halves[id(network)])

    def _frames(self, waveforms: torch.Tensor) -> torch.Tensor:
        expected = "(batch, samples)" if self.channels == 1 else "(batch, 2, samples)"
        if waveforms.ndim != 1 + self.channels or (self.channels == 2 and waveforms.shape[1] != 2):
            raise ValueError(f"{self.name}: expected waveforms {expected}, found {tuple(waveforms.shape)}")
        return self._encode(waveforms)

    def to_device(self, waveforms: Waveforms) -> torch.Tensor:
        """Waveforms in float32 on the encoder's device; from pinned memory without waiting for the copy."""
        return torch.as_tensor(waveforms).to(self.device, torch.float32, non_blocking=True)

    @torch.no_grad()
    def frames(self, waveforms: Waveforms) -> torch.Tensor:
        """Encode windows of equal length to float32 frames (batch, frames, frame_dim) on `device`.

        `waveforms` is (batch, samples) for a mono encoder and (batch, 2, samples) for a stereo one, at
        `sample_rate`, on any device; not checked for length or finiteness (`embed_windows` does).
        """
        with float32_products(self.device, self.precision != "float32"):
            return self._frames(self.to_device(waveforms)).float()

    @torch.no_grad()
    def _vectors(self, waveforms: torch.Tensor) -> torch.Tensor:
        with float32_products(self.device, self.precision != "float32"):
            return enrich(self._frames(waveforms))

    def begin(self, waveforms: Waveforms) -> "Embedding":
        """Start to embed windows, as `embed_windows` does; on CUDA this does not wait for the result.

        Raises `AudioError` for windows under 0.5 s; what else may be wrong is raised where the vectors are taken.
        """
        seconds = waveforms.shape[-1] / self.sample_rate
        if seconds < MIN_SECONDS:
            expected = f"expected {MIN_SECONDS} or more"
            raise AudioError("too short", f"{self.name}: {seconds:.3f} s of audio, {expected}")
        return Embedding(self, self.to_device(waveforms))

    def embed_windows(self, waveforms: Waveforms) -> torch.Tensor:
        """Encode and enrich windows of equal length, shaped as for `frames`, to (batch, dim) float32, CPU.

        A result of lower precision that is not finite is computed again in float32. Raises `AudioError` for
        windows under 0.5 s and for input or output that is not finite.
        """
        return self.begin(waveforms).vectors()

    def _embed_in_float32(self, waveforms: torch.Tensor) -> torch.Tensor:
        lower, self.precision = self.precision, "float32"
        try:
            return self._vectors(waveforms).cpu()
        finally:
            self.precision = lower

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


class Embedding:
    """Vectors on their way from the device: what `AudioEmbeddingModel.begin` started."""

    def __init__(self, encoder: AudioEmbeddingModel, waveforms: torch.Tensor):
        self._encoder, self._waveforms = encoder, waveforms
        self._started = _now(encoder.device)
        vectors = encoder._vectors(waveforms)
        self._vectors = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=encoder.device.type == "cuda")
        self._vectors.copy_(vectors, non_blocking=True)
        self._ended = _now(encoder.device)

    def vectors(self) -> torch.Tensor:
        """Wait for the vectors, (batch, dim) float32 on the CPU; see `AudioEmbeddingModel.embed_windows`."""
        if isinstance(self._ended, torch.cuda.Event):
            self._ended.synchronize()
        name, vectors = self._encoder.name, self._vectors
        if torch.isfinite(vectors).all():
            return vectors
        if not torch.isfinite(self._waveforms).all():
            raise AudioError("not finite", f"{name}: input samples that are not finite")
        if self._encoder.precision != "float32":
            vectors = self._encoder._embed_in_float32(self._waveforms)
        if not torch.isfinite(vectors).all():
            raise AudioError("not finite", f"{name}: the encoder's output is not finite")
        return vectors

    @property
    def seconds(self) -> float:
        """Seconds the device took; known once the vectors are there."""
        started, ended = self._started, self._ended
        if isinstance(started, float) or isinstance(ended, float):
            return cast(float, ended) - cast(float, started)
        return started.elapsed_time(ended) / 1000


def _now(device: torch.device) -> "torch.cuda.Event | float":
    """The present moment of a device: a CUDA event in its queue, or the time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
