"""What negatives cost: seconds and memory of train.py's own step under each setting, with and without checkpointing.

Compared: audio negatives of the batch against the micro-batch's; gradient caching against a single pass (text negatives
batch against micro, audio negatives batch); the bank against the batch. The settings take turns, in reverse order in
every other round, and a ratio is that of the medians, so that a machine that is busy for a while does not decide it.
Memory (--memory) is the growth of the peak over one step, in a process of its own for each setting; on CUDA it is that
of what torch holds, on a CPU it needs Linux.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
import train
from benchmarks.own_process import in_own_process, peak_growth
from benchmarks.training.captions import WORDS
from common.errors import run_script
from examples.make_tiny_models import QWEN3_SHAPE, write_qwen3
from store.reading import Split, StoreHeader
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import plan_epoch

SETTINGS = {  # name: audio negatives, text negatives
    "micro": ("micro", "micro"),
    "batch": ("batch", "micro"),
    "cached": ("batch", "batch"),
    "bank": ("bank", "micro"),
}
AGAINST = {"batch": "micro", "cached": "batch", "bank": "batch"}


def write_parts(folder: Path, args: argparse.Namespace) -> None:
    """Write a store of random vectors with captions of 10 to 60 words, and a text model unless one is given."""
    rng = np.random.default_rng(0)
    entry = {"id": "random", "revision": None, "dim": args.audio_dim, "sample_rate": 24_000, "recipe": "none"}
    header, splits, vectors = StoreHeader("random", None, 0, "float32", {"audio": entry}), {}, {}
    for split, rows in (("train", args.recordings), ("val", 4), ("test", 4)):
        names = [f"{split}{row}" for row in range(rows)]
        texts = [" ".join(rng.choice(WORDS, rng.integers(10, 60))) for _ in names]
        splits[split] = Split(names, names, texts, np.arange(rows), ["main"] * rows)
        vectors[split, "audio"] = rng.standard_normal((rows, args.audio_dim), np.float32)
    write_store(folder / "embeddings.h5", header, splits, vectors)
    if not args.text_model:
        torch.manual_seed(0)
        shape = {"hidden_size": args.width, "intermediate_size": 3 * args.width, "num_hidden_layers": args.layers}
        write_qwen3(folder, QWEN3_SHAPE | shape)


def prepared(folder: Path, args: argparse.Namespace, name: str, checkpointing: str) -> train.Run:
    """A run of train.py with this setting, in training mode."""
    audio_negatives, text_negatives = SETTINGS[name]
    config = TrainingConfig(
        "audio",
        data_path=str(folder / "embeddings.h5"),
        text_model=args.text_model or str(folder / "qwen3"),
        log_dir=str(folder / "logs"),
        checkpoint_dir=str(folder / "checkpoints"),
        batch_size=args.batch_size,
        gradient_accumulation_steps=args.passes,
        audio_negatives=audio_negatives,
        text_negatives=text_negatives,
        gradient_checkpointing=checkpointing,
    )
    run = train.prepare(config, logging.getLogger("negatives_cost"))
    for module in run.modules():
        module.train()
    return run


def seconds_of_step(run: train.Run, batch: np.ndarray) -> float:
    """Time of one step's gradients."""
    start = time.perf_counter()
    train.train_step(run, run.reader.read(0, batch)).tolist()  # numbers, so that the device is done
    seconds = time.perf_counter() - start
    run.optimizer.zero_grad(set_to_none=True)
    return seconds


def plan(run: train.Run) -> list[np.ndarray]:
    """The batches of the first epoch."""
    return plan_epoch(run.captions.caption_source, run.config.effective_batch_size, run.config.seed, epoch=1)


def compare_times(folder: Path, args: argparse.Namespace, checkpointing: str) -> dict[str, float]:
    """Median seconds of a step under each setting, taken in turn in one process."""
    with_bank = prepared(folder, args, "bank", checkpointing)
    runs = {}
    for name, (audio_negatives, text_negatives) in SETTINGS.items():
        config = replace(with_bank.config, audio_negatives=audio_negatives, text_negatives=text_negatives)
        (space,) = with_bank.spaces
        space = replace(space, config=replace(config), bank=space.bank if name == "bank" else None)
        runs[name] = replace(with_bank, config=config, spaces=[space])
    batches = plan(with_bank)
    seconds = {name: [] for name in SETTINGS}
    for number in range(args.rounds + 1):
        for name in list(SETTINGS)[:: -1 if number % 2 else 1]:
            taken = seconds_of_step(runs[name], batches[number % len(batches)])
            if number:  # the first round warms up
                seconds[name].append(taken)
    return {name: statistics.median(each) for name, each in seconds.items()}


def step_memory(folder: Path, args: argparse.Namespace, name: str, checkpointing: str) -> int:
    """The bytes by which a step raises the peak over what the prepared run holds."""
    torch.set_num_threads(args.threads)
    run = prepared(folder, args, name, checkpointing)
    batch = plan(run)[0]
    seconds_of_step(run, batch[:2])  # what libraries set up at their first call is not the step's
    data = run.reader.read(0, batch)
    if run.config.torch_device.type != "cuda":
        return peak_growth(lambda: train.train_step(run, data))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train.train_step(run, data)
    return torch.cuda.max_memory_allocated() - before


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.training.negatives_cost --layers 6 --width 384 --audio-dim 1536 "
        "--batch-size 32",
    )
    parser.add_argument("--text-model", metavar="STR", help="a text model (default: a random Qwen3 of the size below)")
    for flag, value, text in (
        ("--layers", 2, "layers of the text model"),
        ("--width", 128, "its width"),
        ("--audio-dim", 576, "width of the audio space"),
        ("--recordings", 1024, "training recordings"),
        ("--batch-size", 4, "captions in a pass"),
        ("--passes", 8, "passes in a step"),
        ("--rounds", 5, "timed steps of each setting"),
        ("--threads", 1, "threads on the CPU"),
    ):
        parser.add_argument(flag, type=int, default=value, metavar="INT", help=f"{text} (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="measure memory too, in eight processes")
    return parser


def line(name: str, seconds: dict[str, float], grown: dict[str, float]) -> str:
    """A setting's line of the table."""
    text = f"  {name:<8} {seconds[name]:8.3f} s a step"
    base = AGAINST.get(name)
    if base:
        text += f"   {seconds[name] / seconds[base]:.2f} x {base}"
    if grown:
        text += f"   {grown[name] / 1e6:.0f} MB"
    if grown and base:
        text += f"   {grown[name] / grown[base]:.2f} x {base}"
    return text


def main(argv: list[str] | None = None) -> None:
    """Print a table for steps with and without activation checkpointing."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder, args)
        print(f"load average {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} processors")
        for checkpointing in ("off", "on"):
            seconds = compare_times(folder, args, checkpointing)
            print(f"activation checkpointing {checkpointing}")
            grown = {}
            if args.memory:
                measure = partial(step_memory, folder, args)
                grown = {each: in_own_process(partial(measure, each, checkpointing)) for each in SETTINGS}
            for each in SETTINGS:
                print(line(each, seconds, grown), flush=True)


if __name__ == "__main__":
    run_script(main)
