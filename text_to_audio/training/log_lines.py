"""What a run says of itself: what it is about to train, a line and points every few steps, validation, outcome."""

import time
from dataclasses import asdict
from datetime import timedelta

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import padding_share, plan_epoch
from text_to_audio.loading.step_data import StepData
from text_to_audio.measuring.evaluation import Evaluator
from text_to_audio.measuring.examples import Query, best_and_worst, similarity_counts
from text_to_audio.training.optimisation import gradient_norms, schedule_warnings, warmup_length
from text_to_audio.training.training_run import Run


class Speed:
    """Captions and tokens per second since they were last asked for, and how long the run will still take."""

    def __init__(self, run: Run):
        self._run = run
        self._since = time.perf_counter()
        self._captions = self._tokens = self._padded = self._steps = 0

    def count(self, data: StepData) -> None:
        """Note a step that was taken."""
        self._steps += 1
        self._captions += len(data)
        self._tokens += data.token_count[0]
        self._padded += data.token_count[1]

    def take(self) -> dict[str, float]:
        """captions_per_second, tokens_per_second, padding_share and eta (seconds); counting starts anew.

        Call it where the device has finished the steps.
        """
        now = time.perf_counter()
        seconds = now - self._since
        left = self._run.steps - self._run.step
        found = {
            "captions_per_second": self._captions / seconds,
            "tokens_per_second": self._tokens / seconds,
            "padding_share": 1 - self._tokens / self._padded,
            "eta": left * seconds / self._steps,
        }
        self._since = now
        self._captions = self._tokens = self._padded = self._steps = 0
        return found


def announce(run: Run) -> None:
    """Say what is about to be trained, and warn about settings that do not fit the run."""
    config, log, captions, layers = run.config, run.log, run.captions, run.text_encoder.layers
    lora, frozen = (
        sum(p.numel() for p in run.text_encoder.parameters() if p.requires_grad == trained) for trained in (True, False)
    )
    heads = [sum(p.numel() for p in space.projection.parameters()) for space in run.spaces]
    plan = plan_epoch(captions.caption_source, config.effective_batch_size, config.seed, epoch=1)
    sizes = [len(batch) for batch in plan]
    warmup, share = warmup_length(config, run.steps), padding_share(plan, run.tokens.lengths, config.batch_size)
    log.info(
        f"{', '.join(config.audio_encoders)}: {len(captions)} captions of {len(run.spaces[0].vectors)} recordings of "
        f"{len(np.unique(captions.caption_source))} sources, audio "
        f"{', '.join(str(space.config.audio_dim) for space in run.spaces)} wide"
    )
    log.info(
        f"trainable: {sum(heads) + lora:,} (head {' + '.join(f'{head:,}' for head in heads)}, LoRA {lora:,}); "
        f"frozen: {frozen:,} ({config.text_model})"
    )
    log.info(
        f"{len(plan)} batches of {min(sizes)}-{max(sizes)} captions an epoch, at most {run.steps} steps in "
        f"{config.epochs} epochs; warm-up {warmup} steps ({warmup / run.steps:.0%}); padding {share:.1%} of the tokens"
    )
    log.info(
        f"{run.processes.count} process{'es' * (run.processes.count > 1)} on {config.torch_device.type} in "
        f"{'bf16' if config.bf16 else 'fp32'}, attention {run.text_encoder.attention}; "
        f"{config.layers_recomputed(layers)} of {layers} text layers recomputed, compile {config.compile}"
    )
    announce_spaces(run)
    gallery = run.spaces[0].validation.gallery
    log.info(f"validation: {len(gallery.captions)} captions, {len(gallery)} recordings")
    if run.step:
        log.info(f"going on after step {run.step} of {run.steps}, {run.progress.epoch} of {config.epochs} epochs done")
    for warning in schedule_warnings(config, run.steps):
        log.warning(f"warning: {warning}")
    if np.mean(sizes) < config.effective_batch_size / 2 and len(captions) > config.effective_batch_size:
        log.warning(
            f"warning: batches hold {np.mean(sizes):.0f} captions instead of {config.effective_batch_size}, since "
            f"a batch has one caption of a source, and the sources are few or one has very many"
        )


def announce_spaces(run: Run) -> None:
    """Say what auto came to in each audio space, and where a bank is kept."""
    for space in run.spaces:
        own = space.config
        run.log.info(
            f"{own.audio_encoder} space: {own.standardise}, {own.mean_removed:.0%} of the mean taken off, spread "
            f"{own.spread:.2f}, temperature {own.scaled_temperature:.4f}"
        )
        if space.bank:
            size = space.bank.nbytes / 1e9
            run.log.info(f"bank: {len(space.bank)} recordings, {size:.2f} GB, kept in: {space.bank.place}")


def log_step(run: Run, losses: Tensor, speed: Speed) -> str:
    """A TensorBoard point: losses, rates, temperature, gradient norms, speed, memory; returns a line for the bar.

    Called between the backward pass and the optimizer's step. losses: (spaces,).
    """
    values = losses.tolist()  # waits for the device, so that the speed is that of finished steps
    pace = speed.take()
    norms = gradient_norms(run.text_encoder, {space.name: space.projection for space in run.spaces})
    shared = {f"train/{name}": value for name, value in pace.items() if name != "eta"}
    shared |= {f"gradient_norm/{name}": norm for name, norm in norms.items() if not name.startswith("head/")}
    shared |= {f"learning_rate/{group['name']}": group["lr"] for group in run.optimizer.param_groups}
    shared["train/memory_gb"] = memory = held_memory(run.config.torch_device) / 1e9
    for space, loss in zip(run.spaces, values, strict=True):
        if space.writer is None:
            continue
        own = {"train/loss": loss, "train/temperature": space.temperature().item()}
        own["gradient_norm/head"] = norms[f"head/{space.name}"]
        for name, value in {**own, **shared}.items():
            space.writer.add_scalar(name, value, run.step)
    shown = " ".join(f"{value:.3f}" for value in values)
    left = timedelta(seconds=round(pace["eta"]))
    rate = run.schedule.get_last_lr()[0]
    return f"loss {shown}, lr {rate:.1e}, {pace['tokens_per_second']:.0f} tokens/s, {memory:.1f} GB, {left} left"


def held_memory(device: torch.device) -> float:
    """Bytes: the peak of what torch held on a GPU; on a CPU what the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def log_validation(writer: SummaryWriter, evaluator: Evaluator, metrics: dict[str, float], step: int) -> None:
    """The metrics of the evaluator's last measurement, histograms of its cosines, and its best and worst queries."""
    for name, value in metrics.items():
        writer.add_scalar(f"val/{name}", value, step)
    scores = evaluator.latest
    if scores is None:
        raise ValueError("the evaluator has not measured anything yet")
    edges, positive, negative = similarity_counts(scores, evaluator.gallery)
    _add_histogram(writer, "val/similarity/positives", edges, positive, step)
    _add_histogram(writer, "val/similarity/negatives", edges, negative, step)
    best, worst = best_and_worst(scores, evaluator.gallery, evaluator.audio_id)
    writer.add_text("val/queries/best", _as_markdown(best), step)
    writer.add_text("val/queries/worst", _as_markdown(worst), step)


def log_results(writer: SummaryWriter, config: TrainingConfig, metrics: dict[str, float], step: int) -> None:
    """The test metrics of a run that has ended, as scalars and as the outcome of its settings (hparams)."""
    for name, value in metrics.items():
        writer.add_scalar(f"test/{name}", value, step)
    settings = {name: value for name, value in asdict(config).items() if isinstance(value, int | float | str)}
    # add_hparams would open another run; these three summaries go beside the scalars that they name
    for summary in hparams(settings, {f"test/{name}": value for name, value in metrics.items()}):
        writer._get_file_writer().add_summary(summary)
    writer.flush()


def _add_histogram(writer: SummaryWriter, tag: str, edges: Tensor, counts: Tensor, step: int) -> None:
    centres, counts = ((edges[1:] + edges[:-1]) / 2).double(), counts.double()
    held = torch.nonzero(counts)[:, 0]
    if not len(held):
        return  # a gallery of one recording has no negatives
    writer.add_histogram_raw(
        tag,
        min=edges[held[0]].item(),
        max=edges[held[-1] + 1].item(),
        num=counts.sum().item(),
        sum=(centres * counts).sum().item(),
        sum_squares=(centres.square() * counts).sum().item(),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def _as_markdown(queries: list[Query]) -> str:
    blocks = []
    for query in queries:
        lines = [f"**rank {query.rank}** of {_plain(query.audio_id)}: {_plain(query.caption)}", ""]
        lines += [f"- {each.score:.3f} {_plain(each.audio_id)}: {_plain(each.caption)}" for each in query.found]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _plain(text: str) -> str:
    """Text such that Markdown shows it as it is, on one line."""
    escaped = "".join("\\" + letter if letter in "\\`*_{}[]<>()#+-.!|" else letter for letter in text)
    return " ".join(escaped.split())
