"""A plan in words: what `train.py --plan` prints."""

import textwrap
from pathlib import Path

from text_to_audio.planning.duration import time_lines
from text_to_audio.planning.plan import GIB, Plan

Line = tuple[str, str]
_NAMES, _WIDTH = 19, 118  # columns of the names, and of a line


def plan_text(plan: Plan, tflops: float | None = None) -> str:
    """The plan as aligned lines. tflops: 10^12 operations a second of this device's matrix products, where measured."""
    lines = [*_run_lines(plan), ("", ""), *_memory_lines(plan), ("", "")]
    lines += [(f"fits {card:g} GB", _proposal(plan, card)) for card in plan.proposals]
    if not plan.card and plan.config.torch_device.type == "cpu":
        lines.append(("", "all in this device's arithmetic; --plan-for 32GB plans for a GPU of that memory"))
    lines += [("", ""), *time_lines(plan, tflops)]
    return "\n".join(line for name, value in lines for line in _wrapped(name, value))


def _wrapped(name: str, value: str) -> list[str]:
    rows = textwrap.wrap(value, _WIDTH - _NAMES, break_on_hyphens=False) if len(value) > _WIDTH - _NAMES else [value]
    return [f"{name if not number else '':<{_NAMES}}{row}".rstrip() for number, row in enumerate(rows)]


def _run_lines(plan: Plan) -> list[Line]:
    config, measured = plan.config, plan.footprint
    device = f"a GPU of {plan.card:g} GB" if plan.card else str(config.torch_device)
    precision, recomputed = "bf16" if config.bf16 else "fp32", config.layers_recomputed(plan.layers)
    kept = f"; {_size(plan.kept)} once, then kept in memory" if plan.kept else ""
    last = _size(measured.last_bytes)
    return [
        ("run", f"{', '.join(config.audio_encoders)}; {config.text_model}"),
        ("its shape", plan.text_shape),
        ("arithmetic", f"{precision}, {_recomputed(recomputed, plan.layers)}, {device}"),
        ("parameters", f"{measured.parameters:,}"),
        ("trainable", f"{measured.trainable:,} ({measured.trainable / measured.parameters:.2%})"),
        ("data", f"{plan.captions:,} captions of {plan.recordings:,} recordings ({plan.data})"),
        ("steps", f"{plan.steps:,} in {config.epochs} epochs, {config.effective_batch_size} captions each at most"),
        ("warm-up", f"{plan.warmup_steps:,} steps ({plan.warmup_steps / plan.steps:.1%})"),
        ("tokens an epoch", _tokens(plan)),
        ("read an epoch", _size(plan.read) + kept),
        ("checkpoints", f"best {_size(measured.best_bytes)} (two of them), last {last} (two)"),
        ("disk", _disk(plan)),
    ]


def _tokens(plan: Plan) -> str:
    if plan.tokens is None:
        return f"not known without the captions; at most {plan.config.max_length} each"
    share = 1 - plan.tokens.whole / plan.tokens.padded
    return f"{plan.tokens.padded:,}, {share:.1%} of them padding; longest caption {plan.tokens.longest}"


def _disk(plan: Plan) -> str:
    """The text model's weights, and every checkpoint that a finished run leaves."""
    config, measured, spaces = plan.config, plan.footprint, len(plan.config.audio_encoders)
    folder = Path(config.text_model).expanduser()
    if folder.is_dir():
        text_model, origin = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()), "as it is"
    else:
        text_model, origin = 2 * plan.text_weights, "in bf16"
    # of a joint run each space has files of its own for use, LoRA in every one of them, and a last among them
    for_use = measured.best_bytes + (spaces - 1) * measured.peak["LoRA"] // 2
    checkpoints = (2 if spaces == 1 else 3) * for_use + 2 * measured.last_bytes
    return f"text model {_size(text_model)} ({origin}) + checkpoints {_size(checkpoints)}, beside the store"


def _memory_lines(plan: Plan) -> list[Line]:
    config, measured = plan.config, plan.footprint
    lines = [(f"peak memory at {config.batch_size} texts of {config.max_length} tokens", "")]
    lines += [(f"  {part}", f"{size / GIB:7.2f} GiB") for part, size in measured.peak.items()]
    return [
        *lines,
        ("  tensors", f"{measured.total / GIB:7.2f} GiB"),
        ("  CUDA allowance", f"{plan.allowance / GIB:7.2f} GiB (context, kernels, workspaces; on a CPU none)"),
    ]


def _proposal(plan: Plan, card: float) -> str:
    found, config = plan.proposals[card], plan.config
    if found is None:
        hint = "; try --gradient-checkpointing on" if config.gradient_checkpointing == "off" else ""
        return f"no, at no batch size{hint}"
    auto = f", {_recomputed(found.recomputed, plan.layers)}" if config.gradient_checkpointing == "auto" else ""
    if found.batch_size == plan.asked_batch_size:
        return f"yes{auto} ({found.total / GIB:.2f} GiB of tensors)"
    size = f"--batch-size {found.batch_size} --gradient-accumulation-steps {found.accumulation}"
    return f"with {size} ({found.total / GIB:.2f} GiB of tensors){auto}"


def _recomputed(layers: int, of: int) -> str:
    return f"{layers} of {of} layers recomputed"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
