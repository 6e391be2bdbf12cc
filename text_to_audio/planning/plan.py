"""What a run will take, before it is started: steps, tokens, bytes, device memory, and what fits which card."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from common.errors import UserError
from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import padding_share, plan_epoch
from text_to_audio.loading.captions import CaptionSet
from text_to_audio.loading.tokens import TokenCache
from text_to_audio.loading.vectors import IN_MEMORY_BYTES
from text_to_audio.planning.footprint import Footprint, Shape, TakeStep, footprint, text_encoder_on_meta
from text_to_audio.training.optimisation import warmup_length

# The CUDA context with its kernels (0.3 to 0.6 GiB by driver and card), cuBLAS's workspaces (8 MiB, 32 on Hopper), and
# what the caching allocator loses by rounding to its blocks. A round figure, not measured.
CUDA_ALLOWANCE = 1 << 30
CARDS = (16, 24, 32)  # 10^9 bytes; a card sold under such a number has that many at least
GIB = 1 << 30


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


def make_plan(config: TrainingConfig, take_step: TakeStep) -> Plan:
    """The plan of a run whose step is `take_step`. Nothing is written; of the text model only small files are fetched.

    Raises `UserError` for a store that is not there or lacks the space, and for a text model without config.json.
    """
    store = EmbeddingStore(config.data_path)
    shape = Shape.of(store, config.audio_encoders)
    captions = CaptionSet.of(store.split("train"))
    tokens = TokenCache(text_encoder_on_meta(config), captions.captions)
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
        proposals=propose(config, lambda each: footprint(each, shape, take_step).total, measured.total),
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


def advice(config: TrainingConfig, take_step: TakeStep, free: int | None = None) -> str:
    """The line a run ends with that went out of memory: settings that take less, as far as one can say.

    free: bytes of the device, where known; the batch size that fits them is named, else half of it.
    """
    shape = Shape.of(EmbeddingStore(config.data_path), config.audio_encoders)
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
    if not config.layers_recomputed(1):
        instead = "--gradient-checkpointing on"
    elif config.max_length > 64:
        instead = f"--max-length {config.max_length // 2}, or {instead}"
    return f"out of memory: no smaller batch size fits; try {instead}"


def plan_text(plan: Plan) -> str:
    """The plan as aligned lines."""
    config, measured, share = plan.config, plan.footprint, 1 - plan.tokens / plan.padded_tokens
    kept = f"; {_size(plan.kept)} once, then kept in memory" if plan.kept else ""
    lines = [
        ("run", f"{', '.join(config.audio_encoders)}; {config.text_model}"),
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
        hint = "" if config.layers_recomputed(1) else "; try --gradient-checkpointing on"
        return f"no, at no batch size{hint}"
    size, accumulation, total = found
    if size == config.batch_size:
        return "yes"
    return f"with --batch-size {size} --gradient-accumulation-steps {accumulation} ({total / GIB:.2f} GiB of tensors)"


def _on(config: TrainingConfig) -> str:
    return "on" if config.layers_recomputed(1) else "off"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
