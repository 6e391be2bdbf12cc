"""Train a text encoder (LoRA) and a projection head so that a text's vector meets its music's, in one audio space."""

import argparse
import math
import time
from dataclasses import dataclass, field
from logging import Logger
from pathlib import Path

import numpy as np
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from text_to_audio.bank import AudioBank, build_bank
from text_to_audio.baseline import ridge_metrics
from text_to_audio.batching import (
    AudioVectors,
    CaptionSet,
    TokenCache,
    batches_per_epoch,
    drop_sentences,
    micro_batches,
    padding_share,
    plan_epoch,
)
from text_to_audio.checkpoints import (
    checkpoint_path,
    make_folder,
    model_state,
    read_checkpoint,
    restore_weights,
    save_checkpoint,
)
from text_to_audio.config import TrainingConfig, add_arguments, config_from_arguments
from text_to_audio.curves import CurveWriter
from text_to_audio.errors import Stopped, UserError, run_script
from text_to_audio.evaluation import Evaluator, by_subset
from text_to_audio.gradient_caching import backward_by_part, backward_through_cache, seed_dropout
from text_to_audio.logs import start_log
from text_to_audio.losses import Temperature
from text_to_audio.negatives import Candidates, contrastive_objective
from text_to_audio.optimisation import (
    build_optimizer,
    build_schedule,
    gradient_norms,
    schedule_warnings,
    warmup_length,
)
from text_to_audio.report import write_report
from text_to_audio.reporting import log_results, log_validation
from text_to_audio.resuming import (
    Best,
    Checkpoint,
    LastCheckpoint,
    Progress,
    check_data,
    curve_start,
    find_checkpoint,
    restore,
    resume_command,
    say_if_done,
    set_aside,
    training_state,
)
from text_to_audio.stopping import StopRequest
from text_to_audio.store import SPLITS, EmbeddingStore
from text_to_audio.summary import table_with_chance, update_summary
from text_to_audio.text_model import ProjectionHead, TextEncoder

LOG_EVERY = 10  # optimizer steps between TensorBoard points


@dataclass
class Run:
    """What the functions of a training hand to each other."""

    config: TrainingConfig
    log: Logger
    store: EmbeddingStore
    text_encoder: TextEncoder
    projection: ProjectionHead
    temperature: Temperature
    captions: CaptionSet
    tokens: TokenCache
    vectors: AudioVectors
    bank: AudioBank | None
    validation: Evaluator
    optimizer: AdamW
    schedule: LambdaLR
    writer: CurveWriter
    last: LastCheckpoint
    stop: StopRequest
    steps: int
    progress: Progress
    step: int = 0
    best: Best = field(default_factory=Best)


def build_parser() -> argparse.ArgumentParser:
    """The command line: a flag for every setting of TrainingConfig."""
    parser = argparse.ArgumentParser(
        description="Train a text encoder and a projection head for one audio space of a prepared store.",
        epilog="examples: python train.py --audio-encoder muq\n"
        "          python train.py --audio-encoder mert --hidden-dim 4096 --epochs 30 --temperature 0.05\n"
        "          python train.py --audio-encoder latent --text-model models/MiniLM --lr 1e-3 --text-lr 1e-4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train one audio space, test its best checkpoint, and enter the result into the summary."""
    config = config_from_arguments(build_parser().parse_args(argv))
    log = start_log("train", "train.log")
    for folder in (config.checkpoint_dir, config.log_dir):
        make_folder(Path(folder))
    resumed = find_checkpoint(config, log)
    if resumed and say_if_done(resumed, config, log):
        return
    run = prepare(config, log, resumed)
    announce(run)
    if config.baseline:
        report_baseline(run)
    if not resumed:
        set_aside(config, log)
    with run.stop:
        fit(run)
        with run.stop.at_once():
            measure_best(run)
    run.writer.close()


def prepare(config: TrainingConfig, log: Logger, resumed: Checkpoint | None = None) -> Run:
    """Open the store, load the models, and cache the tokens. Faults in the store come up before any download.

    The run stands where the checkpoint `resumed` left it, or at its beginning.
    """
    store = EmbeddingStore(config.data_path)
    config.audio_dim = store.dim(config.audio_encoder)
    for name in SPLITS:
        if not store.split(name).caption:
            raise UserError(f"{store.path}: expected recordings with captions in the split {name!r}, found none")
    if resumed:
        check_data(resumed, store, config.audio_encoder)
    torch.manual_seed(config.seed)
    if config.torch_device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the head and the cosines
    text_encoder = TextEncoder(config)
    config.text_dim = text_encoder.dim
    projection = build_projection(config, store)
    captions = CaptionSet.of(store.split("train"))
    tokens = TokenCache(text_encoder, captions.captions)
    vectors = AudioVectors(store, "train", config.audio_encoder)
    bank = build_bank(config, store, vectors, projection) if config.audio_negatives == "bank" else None
    temperature = Temperature(config.temperature, config.learn_temperature).to(config.torch_device)
    validation = Evaluator(text_encoder, store, "val", config)
    steps = config.epochs * batches_per_epoch(captions.caption_source, config.effective_batch_size)
    optimizer = build_optimizer(config, text_encoder, projection, temperature)
    schedule = build_schedule(optimizer, warmup_length(config, steps), steps)
    writer = CurveWriter(str(Path(config.log_dir) / config.audio_encoder), *curve_start(resumed))
    last = LastCheckpoint(checkpoint_path(config, "last"), resumed)
    stop = StopRequest(f"go on with: {resume_command(config)}")
    run = Run(
        config, log, store, text_encoder, projection, temperature, captions, tokens, vectors, bank, validation,
        optimizer, schedule, writer, last, stop, steps, Progress.of(store, config.audio_encoder),
    )  # fmt: skip
    if resumed:
        run.progress, run.best = restore(resumed, text_encoder, projection, temperature, optimizer, schedule)
        run.step = resumed.contents["step"]
    return run


def build_projection(config: TrainingConfig, store: EmbeddingStore) -> ProjectionHead:
    """The head with the store's statistics, on the config's device; `UserError` where they are not finite."""
    head = ProjectionHead(config.text_dim, config.hidden_dim, config.audio_dim, config.head_dropout)
    try:
        head.set_statistics(*store.statistics(config.audio_encoder), config.standardise)
    except ValueError as error:
        raise UserError(
            f"{store.path}: {config.audio_encoder}: {error}, so a train vector is not; "
            f"prepare_dataset.py --verify names it"
        ) from error
    return head.to(config.torch_device)


def announce(run: Run) -> None:
    """Say what is about to be trained, and warn about settings that do not fit the run."""
    config, log, captions = run.config, run.log, run.captions
    lora = sum(p.numel() for p in run.text_encoder.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in run.text_encoder.parameters() if not p.requires_grad)
    head = sum(p.numel() for p in run.projection.parameters())
    plan = plan_epoch(captions.caption_source, config.effective_batch_size, config.seed, epoch=1)
    sizes = [len(batch) for batch in plan]
    sources = len(np.unique(captions.caption_source))
    warmup = warmup_length(config, run.steps)
    share = padding_share(plan, run.tokens.lengths, config.batch_size)
    log.info(
        f"{config.audio_encoder}: {len(captions)} captions of {len(run.vectors)} recordings of {sources} sources, "
        f"audio {config.audio_dim} wide"
    )
    log.info(f"trainable: {head + lora:,} (head {head:,}, LoRA {lora:,}); frozen: {frozen:,} ({config.text_model})")
    log.info(
        f"{len(plan)} batches of {min(sizes)}-{max(sizes)} captions an epoch, at most {run.steps} steps in "
        f"{config.epochs} epochs; warm-up {warmup} steps ({warmup / run.steps:.0%}); padding {share:.1%} of the "
        f"tokens; on {config.torch_device} in {'bf16' if config.bf16 else 'fp32'}"
    )
    if run.bank:
        log.info(f"bank: {len(run.bank)} recordings, {run.bank.nbytes / 1e9:.2f} GB, kept in: {run.bank.place}")
    log.info(f"validation: {len(run.validation.gallery.captions)} captions, {len(run.validation.gallery)} recordings")
    if run.step:
        log.info(f"going on after step {run.step} of {run.steps}, {run.progress.epoch} of {config.epochs} epochs done")
    for warning in schedule_warnings(config, run.steps):
        log.warning(f"warning: {warning}")
    if np.mean(sizes) < config.effective_batch_size / 2 and len(captions) > config.effective_batch_size:
        log.warning(
            f"warning: batches hold {np.mean(sizes):.0f} captions instead of {config.effective_batch_size}, since "
            f"a batch has one caption of a source, and the sources are few or one has very many"
        )


def report_baseline(run: Run) -> None:
    """Print the test metrics of a ridge regression from the frozen text encoder, beside chance."""
    test = Evaluator(run.text_encoder, run.store, "test", run.config)
    metrics, penalty = ridge_metrics(
        run.text_encoder, run.projection, run.captions, run.tokens, run.vectors, run.validation, test
    )
    rows = by_subset({**metrics, "gallery": len(test.gallery)}, f"{run.config.audio_encoder} ridge")
    run.log.info(f"ridge regression from frozen text, test split, penalty {penalty:g}\n{table_with_chance(rows)}")


def fit(run: Run) -> None:
    """The training loop: epochs, validation, checkpoints, early stopping. When asked to stop, it saves first."""
    try:
        while run.progress.epoch < run.config.epochs:
            if run.progress.epoch - run.best.r1_epoch >= run.config.patience:
                run.log.info(f"stopped: no better validation R@1 in {run.config.patience} epochs")
                break
            fit_epoch(run, run.progress.epoch + 1)
    except Stopped:
        save_last(run, checkpoint(run, {}))
        run.log.info(f"saved {run.last.path} after step {run.step} of {run.steps}")
        raise


def fit_epoch(run: Run, epoch: int) -> None:
    """What is left of an epoch, its validation and its checkpoints."""
    config = run.config
    run.text_encoder.train()
    run.projection.train()
    plan = plan_epoch(run.captions.caption_source, config.effective_batch_size, config.seed, epoch)
    loss = train_epoch(run, plan, epoch)
    with run.stop.at_once():
        scores = run.validation.measure(run.text_encoder, run.projection, run.temperature().item())
    log_validation(run.writer, run.validation, scores, run.step)
    improved = save_epoch(run, epoch, scores)
    run.log.info(
        f"epoch {epoch}/{config.epochs}: train loss {loss:.4f}, val loss {scores['loss']:.4f}, "
        f"val R@1 {scores['t2a_R@1']:.2f}, R@10 {scores['t2a_R@10']:.2f}, MRR {scores['t2a_MRR']:.4f}"
        f"{' (best)' if improved else ''}"
    )


def train_epoch(run: Run, plan: list[np.ndarray], epoch: int) -> float:
    """Step over the batches of the plan that are not done yet; returns the epoch's mean loss per caption."""
    progress = run.progress
    name, every, done = f"{run.config.audio_encoder} epoch {epoch}", run.config.save_every_steps, progress.batches
    bar = tqdm(plan[done:], desc=name, total=len(plan), initial=done, unit="step", leave=False)
    for batch in bar:
        start = time.perf_counter()
        loss = train_step(run, batch)
        run.step += 1
        if (run.step - 1) % LOG_EVERY == 0:
            log_step(run, batch, loss, start)
        run.optimizer.step()
        run.temperature.keep_in_range()
        run.schedule.step()
        run.optimizer.zero_grad(set_to_none=True)
        progress.add(len(batch), loss)
        run.stop.check()
        if every and run.step % every == 0:
            save_last(run, checkpoint(run, {}))
        rate = len(batch) / (time.perf_counter() - start)
        bar.set_postfix_str(
            f"loss {loss:.3f}, lr {run.schedule.get_last_lr()[0]:.1e}, {rate:.0f} captions/s", refresh=False
        )
    return progress.loss / progress.captions


def train_step(run: Run, batch: np.ndarray) -> float:
    """Gradients of one effective batch, a micro-batch of texts at a time; returns the loss.

    Where recordings are compared with the texts of their own micro-batch, each has a loss of its own; else there is
    one loss over all texts, whose features are computed twice (gradient caching).
    """
    config = run.config
    tokens, captions = step_tokens(run, batch)
    rows = run.captions.caption_audio[batch]
    candidates = Candidates(run.projection.standardise_audio(run.vectors[rows]), rows, run.bank)
    parts = list(micro_batches(captions, tokens.lengths, config.batch_size))

    def embed(number: int) -> torch.Tensor:
        seed_dropout(config.seed, run.step, number)
        return run.projection.project_text(run.text_encoder.encode(*tokens.padded(captions[parts[number]])))

    def loss_of(text: torch.Tensor, of: list[np.ndarray]) -> torch.Tensor:
        return contrastive_objective(text, of, candidates, run.temperature(), config)

    backward = backward_through_cache if config.text_negatives == "batch" else backward_by_part
    total = float(backward(embed, loss_of, parts))
    if not math.isfinite(total):
        raise UserError(
            f"step {run.step + 1}: expected a finite loss, found {total}; lower --lr and --text-lr, or raise "
            f"--temperature. The checkpoints in {config.checkpoint_dir} are those of the last epoch that ended"
        )
    return total


def step_tokens(run: Run, batch: np.ndarray) -> tuple[TokenCache, np.ndarray]:
    """Tokens of a batch's captions and the captions' numbers in them; made anew where sentences are dropped."""
    config = run.config
    if not config.caption_dropout:
        return run.tokens, batch
    rng = np.random.default_rng((config.seed, run.step, 0, 1))
    texts = [drop_sentences(run.captions.captions[i], config.caption_dropout, rng) for i in batch]
    return TokenCache(run.text_encoder, texts), np.arange(len(batch))


def log_step(run: Run, batch: np.ndarray, loss: float, start: float) -> None:
    """A TensorBoard point: loss, rates, temperature, gradient norms, padding, speed. Called before the step."""
    config, write = run.config, run.writer.add_scalar
    write("train/loss", loss, run.step)
    for name, rate in {group["name"]: group["lr"] for group in run.optimizer.param_groups}.items():
        write(f"learning_rate/{name}", rate, run.step)
    write("train/temperature", run.temperature().item(), run.step)
    for name, norm in gradient_norms(run.text_encoder, run.projection).items():
        write(f"gradient_norm/{name}", norm, run.step)
    lengths = run.tokens.lengths[batch]
    share = padding_share([np.arange(len(batch))], lengths, config.batch_size)
    write("train/padding_share", share, run.step)
    write("train/captions_per_second", len(batch) / (time.perf_counter() - start), run.step)


def save_epoch(run: Run, epoch: int, scores: dict[str, float]) -> bool:
    """Save the best checkpoints where this epoch is better, and the last; returns whether R@1 (or MRR) improved."""
    run.progress = run.progress.after_epoch(epoch)
    contents = checkpoint(run, scores)
    r1 = scores["t2a_R@1"], scores["t2a_MRR"]
    improved = r1 > run.best.r1
    if improved:
        run.best.r1, run.best.r1_epoch = r1, epoch
        save_checkpoint(checkpoint_path(run.config, "best_r1"), contents)
    if scores["loss"] < run.best.loss:
        run.best.loss = scores["loss"]
        save_checkpoint(checkpoint_path(run.config, "best_loss"), contents)
    save_last(run, contents)
    return improved


def checkpoint(run: Run, scores: dict[str, float]) -> dict:
    """What a checkpoint holds of the run as it stands; `scores` are its validation's, where there was one."""
    contents = model_state(run.config, run.text_encoder, run.projection)
    contents |= {"epoch": run.progress.epoch, "step": run.step, "metrics": scores}
    contents |= {"log_temperature": run.temperature.log.item()}
    return contents | {"audio_space": run.store.encoders[run.config.audio_encoder]}


def save_last(run: Run, contents: dict) -> None:
    """Save a checkpoint to go on from, after the points that lead up to it, so that the curves have no gaps."""
    run.writer.flush()
    state = training_state(run.optimizer, run.schedule, run.progress, run.best, run.config.torch_device)
    run.last.save(contents | state | {"points": run.writer.points_of(run.step)})


def measure_best(run: Run) -> dict[str, float]:
    """Test metrics of the checkpoint with the best validation R@1: printed beside chance and put in the summary."""
    path = checkpoint_path(run.config, "best_r1")
    restore_weights(path, read_checkpoint(path), run.text_encoder, run.projection)
    test = Evaluator(run.text_encoder, run.store, "test", run.config)
    metrics = test.measure(run.text_encoder, run.projection)
    log_results(run.writer, run.config, metrics, run.step)
    entry = {**metrics, "gallery": len(test.gallery), "epoch": run.best.r1_epoch, "started": run.progress.started}
    summary = update_summary(Path(run.config.checkpoint_dir), run.config.audio_encoder, entry)
    rows = by_subset({**metrics, "gallery": len(test.gallery)}, run.config.audio_encoder)
    run.log.info(f"text -> audio on the test split, epoch {run.best.r1_epoch}\n{table_with_chance(rows)}")
    report = write_report(path, run.config, run.store.header, run.best.r1_epoch, test, metrics)
    run.log.info(f"written: {path.parent}/{run.config.audio_encoder}_*.pt, {summary}, {report}")
    return metrics


if __name__ == "__main__":
    run_script(main)
