"""What a run will take, before it is started: steps, tokens, bytes, device memory, and what fits which card."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from common.errors import UserError
from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import padding_share, plan_epoch
from text_to_audio.loading.captions import CaptionSet
from text_to_audio.loading.tokens import TokenCache
from text_to_audio.loading.vectors import IN_MEMORY_BYTES
from text_to_audio.planning.choosing import CUDA_ALLOWANCE, Measure, fewest_layers, tensor_room
from text_to_audio.planning.footprint import Footprint, Shape, TakeStep, footprint, text_encoder_on_meta
from text_to_audio.training.optimisation import warmup_length

CARDS = (16, 24, 32)  # 10^9 bytes; a card sold under such a number has that many at least
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What `--plan` reports. Bytes, unless it says otherwise; the cards' numbers are 10^9 bytes.

    tokens, padded_tokens: of an epoch, without and with padding. longest: tokens of the longest caption. read: an
    epoch's bytes from the store. kept: those read once, at the start. layers: of the text encoder. proposals: card ->
    what fits it, None where one caption is too much.
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
    layers: int
    proposals: "dict[int, Proposal | None]"


class Proposal(NamedTuple):
    """A way to fit a card: captions in a pass, passes a step, layers that are recomputed, bytes of tensors."""

    batch_size: int
    accumulation: int
    recomputed: int
    total: int


def make_plan(config: TrainingConfig, take_step: TakeStep) -> Plan:
    """The plan of a run whose step is `take_step`. Nothing is written; of the text model only small files are fetched.

    Raises `UserError` for a store that is not there or lacks the space, and for a text model without config.json.
    """
    store = EmbeddingStore(config.data_path)
    shape = Shape.of(store, config.audio_encoders)
    captions = CaptionSet.of(store.split("train"))
    text_encoder = text_encoder_on_meta(config)
    tokens, layers = TokenCache(text_encoder, captions.captions), text_encoder.layers
    batches = plan_epoch(captions.caption_source, config.effective_batch_size, config.seed, epoch=1)
    share = padding_share(batches, tokens.lengths, config.batch_size)
    steps = config.epochs * len(batches)
    rows = [dim * shape.dtype.itemsize for dim in shape.dims.values()]
    held = [len(shape.source) * row <= IN_MEMORY_BYTES for row in rows]
    measured = footprint(config, shape, take_step)
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
        read=sum(len(captions) * row for row, kept in zip(rows, held, strict=True) if not kept),
        kept=sum(len(shape.source) * row for row, kept in zip(rows, held, strict=True) if kept),
        allowance=CUDA_ALLOWANCE,
        layers=layers,
        proposals=propose(config, lambda each: footprint(each, shape, take_step).total, layers),
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
    config: TrainingConfig, measure: Measure, layers: int, cards: tuple[int, ...] = CARDS
) -> dict[int, Proposal | None]:
    """For each card the largest batch size with which tensors and allowance fit, the effective batch kept.

    Where recomputing is left to auto, the fewest of the text encoder's `layers` are recomputed that make it fit. The
    bytes go up linearly with the batch size but for small steps, so that sizes which are far too large are passed over
    without measuring.
    """
    measure, auto = _remembering(measure), config.gradient_checkpointing == "auto"
    smallest = replace(config, recomputed_layers=layers) if auto else config
    known: dict[int, int] = {}
    proposals: dict[int, Proposal | None] = {}
    for card in cards:
        room = tensor_room(card)
        proposals[card] = None
        for each in [smallest, *smaller_batches(smallest)]:
            size = each.batch_size
            if size not in known and _extrapolated(known, size) > 1.1 * room:
                continue
            known[size] = measure(each)
            if known[size] <= room:
                fewest = fewest_layers(each, measure, layers, room) if auto else None
                recomputed = config.layers_recomputed(layers) if fewest is None else fewest
                total = known[size] if fewest is None else measure(replace(each, recomputed_layers=fewest))
                proposals[card] = Proposal(size, each.gradient_accumulation_steps, recomputed, total)
                break
    return proposals


def _remembering(measure: Measure) -> Measure:
    """The same, each run measured once."""
    known: dict[tuple[int, int], int] = {}

    def remembered(config: TrainingConfig) -> int:
        key = config.batch_size, config.recomputed_layers
        if key not in known:
            known[key] = measure(config)
        return known[key]

    return remembered


def _extrapolated(known: dict[int, int], size: int) -> float:
    """Bytes at a batch size from the line through the two smallest known ones; 0 where there is one only."""
    if len(known) < 2:
        return 0.0
    (low, low_bytes), (high, high_bytes) = sorted(known.items())[:2]
    return low_bytes + (size - low) * (high_bytes - low_bytes) / (high - low)


def advice(config: TrainingConfig, take_step: TakeStep, free: int | None = None) -> str:
    """The line a run ends with that went out of memory: settings that take less, as far as one can say.

    free: bytes of the device, where known; the batch size that fits them is named, else half of it.
    """
    shape = Shape.of(EmbeddingStore(config.data_path), config.audio_encoders)
    every_layer = replace(config, gradient_checkpointing="on")
    if free is not None and config != every_layer:
        total = footprint(every_layer, shape, take_step).total + CUDA_ALLOWANCE
        if total <= free:
            return f"out of memory: try --gradient-checkpointing on (about {total / GIB:.1f} GiB)"
    options = smaller_batches(config)
    if not options:
        return _without_smaller(config)
    totals = {}
    for each in options:
        totals[each.batch_size] = footprint(each, shape, take_step).total + CUDA_ALLOWANCE
        if free is None or totals[each.batch_size] <= free:
            return (
                f"out of memory: batches of {config.batch_size} texts did not fit; try --batch-size {each.batch_size} "
                f"--gradient-accumulation-steps {each.gradient_accumulation_steps} (about "
                f"{totals[each.batch_size] / GIB:.1f} GiB, the effective batch stays {config.effective_batch_size})"
            )
    return _without_smaller(config)


@contextmanager
def advice_when_out_of_memory(config: TrainingConfig, take_step: TakeStep) -> Iterator[None]:
    """Turn running out of memory, on a GPU or a CPU, into a `UserError` with advice. Checkpoints stay as they are."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
        on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        error.__traceback__ = None  # its frames hold the step's tensors
        free = torch.cuda.get_device_properties(config.torch_device).total_memory if not on_cpu else None
        raise UserError(advice(config, take_step, free)) from None


def _without_smaller(config: TrainingConfig) -> str:
    instead = "a smaller text model or --hidden-dim, or another space"
    if config.gradient_checkpointing != "on" and not config.layers_recomputed(1):
        instead = "--gradient-checkpointing on"
    elif config.max_length > 64:
        instead = f"--max-length {config.max_length // 2}, or {instead}"
    return f"out of memory: no smaller batch size fits; try {instead}"


def plan_text(plan: Plan) -> str:
    """The plan as aligned lines."""
    config, measured, share = plan.config, plan.footprint, 1 - plan.tokens / plan.padded_tokens
    recomputed, device = config.layers_recomputed(plan.layers), config.torch_device
    kept = f"; {_size(plan.kept)} once, then kept in memory" if plan.kept else ""
    lines = [
        ("run", f"{', '.join(config.audio_encoders)}; {config.text_model}"),
        ("arithmetic", f"{'bf16' if config.bf16 else 'fp32'}, {_recomputed(recomputed, plan.layers)}, {device}"),
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
    lines += [(f"fits {card} GB", _proposal(plan, card)) for card in plan.proposals]
    return "\n".join(f"{name:<18} {value}".rstrip() for name, value in lines)


def _proposal(plan: Plan, card: int) -> str:
    found, config = plan.proposals[card], plan.config
    if found is None:
        hint = "; try --gradient-checkpointing on" if config.gradient_checkpointing == "off" else ""
        return f"no, at no batch size{hint}"
    auto = f", {_recomputed(found.recomputed, plan.layers)}" if config.gradient_checkpointing == "auto" else ""
    if found.batch_size == config.batch_size:
        return f"yes{auto}"
    size = f"--batch-size {found.batch_size} --gradient-accumulation-steps {found.accumulation}"
    return f"with {size} ({found.total / GIB:.2f} GiB of tensors){auto}"


def _recomputed(layers: int, of: int) -> str:
    return f"{layers} of {of} layers recomputed"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
