"""AdamW's groups, the learning-rate schedule, and how long gradients are."""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from text_to_audio.config import TrainingConfig

# steps x peak rate below which a run ends before the weights have moved far enough. 200 steps wanted a head rate of
# 5e-4 to 2e-3 (0.1 to 0.4), and LoRA at 2e-5 (0.004) was worth little; the default run has 0.37 and 0.15
ENOUGH = {"lr": 0.05, "text_lr": 0.005}


def build_optimizer(
    config: TrainingConfig, text_encoder: nn.Module, heads: Iterable[tuple[nn.Module, nn.Module]]
) -> AdamW:
    """AdamW over heads and LoRA with their own rates; vectors (biases, norms) are not decayed.

    heads: (projection, temperature) of each audio space. A temperature that is learnt has the head's rate.
    """
    projections, temperatures = zip(*heads, strict=True)
    groups = []
    for name, modules, rate in (
        ("head", projections, config.lr),
        ("lora", [text_encoder], config.text_lr),
        ("temperature", temperatures, config.lr),
    ):
        trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
        for decay in (True, False):
            chosen = [parameter for parameter in trained if (parameter.ndim > 1) == decay]
            if chosen:
                weight_decay = config.weight_decay if decay else 0.0
                groups.append({"params": chosen, "lr": rate, "weight_decay": weight_decay, "name": name})
    return AdamW(groups, fused=config.torch_device.type == "cuda")


def warmup_length(config: TrainingConfig, total_steps: int) -> int:
    """Warm-up steps of a run; a warm-up as long as the run or longer becomes 10 % of it."""
    if config.warmup_steps < total_steps:
        return config.warmup_steps
    return max(1, total_steps // 10)


def rate_factor(step: int, warmup: int, total_steps: int) -> float:
    """Factor on the peak rate at `step` (from 0): linear up to 1 at the warm-up's end, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_schedule(optimizer: AdamW, warmup: int, total_steps: int) -> LambdaLR:
    """The schedule over optimizer steps; call its `step` after each."""
    return LambdaLR(optimizer, partial(rate_factor, warmup=warmup, total_steps=total_steps))


def schedule_warnings(config: TrainingConfig, total_steps: int) -> list[str]:
    """What to say before a run whose warm-up or rates do not fit its number of steps."""
    warnings = []
    if config.warmup_steps >= total_steps:
        warnings.append(
            f"--warmup-steps {config.warmup_steps} is no shorter than the run of {total_steps} steps; "
            f"using {warmup_length(config, total_steps)}"
        )
    small = [
        f"--{name.replace('_', '-')} {getattr(config, name):g} (about {enough / total_steps:.0e} or more)"
        for name, enough in ENOUGH.items()
        if 0 < getattr(config, name) * total_steps < enough
    ]
    if small:
        warnings.append(f"{total_steps} steps are few for {' and '.join(small)}; raise it, or train for longer")
    return warnings


def gradient_norms(text_encoder: nn.Module, heads: dict[str, nn.Module]) -> dict[str, float]:
    """Length of the gradient: of all LoRA weights, of each linear layer's LoRA pair, and of each head, "head/NAME"."""
    modules: dict[str, list[torch.Tensor]] = {}
    for name, parameter in text_encoder.named_parameters():
        if parameter.grad is not None:
            module = name.split(".lora_")[0].removeprefix("model.base_model.model.")
            modules.setdefault(f"lora/{module}", []).append(parameter.grad)
    for name, head in heads.items():
        modules[f"head/{name}"] = [each.grad for each in head.parameters() if each.grad is not None]
    sums = torch.stack([torch.stack([grad.square().sum() for grad in grads]).sum() for grads in modules.values()])
    squares = dict(zip(modules, sums.tolist(), strict=True))  # one transfer from the device
    total = math.sqrt(sum(value for name, value in squares.items() if name.startswith("lora/")))
    return {"lora": total, **{name: math.sqrt(value) for name, value in squares.items()}}
