"""Train a text encoder (LoRA) and a projection head so that a text's vector meets its music's, in an audio space."""

import argparse
import math
import re
from logging import Logger
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import Stopped, UserError, run_script
from common.logs import start_log
from common.speed import matmul_tflops
from embedding_models.registry import find_encoder
from preparing.musicbench import COPIES, PUBLISHED_ROWS
from text_to_audio.config import TrainingConfig, add_arguments, config_from_arguments
from text_to_audio.loading.batches import plan_epoch
from text_to_audio.loading.step_data import StepData
from text_to_audio.loss.gradient_caching import gather
from text_to_audio.measuring.baseline import embed_frozen, ridge_metrics
from text_to_audio.measuring.evaluation import Evaluator, by_subset
from text_to_audio.measuring.report_page import write_report
from text_to_audio.measuring.summary import table_with_chance, update_summary
from text_to_audio.model.checkpoints import (
    checkpoint_path,
    make_folder,
    read_checkpoint,
    restore_weights,
    save_checkpoint,
)
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.held_weights import query_bytes
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.planning.choosing import choose
from text_to_audio.planning.data import PlannedData, has_store
from text_to_audio.planning.plan import advice_when_out_of_memory, plan_run
from text_to_audio.planning.plan_text import plan_text
from text_to_audio.processes import Processes, join
from text_to_audio.training.keeping import how_sure
from text_to_audio.training.log_lines import Speed, announce, log_results, log_step, log_validation
from text_to_audio.training.resuming import find_checkpoint, say_if_done
from text_to_audio.training.saved_state import restore, run_contents, space_contents
from text_to_audio.training.setting_aside import set_aside
from text_to_audio.training.step_models import StepModels
from text_to_audio.training.training_run import Run, Space, open_curves, prepare

__all__ = ["ProjectionHead", "TextEncoder", "TrainingConfig", "main"]

LOG_EVERY = 10  # optimizer steps between TensorBoard points; between them nothing waits for the device


def build_parser() -> argparse.ArgumentParser:
    """The command line: a flag for every setting of TrainingConfig."""
    parser = argparse.ArgumentParser(
        description="Train a text encoder and a projection head for one or more audio spaces of a prepared store.",
        epilog="examples: python train.py --audio-encoder muq\n"
        "          python train.py --audio-encoder mert --hidden-dim 4096 --epochs 30 --temperature 0.05\n"
        "          python train.py --audio-encoder latent --text-model models/MiniLM --lr 1e-3 --text-lr 1e-4\n"
        "          python train.py --audio-encoder latent muq mert      (one text encoder, a head for each)\n"
        "          python train.py --audio-encoder mert --plan          (what it takes; loads no weights)\n"
        "          python train.py --audio-encoder mert --plan-for 32GB    (for a GPU that is not here)\n"
        "          torchrun --nproc_per_node=4 train.py --audio-encoder muq",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument(
        "--plan", action="store_true", help="print steps, tokens, memory, hours and what fits which GPU; train nothing"
    )
    text = "--plan for a GPU of so much memory that need not be in this machine, such as 32GB"
    parser.add_argument("--plan-for", type=card_size, metavar="SIZE", default=0.0, help=text)
    return parser


def card_size(text: str) -> float:
    """10^9 bytes of a GPU's memory, of "32GB" or "32"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"expected a GPU's memory such as 32GB, found {text!r}")
    return float(found[1])


def main(argv: list[str] | None = None) -> None:
    """Train, test the best checkpoint of each audio space, and enter the results into the summary."""
    arguments = build_parser().parse_args(argv)
    config = config_from_arguments(arguments)
    if arguments.plan or arguments.plan_for:
        print(plan(config, arguments.plan_for))
        return
    processes = join(config)
    config = processes.on_own_device(config)
    log = start_log("train", "train.log", quiet=not processes.is_main)
    try:
        train(config, log, processes)
    finally:
        processes.leave()


def plan(config: TrainingConfig, card: float) -> str:
    """What a run will take, in lines. card: 10^9 bytes of a GPU that need not be here; 0: the config's device."""
    data = PlannedData.of_store(config) if has_store(config) else musicbench(config)
    planned = plan_run(config, train_step, data, card)
    if card:
        return plan_text(planned)
    precision = torch.bfloat16 if config.bf16 else torch.float32
    return plan_text(planned, matmul_tflops(config.torch_device, precision))


def musicbench(config: TrainingConfig) -> PlannedData:
    """MusicBench as prepare_dataset.py splits it, by its published counts and the encoders' published widths."""
    dims = {name: find_encoder(name).dim for name in config.audio_encoders}
    origin = f"no {config.data_path} yet: MusicBench's published counts, 90 % of train, 2 captions a recording"
    return PlannedData.counted(dims, round(0.9 * PUBLISHED_ROWS["train"]), COPIES, 2, origin)


def train(config: TrainingConfig, log: Logger, processes: Processes) -> None:
    """One run: from its settings, or from where it stopped, to its test metrics."""
    for folder in (config.checkpoint_dir, config.log_dir):
        make_folder(Path(folder))
    resumed = find_checkpoint(config, log)
    if resumed and say_if_done(resumed, config, log):
        return
    choose(config, train_step, resumed.config if resumed else None)
    run = prepare(config, log, resumed, processes)
    if resumed:
        restore(resumed, run)
    announce(run)
    if config.baseline:
        report_baseline(run)
    if not resumed:
        processes.wait()  # until all have looked for a checkpoint
        if processes.is_main:
            set_aside(config, log)
    if processes.is_main:
        open_curves(run, resumed)
    with run.stop, advice_when_out_of_memory(config, train_step):
        fit(run)
        with run.stop.at_once():
            for space in run.spaces:
                measure_best(run, space)
    for space in run.spaces:
        if space.writer:
            space.writer.close()


def report_baseline(run: Run) -> None:
    """Print the test metrics of a ridge regression from the frozen text encoder, beside chance."""
    tests: list[Evaluator] = []
    for space in run.spaces:
        tokens = tests[0].tokens if tests else None
        tests.append(Evaluator(run.text_encoder, run.store, "test", space.config, run.processes, tokens))
    caches = run.tokens, run.spaces[0].validation.tokens, tests[0].tokens
    texts = embed_frozen(run.text_encoder, caches, run.processes)
    for space, test in zip(run.spaces, tests, strict=True):
        metrics, penalty = ridge_metrics(texts, space.projection, run.captions, space.vectors, space.validation, test)
        rows = by_subset({**metrics, "gallery": len(test.gallery)}, f"{space.name} ridge")
        run.log.info(f"ridge regression from frozen text, test split, penalty {penalty:g}\n{table_with_chance(rows)}")


def fit(run: Run) -> None:
    """The training loop: epochs, validation, checkpoints, early stopping. When asked to stop, it saves first."""
    try:
        while run.progress.epoch < run.config.epochs:
            if run.progress.epoch - run.best_epoch >= run.config.patience:
                run.log.info(f"stopped: none of {run.config.patience} epochs was better in validation")
                break
            fit_epoch(run, run.progress.epoch + 1)
    except Stopped:
        save_last(run, {})
        run.log.info(f"saved {run.last.path} after step {run.step} of {run.steps}")
        raise


def fit_epoch(run: Run, epoch: int) -> None:
    """What is left of an epoch, its validation and its checkpoints."""
    for module in run.modules():
        module.train()
    losses = train_epoch(run, epoch)
    scores = {}
    with run.stop.at_once():
        text = run.spaces[0].validation.embed(run.text_encoder)
        for space in run.spaces:
            temperature = space.temperature().item()
            scores[space.name] = space.validation.measure(run.text_encoder, space.projection, temperature, text)
    kept = save_epoch(run, epoch, scores)
    for space, loss in zip(run.spaces, losses, strict=True):
        found = scores[space.name]
        if space.writer:
            log_validation(space.writer, space.validation, found, run.step)
        run.log.info(
            f"epoch {epoch}/{run.config.epochs}{f' {space.name}' if len(losses) > 1 else ''}: train loss {loss:.4f}, "
            f"val loss {found['loss']:.4f}, val R@1 {found['t2a_R@1']:.2f}, R@10 {found['t2a_R@10']:.2f}, "
            f"MRR {found['t2a_MRR']:.4f}{' (kept)' if space.name in kept else ''}"
        )


def train_epoch(run: Run, epoch: int) -> list[float]:
    """Step over the batches of the epoch that are not done yet; returns its mean loss per caption in each space."""
    plan = plan_epoch(run.captions.caption_source, run.config.effective_batch_size, run.config.seed, epoch)
    done, every, speed = run.progress.batches, run.config.save_every_steps, Speed(run)
    bar = tqdm(
        run.reader.ahead(run.step, plan[done:]), desc=f"{run.config.run_name} epoch {epoch}", total=len(plan),
        initial=done, unit="step", leave=False, disable=not run.processes.is_main,
    )  # fmt: skip
    for data in bar:
        losses = train_step(run, data)
        run.step += 1
        speed.count(data)
        if (run.step - 1) % LOG_EVERY == 0:
            check_loss(run, losses)
            bar.set_postfix_str(log_step(run, losses, speed), refresh=False)
        run.optimizer.step()
        for space in run.spaces:
            space.temperature.keep_in_range()
        run.schedule.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.progress.add(len(data), losses)
        run.stop.check()
        if every and run.step % every == 0:
            save_last(run, {})
    check_loss(run, run.progress.losses)
    return run.progress.mean_losses()


def train_step(run: StepModels, data: StepData) -> Tensor:
    """Gradients of one effective batch, summed over the processes; returns each space's mean loss (spaces,).

    Where recordings are compared with the texts of their own micro-batch, each has a loss of its own, which weighs as
    much as it has captions. Else there is one loss over all texts in the memory of one micro-batch, by gradient caching
    (Gao et al. 2021): a first pass keeps embeddings alone, the loss gives their gradients, and a second pass with the
    same dropout takes those through each micro-batch. Nothing here waits for the device.
    """
    processes, sizes = run.processes, [len(part) for part in data.parts]
    own = processes.own(range(len(sizes)))  # this process's micro-batches
    candidates = [space.candidates(data, run.queue) for space in run.spaces]
    losses = run.queue.blank.new_zeros(len(run.spaces))
    embedded: dict[int, Tensor] = {}
    if run.config.text_negatives == "micro":
        for number in own:
            embeddings = run.embed(data, number)
            part = run.losses(embeddings, data, [number], candidates) * (sizes[number] / len(data))
            part.sum().backward()
            losses, embedded[number] = losses + part.detach(), embeddings.detach()
    else:
        with torch.no_grad():
            embedded = {number: run.embed(data, number) for number in own}
            every = gather(embedded, sizes, processes, run.queue.blank)
        every.requires_grad_()
        whole = run.losses(every, data, list(range(len(sizes))), candidates) / processes.count  # all add the same
        whole.sum().backward()
        gradients = (processes.count * cast(Tensor, every.grad)).split(sizes)
        losses = whole.detach()
        for number in own:
            run.embed(data, number).backward(gradients[number])
    processes.sum_gradients([p for group in run.optimizer.param_groups for p in group["params"]])
    processes.sum([losses])
    if run.config.text_queue:
        run.queue.add(gather(embedded, sizes, processes, run.queue.blank), data.source[np.concatenate(data.parts)])
    return losses


def check_loss(run: Run, losses: Tensor | float) -> None:
    """`UserError` where a loss is not finite, before anything of the step is kept."""
    for space, loss in zip(run.spaces, torch.as_tensor(losses).tolist(), strict=True):
        if not math.isfinite(loss):
            raise UserError(
                f"step {run.step}: expected a finite loss in {space.name}, found {loss}; lower --lr and --text-lr, or "
                f"raise --temperature. The checkpoints in {run.config.checkpoint_dir} are those of the last save"
            )


def save_epoch(run: Run, epoch: int, scores: dict[str, dict[str, float]]) -> set[str]:
    """Save the checkpoints that this epoch is better than, and the last; returns the spaces whose best_r1 it is now."""
    run.progress = run.progress.after_epoch(epoch)
    kept = set()
    for space in run.spaces:
        found, better = scores[space.name], []
        if space.best.add(epoch, (found["t2a_R@1"], found["t2a_MRR"]), space.validation.hits(), space.caption_audio):
            kept.add(space.name)
            better.append("best_r1")
        if found["loss"] < space.best.loss:
            space.best.loss = found["loss"]
            better.append("best_loss")
        if len(run.spaces) > 1:
            better.append("last")  # for use; the run goes on from the joint one
        if better and run.processes.is_main:
            contents = space_contents(run, space, found)
            for which in better:
                save_checkpoint(checkpoint_path(space.config, which), contents)
    save_last(run, scores)
    return kept


def save_last(run: Run, scores: dict[str, dict[str, float]]) -> None:
    """Save the checkpoint to go on from, after the points that lead up to it, so that the curves have no gaps."""
    if run.progress.batches:
        check_loss(run, run.progress.losses)
    if not run.processes.is_main:
        return
    for space in run.spaces:
        if space.writer:
            space.writer.flush()
    run.last.save(run_contents(run, scores))


def measure_best(run: Run, space: Space) -> dict[str, float]:
    """Test metrics of the checkpoint that is kept as best_r1: printed beside chance and put in the summary."""
    run.processes.wait()  # until it is written
    path = checkpoint_path(space.config, "best_r1")
    restore_weights(path, read_checkpoint(path), run.text_encoder, space.projection)
    test = Evaluator(run.text_encoder, run.store, "test", space.config, run.processes)
    metrics = test.measure(run.text_encoder, space.projection)
    if not run.processes.is_main:
        return metrics
    if space.writer:
        log_results(space.writer, space.config, metrics, run.step)
    query_gb = query_bytes(run.text_encoder, run.text_encoder.held, [space.projection]) / 1e9
    entry: dict[str, object] = {
        **metrics,
        "gallery": len(test.gallery),
        "epoch": space.best.r1_epoch,
        "started": run.progress.started,
        "query_gb": query_gb,
    }
    summary = update_summary(Path(run.config.checkpoint_dir), space.name, entry)
    rows = by_subset({**metrics, "gallery": len(test.gallery)}, space.name)
    run.log.info(how_sure(space.best, space.caption_audio))
    run.log.info(f"text -> audio on the test split, epoch {space.best.r1_epoch}\n{table_with_chance(rows)}")
    run.log.info(f"a text query of {space.name} takes about {query_gb:.1f} GB of memory on a CPU")
    report = write_report(path, space.config, run.store.header, space.best.r1_epoch, test, metrics)
    run.log.info(f"written: {path.parent}/{space.name}_*.pt, {summary}, {report}")
    return metrics


if __name__ == "__main__":
    run_script(main)
