"""How long a run's steps take: measured where a card was timed with this text model, arithmetic for the others."""

from collections.abc import Iterator

from text_to_audio.planning.plan import Plan
from text_to_audio.planning.published import H100, MeasuredStep


def time_lines(plan: Plan, tflops: float | None) -> Iterator[tuple[str, str]]:
    """The hours of the planned steps, without validation, as (name, text).

    tflops: 10^12 operations a second of matrix products on this device in the run's arithmetic; None says nothing of
    this device.
    """
    tokens = plan.tokens.padded / plan.captions if plan.tokens else H100.caption_tokens
    origin = "padding included" if plan.tokens else f"assumed, as in the step timed on {H100.card}"
    work = operations(plan, tokens)
    yield "work", f"{work / 1e15:,.0f} PFLOP in the text model's layers, {tokens:.0f} tokens a caption ({origin})"
    if is_that_of(plan, H100):
        yield from _measured_lines(plan, H100, tokens, work)
    elif plan.config.bf16:
        yield "time on a GPU", "not known: what was timed on a card is another run (docs/measurements.md)"
    if tflops is not None:
        precision, device = "bf16" if plan.config.bf16 else "fp32", plan.config.torch_device
        least = work / tflops / 1e12 / 3600
        yield "time here", f"at least {_hours(least)}: {device} makes {tflops:.2f} TFLOP/s in {precision} products now"


def operations(plan: Plan, tokens: float) -> float:
    """Operations of all steps in the text model's frozen layers, for captions of so many tokens.

    A token costs two for each weight in the forward pass and two in the backward pass, which needs gradients of the
    activations alone; two more where a layer is recomputed or texts are run twice. Attention's own products, LoRA and
    heads are left out: a hundredth of it at these lengths.
    """
    twice = plan.config.text_negatives == "batch"
    passes = 4 + 2 * plan.config.layers_recomputed(plan.layers) / max(1, plan.layers) + 2 * twice
    return passes * plan.layer_weights * tokens * plan.captions * plan.config.epochs


def is_that_of(plan: Plan, measured: MeasuredStep) -> bool:
    """Whether a planned step is what was timed: this text model in bf16, one space, no bank, texts run once."""
    config = plan.config
    return (
        abs(plan.text_weights / measured.text_model.parameters - 1) < 0.01
        and config.bf16
        and len(config.audio_encoders) == 1
        and config.audio_negatives != "bank"
        and config.text_negatives == "micro"
    )


def _measured_lines(plan: Plan, measured: MeasuredStep, tokens: float, work: float) -> Iterator[tuple[str, str]]:
    share = plan.config.layers_recomputed(plan.layers) / plan.layers
    compiled = plan.config.compile != "off"
    steps = plan.config.epochs * plan.captions / measured.captions * tokens / measured.caption_tokens
    hours = steps * measured.seconds(share, compiled) / 3600
    one = f"{measured.captions} captions of {measured.caption_tokens:.0f} tokens"
    none, every = measured.seconds(0, compiled), measured.seconds(1, compiled)
    layers = f"{'' if compiled else 'not '}compiled: {none} s with no layer recomputed, {every} s with all"
    yield "time", f"{_hours(hours)} on {measured.card}, where a step of {one} took, {layers}"
    needed = work / measured.share / 1e12 / 3600
    yield (
        "other cards",
        f"not timed; by arithmetic {needed:,.0f} / T hours on one that makes T TFLOP/s in bf16 matrix products, if the "
        f"run gets {measured.share:.0%} of that there too",
    )


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h ({hours / 24:,.0f} days)"
