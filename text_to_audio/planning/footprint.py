"""Device memory of a training step, from the run's own code on fake tensors: no weights are read, nothing is computed.

The models are built from the text model's config.json, and one step runs through them on tensors that have shapes and
types but no data. These are CPU tensors whatever the device will be: CUDA's kernels want a device. A GPU differs in
what a kernel keeps to itself, and needs less for dropout, whose masks take a byte an element there and a float's bytes
on a CPU.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import batches_per_epoch
from text_to_audio.loading.captions import source_numbers
from text_to_audio.loading.step_data import StepData
from text_to_audio.loss.bank import AudioBank, bank_place
from text_to_audio.loss.objective import Candidates
from text_to_audio.loss.text_queue import TextQueue
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.pretrained import without_weights
from text_to_audio.model.temperature import Temperature
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.planning.tensor_memory import MemoryTracker, optimizer_tensors, tensors_of
from text_to_audio.processes import ALONE
from text_to_audio.training.optimisation import build_optimizer
from text_to_audio.training.step_models import SpaceModels, StepModels

PARTS = ("base", "LoRA", "heads", "optimizer", "activations", "logits", "bank")
TakeStep = Callable[[StepModels, StepData], Tensor]  # train.py's `train_step`


@dataclass(frozen=True)
class Footprint:
    """What one run holds: bytes of each of `PARTS` at the peak of a step, weights, bytes of its checkpoints.

    "LoRA" and "heads" are weights and their gradients; "logits" are the batch's recordings, the projected texts, the
    cosines and what the loss keeps; "activations" is all else that a step makes.
    """

    peak: dict[str, int]
    parameters: int
    trainable: int
    best_bytes: int
    last_bytes: int

    @property
    def total(self) -> int:
        """Bytes of all tensors at the peak."""
        return sum(self.peak.values())


@dataclass(frozen=True)
class Shape:
    """What the store says about the size of a step.

    dims: each space's width. dtype: of the stored vectors. source: (N,) a number per recording's source.
    caption_audio: (C,) each caption's recording.
    """

    dims: dict[str, int]
    dtype: torch.dtype
    source: np.ndarray
    caption_audio: np.ndarray

    @classmethod
    def of(cls, store: EmbeddingStore, encoders: tuple[str, ...]) -> "Shape":
        """That of a store's train split. `UserError` where it lacks a space."""
        dims, split = {name: store.dim(name) for name in encoders}, store.split("train")
        dtype = torch.float16 if store.header.dtype == "float16" else torch.float32
        return cls(dims, dtype, source_numbers(split), split.caption_audio)

    @property
    def caption_source(self) -> np.ndarray:
        """A number per caption's source, (C,)."""
        return self.source[self.caption_audio]


class FakeVectors:
    """Stands for `AudioVectors` under `FakeTensorMode`: rows of the right size, read from nowhere."""

    def __init__(self, shape: Shape, encoder: str):
        self.dim, self._dtype, self._count = shape.dims[encoder], shape.dtype, len(shape.source)

    def __len__(self) -> int:
        return self._count

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`."""
        return torch.empty(stop - start, self.dim, dtype=self._dtype)

    def __getitem__(self, rows: np.ndarray) -> torch.Tensor:
        return torch.empty(len(rows), self.dim, dtype=self._dtype)


def on_cpu(config: TrainingConfig) -> TrainingConfig:
    """The same run on CPU tensors: what follows from the device is written out."""
    return replace(
        config,
        device="cpu",
        precision="bf16" if config.bf16 else "fp32",
        compile="off",
        gradient_checkpointing="auto",
        recomputed_layers=config.layers_recomputed(sys.maxsize),
    )


def text_encoder_on_meta(config: TrainingConfig) -> TextEncoder:
    """The run's text encoder on torch's meta device, where tensors have no data; its weights are not read.

    `to_empty` under `FakeTensorMode` makes fake tensors of it. It cannot be put together there: PEFT moves modules
    between devices, which those of fake tensors do not bear.
    """
    config = replace(on_cpu(config), device="meta")
    with torch.device("meta"):
        return TextEncoder(config, without_weights(config))


def footprint(config: TrainingConfig, shape: Shape, take_step: TakeStep) -> Footprint:
    """Memory of a step in the middle of a run, when gradients and the optimizer's moments are there.

    take_step: the run's own step. Every micro-batch has `batch_size` texts of `max_length` tokens. `UserError` where
    the text model cannot be built.
    """
    on_meta = text_encoder_on_meta(config)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker:
        text_encoder = on_meta.to_empty(device="cpu").train()
        lora = [each for each in text_encoder.parameters() if each.requires_grad]
        tracker.tag("base", [each for each in tensors_of(text_encoder) if not each.requires_grad])
        tracker.tag("LoRA", lora)
        run = _fake_run(config, shape, text_encoder, tracker)
        modules = [module for space in run.spaces for module in (space.projection, space.temperature)]
        heads = [each for module in modules for each in tensors_of(module)]
        for name, tensors in (("LoRA", lora), ("heads", [each for each in heads if each.requires_grad])):
            with tracker.phase(name):
                for each in tensors:
                    each.grad = torch.zeros_like(each)
        run.optimizer.step()
        moments = optimizer_tensors(run.optimizer)
        tracker.tag("optimizer", moments)
        data = _fake_data(config, shape, tracker)
        take_step(run, data)
        run.optimizer.step()
        weights = sum(each.nbytes for each in (*lora, *heads))
        return Footprint(
            peak={part: tracker.at_peak.get(part, 0) for part in PARTS},
            parameters=sum(each.numel() for module in run.modules() for each in module.parameters()),
            trainable=sum(each.numel() for each in (*lora, *heads) if each.requires_grad),
            best_bytes=weights,
            last_bytes=weights + sum(each.nbytes for each in moments),
        )


@dataclass(kw_only=True)
class _TrackedSpace(SpaceModels):
    """A space whose head and loss are told apart from the text encoder's activations."""

    tracker: MemoryTracker

    def candidates(self, data: StepData, queue: TextQueue) -> Candidates:
        with self.tracker.phase("logits"):
            return super().candidates(data, queue)

    def loss(self, embeddings: Tensor, data: StepData, numbers: list[int], candidates: Candidates) -> Tensor:
        with self.tracker.phase("logits"):
            return super().loss(embeddings, data, numbers, candidates)


@dataclass(kw_only=True)
class _EncodesOnce(StepModels):
    """A run that encodes one micro-batch with a graph and one without; of the others embeddings are enough.

    They take as much as the first, one after the other, and at 36 layers each costs a second.
    """

    encoded: set[bool] = field(default_factory=set)

    def embed(self, data: StepData, number: int) -> Tensor:
        graph = torch.is_grad_enabled()
        if graph in self.encoded:
            return torch.empty(len(data.parts[number]), self.text_encoder.dim, requires_grad=graph)
        self.encoded.add(graph)
        return super().embed(data, number)


def _fake_run(config: TrainingConfig, shape: Shape, text_encoder: TextEncoder, tracker: MemoryTracker) -> StepModels:
    """What a step of the run works with: models, optimizer, a full queue."""
    spaces = []
    for name, dim in shape.dims.items():
        head = ProjectionHead(text_encoder.dim, config.hidden_dim, dim, config.head_dropout)
        temperature = Temperature(config.temperature, config.learn_temperature)
        tracker.tag("heads", tensors_of(head) + tensors_of(temperature))
        vectors = FakeVectors(shape, name)
        with tracker.phase("bank"):
            bank = _fake_bank(config, shape, vectors, head) if config.audio_negatives == "bank" else None
        own = replace(config, audio_encoder=name, audio_dim=dim)
        spaces.append(_TrackedSpace(config=own, projection=head, temperature=temperature, bank=bank, tracker=tracker))
    queue = TextQueue(config.text_queue, text_encoder.dim, torch.device("cpu"))
    if config.text_queue:
        with tracker.phase("logits"):
            queue.add(torch.empty(config.text_queue, text_encoder.dim), np.full(config.text_queue, -1))
    heads = [(space.projection, space.temperature) for space in spaces]
    return _EncodesOnce(
        config=config,
        processes=ALONE,
        text_encoder=text_encoder,
        spaces=spaces,
        queue=queue,
        optimizer=build_optimizer(on_cpu(config), text_encoder, heads),
    )


def _fake_bank(config: TrainingConfig, shape: Shape, vectors: FakeVectors, head: ProjectionHead) -> AudioBank:
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    nbytes, device = len(vectors) * vectors.dim * dtype.itemsize, config.torch_device
    if device.type == "cuda" and not torch.cuda.is_available():  # planned for a card that is not here
        place = "device" if nbytes <= config.memory_gb * 1e9 / 2 else "host"
    else:
        place = bank_place(nbytes, device)
    # a tile from pinned memory takes what a tile from the file takes, and only the device's memory counts
    return AudioBank(vectors, shape.source, head, dtype, "device" if place == "device" else "file")


def _fake_data(config: TrainingConfig, shape: Shape, tracker: MemoryTracker) -> StepData:
    """The largest batch, of the longest texts."""
    captions = np.arange(batch_captions(config, shape))
    parts = np.array_split(captions, -(-len(captions) // config.batch_size))
    tokens = {
        number: torch.ones(2, len(part), config.max_length, dtype=torch.int64) for number, part in enumerate(parts)
    }
    rows = shape.caption_audio[captions]
    with tracker.phase("logits"):
        vectors = {name: FakeVectors(shape, name)[rows] for name in shape.dims}
    return StepData(captions, rows, shape.caption_source[captions], parts, tokens, vectors, (0, 0))


def batch_captions(config: TrainingConfig, shape: Shape) -> int:
    """Captions of the largest batch: a source that has very many leaves fewer than the effective batch size."""
    return -(-len(shape.caption_source) // batches_per_epoch(shape.caption_source, config.effective_batch_size))
