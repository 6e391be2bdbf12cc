"""train.py's step, validation and a query at the size of Qwen3-Embedding-4B, beside the plan and a plain PEFT loop."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train
from benchmarks.card.models import DIMS, made_on_the_device
from benchmarks.card.plain_peft import PlainLoop
from benchmarks.card.timing import forget, peak_gib, seconds_of
from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import plan_epoch
from text_to_audio.model.inference import embed_text_query
from text_to_audio.planning.choosing import choose
from text_to_audio.planning.footprint import Shape, footprint
from text_to_audio.training.training_run import Run

QUERY = "calm piano with soft strings"

Row = tuple[str, dict[str, float]]


def configs(store: Path, text_model: Path, folder: Path, device: torch.device) -> dict[str, TrainingConfig]:
    """The runs that are measured, by name."""
    base = TrainingConfig(
        "mert",
        data_path=str(store),
        text_model=str(text_model),
        device=str(device),
        log_dir=str(folder / "logs"),
        checkpoint_dir=str(folder / "checkpoints"),
    )
    return {
        "default": base,
        "three spaces jointly": replace(base, audio_encoder="latent muq mert"),
        "bank, same source positive": replace(base, audio_negatives="bank", same_source="positive"),
        "gradient caching": replace(base, text_negatives="batch"),
        "32 GB stated": replace(base, memory_gb=32),
        "16 GB stated": replace(base, memory_gb=16),
    }


def prepared(config: TrainingConfig) -> Run:
    """A run of train.py in training mode, with random weights made on its device."""
    choose(config, train.train_step)
    with made_on_the_device():
        run = train.prepare(config, logging.getLogger("gpu"))
    for module in run.modules():
        module.train()
    return run


class Steps:
    """Whole optimizer steps of train.py on batches of the first epoch. tokens: of each step, without padding."""

    def __init__(self, run: Run):
        self._run = run
        self._plan = plan_epoch(run.captions.caption_source, run.config.effective_batch_size, run.config.seed, 1)
        self.tokens: list[int] = []

    def take(self) -> None:
        """One step."""
        run = self._run
        data = run.reader.read(run.step, self._plan[run.step % len(self._plan)])
        train.train_step(run, data)
        run.optimizer.step()
        run.schedule.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        self.tokens.append(data.token_count[0])


def linear_weights(run: Run) -> int:
    """Frozen weights that every token is multiplied with: 3.63e9 in Qwen3-Embedding-4B's layers."""
    layers = [module.base_layer for module in run.text_encoder.modules() if hasattr(module, "base_layer")]
    return sum(layer.weight.numel() for layer in layers)


def measure_steps(chosen: dict[str, TrainingConfig], ceiling: float, rounds: int) -> Iterator[Row]:
    """Seconds a step, tokens/s, share of the bf16 ceiling in useful arithmetic, and the peak beside the plan's."""
    for name, config in chosen.items():
        device = config.torch_device
        forget(device)
        run = prepared(config)
        steps = Steps(run)
        first = seconds_of(steps.take, device, 1, 0)
        seconds = seconds_of(steps.take, device, rounds, 1)
        mean = float(np.mean(steps.tokens))
        found = {
            "s/step": seconds,
            "first step, s": first,
            "tokens/s": mean / seconds,
            "share of ceiling": 4 * linear_weights(run) * mean / seconds / ceiling / 1e12,
            "peak GiB": peak_gib(device),
        }
        if name == "default":
            found |= measure_answers(run, device)
        del run, steps
        forget(device)
        shape = Shape.of(EmbeddingStore(config.data_path), config.audio_encoders)
        found["plan GiB"] = footprint(config, shape, train.train_step).total / 2**30
        found |= {"layers recomputed": config.recomputed_layers, "compiled": float(config.compile == "on")}
        yield f"step, {name}", found


def measure_answers(run: Run, device: torch.device) -> dict[str, float]:
    """Validation captions a second, and milliseconds of one text query, both with the run's own models."""
    validation, space = run.spaces[0].validation, run.spaces[0]
    captions = len(validation.gallery.captions)
    validating = captions / seconds_of(lambda: validation.embed(run.text_encoder), device, 1, 1)

    def ask() -> None:
        embed_text_query(QUERY, run.text_encoder, space.projection, str(device))

    return {"validation, captions/s": validating, "query, ms": 1000 * seconds_of(ask, device, 20, 3)}


def measure_plain_loop(config: TrainingConfig, rounds: int) -> Row:
    """The same step by a plain PEFT loop on the same captions, as one would write it."""
    device = config.torch_device
    forget(device)
    split, loop = (
        EmbeddingStore(config.data_path).split("train"),
        PlainLoop(Path(config.text_model), DIMS["mert"], device),
    )
    order = iter(np.random.default_rng(0).permutation(len(split.caption)).tolist() * (rounds + 1))
    vectors = torch.randn(config.batch_size, DIMS["mert"])

    def step() -> None:
        parts = range(config.gradient_accumulation_steps)
        texts = [[split.caption[next(order)] for _ in range(config.batch_size)] for _ in parts]
        loop.step(texts, [vectors for _ in parts])

    return "step, plain PEFT loop", {"s/step": seconds_of(step, device, rounds, 1), "peak GiB": peak_gib(device)}
