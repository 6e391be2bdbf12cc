"""What a run will take, before it is started: steps, tokens, bytes, device memory, and what fits which card."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from common.errors import UserError
from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import batches_per_epoch, padding_share, plan_epoch
from text_to_audio.loading.tokens import TokenCache
from text_to_audio.loading.vectors import IN_MEMORY_BYTES
from text_to_audio.model.forward_pass import layers_of
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.planning.choosing import CUDA_ALLOWANCE, Measure, choose, fewest_layers, tensor_room
from text_to_audio.planning.data import PlannedData
from text_to_audio.planning.footprint import Footprint, Shape, TakeStep, footprint, text_encoder_on_meta
from text_to_audio.planning.text_shape import text_model_at_hand
from text_to_audio.training.optimisation import warmup_length

CARDS = (16, 24, 32)  # 10^9 bytes; a card sold under such a number has that many at least
GIB = 1 << 30
Measured = TypeVar("Measured", int, Footprint)


@dataclass(frozen=True)
class Tokens:
    """Tokens of an epoch, without and with padding, and of the longest caption."""

    whole: int
    padded: int
    longest: int


@dataclass(frozen=True)
class Plan:
    """What `--plan` reports. Bytes, unless it says otherwise; the cards' numbers are 10^9 bytes.

    config: of the planned run. card: the one that it is planned for, 0 where it is the config's device;
    asked_batch_size: what was to fit. text_shape, data: where the text model's shape and the counts are from, in words.
    tokens: None where the captions are not there yet. read: an epoch's bytes from the store. kept: those read once, at
    the start. layers: of the text encoder, with so many `layer_weights` in all; text_weights: all it has, without LoRA.
    proposals: card -> what fits it, None where one caption is too much.
    """

    config: TrainingConfig
    card: float
    asked_batch_size: int
    footprint: Footprint
    text_shape: str
    data: str
    steps: int
    warmup_steps: int
    captions: int
    recordings: int
    tokens: Tokens | None
    read: int
    kept: int
    allowance: int
    layers: int
    layer_weights: int
    text_weights: int
    proposals: "dict[float, Proposal | None]"


class Proposal(NamedTuple):
    """A way to fit a card: captions in a pass, passes a step, layers that are recomputed, bytes of tensors."""

    batch_size: int
    accumulation: int
    recomputed: int
    total: int


def plan_run(config: TrainingConfig, take_step: TakeStep, data: PlannedData, card: float = 0.0) -> Plan:
    """The plan of a run whose step is `take_step`, with what `auto` means for it.

    card: 10^9 bytes of a GPU that need not be in this machine, for which the largest batch size that fits is planned;
    0: the config's device, with proposals for the usual cards. Nothing is written; of the text model only small files
    are fetched. Raises `UserError` for a text model that cannot be had and whose shape is not known.
    """
    if card:
        # how many layers are recomputed follows from what fits the card
        config = replace(config, device="cuda", memory_gb=config.memory_gb or card, recomputed_layers=0)
    with text_model_at_hand(config) as (at_hand, text_shape):
        choose(at_hand, take_step, shape=data.shape)
        plan = make_plan(at_hand, take_step, data, (card,) if card else CARDS)
    return replace(plan, config=replace(plan.config, text_model=config.text_model), text_shape=text_shape)


def make_plan(
    config: TrainingConfig, take_step: TakeStep, data: PlannedData | None = None, cards: tuple[float, ...] = CARDS
) -> Plan:
    """The plan of a run in which `auto` is chosen already; of one card alone, with the batch size that fits that.

    Raises `UserError` for a store that is not there or lacks the space, and for a text model without config.json.
    """
    data = data or PlannedData.of_store(config)
    shape, text_encoder = data.shape, text_encoder_on_meta(config)
    layers = layers_of(text_encoder.model.get_base_model())
    measure = _remembering(lambda each: footprint(each, shape, take_step))
    proposals = propose(config, lambda each: measure(each).total, len(layers), cards)
    card, asked = cards[0] if len(cards) == 1 else 0, config.batch_size
    if card:
        config = _as_proposed(config, proposals[card], len(layers))
    steps = config.epochs * batches_per_epoch(shape.caption_source, config.effective_batch_size)
    rows = [dim * shape.dtype.itemsize for dim in shape.dims.values()]
    held = [len(shape.source) * row <= IN_MEMORY_BYTES for row in rows]
    return Plan(
        config=config,
        card=card,
        asked_batch_size=asked,
        footprint=measure(config),
        text_shape=config.text_model,
        data=data.origin,
        steps=steps,
        warmup_steps=warmup_length(config, steps),
        captions=len(shape.caption_source),
        recordings=len(shape.source),
        tokens=_tokens(config, text_encoder, data),
        read=sum(len(shape.caption_source) * row for row, kept in zip(rows, held, strict=True) if not kept),
        kept=sum(len(shape.source) * row for row, kept in zip(rows, held, strict=True) if kept),
        allowance=CUDA_ALLOWANCE,
        layers=len(layers),
        layer_weights=_frozen(layers),
        text_weights=_frozen([text_encoder]),
        proposals=proposals,
    )


def _tokens(config: TrainingConfig, text_encoder: TextEncoder, data: PlannedData) -> Tokens | None:
    """How many an epoch has, by the captions themselves."""
    if data.captions is None:
        return None
    lengths = TokenCache(text_encoder, data.captions).lengths
    batches = plan_epoch(data.shape.caption_source, config.effective_batch_size, config.seed, epoch=1)
    share, whole = padding_share(batches, lengths, config.batch_size), int(lengths.sum())
    return Tokens(whole, round(whole / (1 - share)), int(lengths.max()))


def _frozen(modules: Iterable[nn.Module]) -> int:
    return sum(each.numel() for module in modules for each in module.parameters() if not each.requires_grad)


def _as_proposed(config: TrainingConfig, proposal: "Proposal | None", layers: int) -> TrainingConfig:
    """The run as it fits the card; where it does not, with every layer recomputed."""
    recomputed = layers if proposal is None else proposal.recomputed
    if config.gradient_checkpointing == "auto":
        config = replace(config, recomputed_layers=recomputed)
    if proposal is None:
        return config
    return replace(config, batch_size=proposal.batch_size, gradient_accumulation_steps=proposal.accumulation)


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
    config: TrainingConfig, measure: Measure, layers: int, cards: tuple[float, ...] = CARDS
) -> dict[float, Proposal | None]:
    """For each card the largest batch size with which tensors and allowance fit, the effective batch kept.

    Where recomputing is left to auto, the fewest of the text encoder's `layers` are recomputed that make it fit. The
    bytes go up linearly with the batch size but for small steps, so that sizes which are far too large are passed over
    without measuring.
    """
    measure, auto = _remembering(measure), config.gradient_checkpointing == "auto"
    smallest = replace(config, recomputed_layers=layers) if auto else config
    known: dict[int, int] = {}
    proposals: dict[float, Proposal | None] = {}
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


def _remembering(measure: Callable[[TrainingConfig], Measured]) -> Callable[[TrainingConfig], Measured]:
    """The same, each batch size and number of recomputed layers measured once: at 36 layers it takes seconds."""
    known: dict[tuple[int, int, int], Measured] = {}

    def remembered(config: TrainingConfig) -> Measured:
        key = config.batch_size, config.gradient_accumulation_steps, config.layers_recomputed(sys.maxsize)
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
