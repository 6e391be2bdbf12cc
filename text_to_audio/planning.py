"""What a run will take, before it is started: steps, tokens, bytes, and device memory from the run's own code.

Nothing is computed and no weights are read. The models are built from the text model's config.json, and one step runs
through them on fake tensors, which have shapes and types but no data. These are CPU tensors whatever the device will
be: CUDA's kernels want a device. A GPU differs in what a kernel keeps to itself (the allowance), and needs less for
dropout, whose masks take a byte an element there and a float's bytes on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from text_to_audio.bank import AudioBank, bank_place
from text_to_audio.batching import (
    IN_MEMORY_BYTES,
    CaptionSet,
    TokenCache,
    batches_per_epoch,
    padding_share,
    plan_epoch,
    source_numbers,
)
from text_to_audio.config import TrainingConfig
from text_to_audio.gradient_caching import backward_by_part, backward_through_cache
from text_to_audio.losses import Temperature
from text_to_audio.memory import MemoryTracker, optimizer_tensors, tensors_of
from text_to_audio.negatives import Candidates, contrastive_objective
from text_to_audio.optimisation import build_optimizer, warmup_length
from text_to_audio.store import EmbeddingStore
from text_to_audio.text_model import ProjectionHead, TextEncoder, without_weights

PARTS = ("base", "LoRA", "heads", "optimizer", "activations", "logits", "bank")
# The CUDA context with its kernels (0.3 to 0.6 GiB by driver and card), cuBLAS's workspaces (8 MiB, 32 on Hopper), and
# what the caching allocator loses by rounding to its blocks. A round figure, not measured.
CUDA_ALLOWANCE = 1 << 30
CARDS = (16, 24, 32)  # 10^9 bytes; a card sold under such a number has that many at least
GIB = 1 << 30


@dataclass(frozen=True)
class Footprint:
    """What one run holds: bytes of each of `PARTS` at the peak of a step, weights, bytes of its checkpoints.

    "LoRA" and "heads" are weights and their gradients; "logits" are the batch's recordings, the cosines and what the
    loss keeps; "activations" is all else that a step makes.
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
class Plan:
    """What `--plan` reports. Bytes, unless it says otherwise; the cards' numbers are 10^9 bytes.

    tokens, padded_tokens: of an epoch, without and with padding. longest: tokens of the longest caption. read: an
    epoch's bytes from the store. kept: those read once, at the start. proposals: card -> (batch size, accumulation,
    bytes of tensors), None where one caption is too much.
    """

    config: TrainingConfig
    footprint: Footprint
    steps: int
    warmup_steps: int
    captions: int
    recordings: int
    tokens: int
    padded_tokens: int
    longest: int
    read: int
    kept: int
    allowance: int
    proposals: dict[int, tuple[int, int, int] | None]


@dataclass(frozen=True)
class Shape:
    """What the store says about the size of a step: widths of the space, bytes a number, a number per recording's
    source (N,), and one per caption's (C,)."""

    dim: int
    dtype: torch.dtype
    source: np.ndarray
    caption_source: np.ndarray

    @classmethod
    def of(cls, store: EmbeddingStore, encoder: str) -> "Shape":
        """That of a store's train split. `UserError` where it lacks the space."""
        split = store.split("train")
        source = source_numbers(split)
        dtype = torch.float16 if store.header.dtype == "float16" else torch.float32
        return cls(store.dim(encoder), dtype, source, source[split.caption_audio])


class FakeVectors:
    """Stands for `AudioVectors` under `FakeTensorMode`: rows of the right size, read from nowhere."""

    def __init__(self, shape: Shape):
        self.dim, self._dtype, self._count = shape.dim, shape.dtype, len(shape.source)

    def __len__(self) -> int:
        return self._count

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`."""
        return torch.empty(stop - start, self.dim, dtype=self._dtype)

    def __getitem__(self, rows: np.ndarray) -> torch.Tensor:
        return torch.empty(len(rows), self.dim, dtype=self._dtype)


def on_cpu(config: TrainingConfig) -> TrainingConfig:
    """The same run on CPU tensors: what follows from the device is written out."""
    precision = "bf16" if config.bf16 else "fp32"
    checkpointing = "on" if config.checkpoints_activations else "off"
    return replace(config, device="cpu", precision=precision, gradient_checkpointing=checkpointing)


def text_encoder_on_meta(config: TrainingConfig) -> TextEncoder:
    """The run's text encoder on torch's meta device, where tensors have no data; its weights are not read.

    `to_empty` under `FakeTensorMode` makes fake tensors of it. It cannot be put together there: PEFT moves modules
    between devices, which those of fake tensors do not bear.
    """
    config = replace(on_cpu(config), device="meta")
    with torch.device("meta"):
        return TextEncoder(config, without_weights(config))


def footprint(config: TrainingConfig, shape: Shape) -> Footprint:
    """Memory of a step in the middle of a run, when gradients and the optimizer's moments are there.

    Every micro-batch has `batch_size` texts of `max_length` tokens. `UserError` where the text model cannot be built.
    """
    on_meta = text_encoder_on_meta(config)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker:
        text_encoder = on_meta.to_empty(device="cpu").train()
        head = ProjectionHead(text_encoder.dim, config.hidden_dim, shape.dim, config.head_dropout)
        temperature = Temperature(config.temperature, config.learn_temperature)
        lora = [each for each in text_encoder.parameters() if each.requires_grad]
        tracker.tag("base", [each for each in tensors_of(text_encoder) if not each.requires_grad])
        tracker.tag("LoRA", lora)
        tracker.tag("heads", tensors_of(head) + tensors_of(temperature))
        bank = None
        if config.audio_negatives == "bank":
            with tracker.phase("bank"):
                bank = _fake_bank(config, shape, head)
        optimizer = build_optimizer(config, text_encoder, head, temperature)
        for name, parameters in (("LoRA", lora), ("heads", [*head.parameters(), *temperature.parameters()])):
            with tracker.phase(name):
                for each in parameters:
                    each.grad = torch.zeros_like(each) if each.requires_grad else None
        optimizer.step()
        tracker.tag("optimizer", optimizer_tensors(optimizer))
        _gradients(config, shape, text_encoder, head, temperature, bank, tracker)
        optimizer.step()
        trained = sum(each.nbytes for each in [*lora, *head.parameters(), *head.buffers()])
        return Footprint(
            peak={part: tracker.at_peak.get(part, 0) for part in PARTS},
            parameters=sum(each.numel() for each in [*text_encoder.parameters(), *head.parameters()]),
            trainable=sum(each.numel() for each in [*lora, *head.parameters()]),
            best_bytes=trained,
            last_bytes=trained + sum(each.nbytes for each in optimizer_tensors(optimizer)),
        )


def peak_memory(config: TrainingConfig, shape: Shape) -> dict[str, int]:
    """Bytes of tensors at the peak of a step, by `PARTS`; see `footprint`."""
    return footprint(config, shape).peak


def _fake_bank(config: TrainingConfig, shape: Shape, head: ProjectionHead) -> AudioBank:
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    place = bank_place(len(shape.source) * shape.dim * dtype.itemsize, config.torch_device)
    # a tile from pinned memory takes what a tile from the file takes, and only the device's memory counts
    return AudioBank(FakeVectors(shape), shape.source, head, dtype, "device" if place == "device" else "file")


def _gradients(config, shape, text_encoder, head, temperature, bank, tracker) -> None:
    """What train.py's `train_step` does, with the micro-batches' token ids made up."""
    captions = batch_captions(config, shape)
    parts = np.array_split(np.arange(captions), -(-captions // config.batch_size))
    rows = np.arange(captions) % len(shape.source)
    done = set()

    def embed(number: int) -> torch.Tensor:
        kind = torch.is_grad_enabled()
        if kind in done:  # the others take as much as the first; their text vectors are enough
            return head.project_text(torch.empty(len(parts[number]), text_encoder.dim))
        done.add(kind)
        ids = torch.zeros(len(parts[number]), config.max_length, dtype=torch.int64)
        return head.project_text(text_encoder.encode(ids, torch.ones_like(ids)))

    def loss_of(text: torch.Tensor, of: list[np.ndarray]) -> torch.Tensor:
        with tracker.phase("logits"):
            return contrastive_objective(text, of, candidates, temperature(), config)

    with tracker.phase("logits"):
        candidates = Candidates(head.standardise_audio(FakeVectors(shape)[rows]), rows, bank)
    backward = backward_through_cache if config.text_negatives == "batch" else backward_by_part
    backward(embed, loss_of, parts)


def batch_captions(config: TrainingConfig, shape: Shape) -> int:
    """Captions of the largest batch: a source that has very many leaves fewer than the effective batch size."""
    return -(-len(shape.caption_source) // batches_per_epoch(shape.caption_source, config.effective_batch_size))


def make_plan(config: TrainingConfig) -> Plan:
    """The plan of a run. Nothing is written; of the text model only its small files are fetched.

    Raises `UserError` for a store that is not there or lacks the space, and for a text model without config.json.
    """
    store = EmbeddingStore(config.data_path)
    shape = Shape.of(store, config.audio_encoder)
    captions = CaptionSet.of(store.split("train"))
    tokens = TokenCache(text_encoder_on_meta(config), captions.captions)
    batches = plan_epoch(captions.caption_source, config.effective_batch_size, config.seed, epoch=1)
    share = padding_share(batches, tokens.lengths, config.batch_size)
    steps = config.epochs * len(batches)
    whole = len(shape.source) * shape.dim * shape.dtype.itemsize
    held = whole <= IN_MEMORY_BYTES
    measured = footprint(config, shape)
    allowance = CUDA_ALLOWANCE
    return Plan(
        config=config,
        footprint=measured,
        steps=steps,
        warmup_steps=warmup_length(config, steps),
        captions=len(captions),
        recordings=len(shape.source),
        tokens=int(tokens.lengths.sum()),
        padded_tokens=round(int(tokens.lengths.sum()) / (1 - share)),
        longest=int(tokens.lengths.max()),
        read=0 if held else len(captions) * shape.dim * shape.dtype.itemsize,
        kept=whole if held else 0,
        allowance=allowance,
        proposals=propose(config, lambda each: footprint(each, shape).total, measured.total),
    )


def smaller_batches(config: TrainingConfig) -> list[TrainingConfig]:
    """The run with its batch size halved once, twice and so on, and accumulation doubled as often."""
    found = []
    while config.batch_size % 2 == 0:
        config = replace(
            config,
            batch_size=config.batch_size // 2,
            gradient_accumulation_steps=config.gradient_accumulation_steps * 2,
        )
        found.append(config)
    return found


def propose(
    config: TrainingConfig, measure: Callable[[TrainingConfig], int], total: int, cards: tuple[int, ...] = CARDS
) -> dict[int, tuple[int, int, int] | None]:
    """For each card the largest batch size with which tensors and allowance fit, the effective batch kept.

    measure: bytes of tensors under a config; total: under `config`. The bytes go up linearly with the batch size but
    for small steps, so that sizes which are far too large are passed over without measuring.
    """
    known = {config.batch_size: total}
    proposals: dict[int, tuple[int, int, int] | None] = {}
    for card in cards:
        room = card * 10**9 - CUDA_ALLOWANCE
        proposals[card] = None
        for each in [config, *smaller_batches(config)]:
            size = each.batch_size
            if size not in known and _extrapolated(known, size) > 1.1 * room:
                continue
            if size not in known:
                known[size] = measure(each)
            if known[size] <= room:
                proposals[card] = size, each.gradient_accumulation_steps, known[size]
                break
    return proposals


def _extrapolated(known: dict[int, int], size: int) -> float:
    """Bytes at a batch size from the line through the two smallest known ones; 0 where there is one only."""
    if len(known) < 2:
        return 0.0
    (low, low_bytes), (high, high_bytes) = sorted(known.items())[:2]
    return low_bytes + (size - low) * (high_bytes - low_bytes) / (high - low)


def advice(config: TrainingConfig, free: int | None = None) -> str:
    """The line a run ends with that went out of memory: settings that take less, as far as one can say.

    free: bytes of the device, where known; the batch size that fits them is named, else half of it.
    """
    shape = Shape.of(EmbeddingStore(config.data_path), config.audio_encoder)
    options = smaller_batches(config)
    if not options:
        return _without_smaller(config)
    totals = {}
    for each in options:
        totals[each.batch_size] = footprint(each, shape).total + CUDA_ALLOWANCE
        if free is None or totals[each.batch_size] <= free:
            return (
                f"out of memory: batches of {config.batch_size} texts did not fit; try --batch-size {each.batch_size} "
                f"--gradient-accumulation-steps {each.gradient_accumulation_steps} (about "
                f"{totals[each.batch_size] / GIB:.1f} GiB, the effective batch stays {config.effective_batch_size})"
            )
    return _without_smaller(config)


def _without_smaller(config: TrainingConfig) -> str:
    instead = "a smaller text model or --hidden-dim, or another space"
    if not config.checkpoints_activations:
        instead = "--gradient-checkpointing on"
    elif config.max_length > 64:
        instead = f"--max-length {config.max_length // 2}, or {instead}"
    return f"out of memory: no smaller batch size fits; try {instead}"


def plan_text(plan: Plan) -> str:
    """The plan as aligned lines."""
    config, measured, share = plan.config, plan.footprint, 1 - plan.tokens / plan.padded_tokens
    kept = f"; {_size(plan.kept)} once, then kept in memory" if plan.kept else ""
    lines = [
        ("run", f"{config.audio_encoder}, {config.text_model}"),
        ("arithmetic", f"{'bf16' if config.bf16 else 'fp32'}, checkpointing {_on(config)}, {config.torch_device}"),
        ("parameters", f"{measured.parameters:,}"),
        ("trainable", f"{measured.trainable:,} ({measured.trainable / measured.parameters:.2%})"),
        ("data", f"{plan.captions:,} captions of {plan.recordings:,} recordings"),
        ("steps", f"{plan.steps:,} in {config.epochs} epochs, {config.effective_batch_size} captions each at most"),
        ("warm-up", f"{plan.warmup_steps:,} steps ({plan.warmup_steps / plan.steps:.1%})"),
        ("tokens an epoch", f"{plan.padded_tokens:,}, {share:.1%} of them padding; longest caption {plan.longest}"),
        ("read an epoch", _size(plan.read) + kept),
        ("checkpoints", f"best {_size(measured.best_bytes)} (two of them), last {_size(measured.last_bytes)} (two)"),
        ("", ""),
        (f"peak memory at {config.batch_size} texts of {config.max_length} tokens", ""),
    ]
    lines += [(f"  {part}", f"{size / GIB:7.2f} GiB") for part, size in measured.peak.items()]
    lines += [
        ("  tensors", f"{measured.total / GIB:7.2f} GiB"),
        ("  CUDA allowance", f"{plan.allowance / GIB:7.2f} GiB (context, kernels, workspaces; on a CPU none)"),
        ("", ""),
    ]
    lines += [(f"fits {card} GB", _proposal(config, found)) for card, found in plan.proposals.items()]
    return "\n".join(f"{name:<18} {value}".rstrip() for name, value in lines)


def _proposal(config: TrainingConfig, found: tuple[int, int, int] | None) -> str:
    if found is None:
        hint = "" if config.checkpoints_activations else "; try --gradient-checkpointing on"
        return f"no, at no batch size{hint}"
    size, accumulation, total = found
    if size == config.batch_size:
        return "yes"
    return f"with --batch-size {size} --gradient-accumulation-steps {accumulation} ({total / GIB:.2f} GiB of tensors)"


def _on(config: TrainingConfig) -> str:
    return "on" if config.checkpoints_activations else "off"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
