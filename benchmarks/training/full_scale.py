"""The bank at the size of MusicBench: a synthetic store of 53,168 recordings at published widths, and some real steps.

The store is written to a temporary folder (8.4 GB in float16) and deleted afterwards. Its vectors are random, its
captions too; what is measured is memory and speed of train.py's own loop with every MERT vector as a candidate.
"""

import argparse
import logging
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
import train
from benchmarks.training.captions import random_captions
from common.errors import run_script
from common.files import replacing
from embedding_models.registry import DEFAULTS, ENCODERS
from examples.make_tiny_models import write_qwen3
from store.reading import Split, StoreHeader, vector_block
from store.writing import create_store, row_chunks, write_statistics
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import plan_epoch

SPLITS = {"train": 47_488, "val": 5_280, "test": 400}
COPIES = 10  # recordings of one source, as in MusicBench's training split


def write_synthetic_store(path: Path, scale: float) -> None:
    """Write the store row by row, so that it is never in memory."""
    rng = np.random.default_rng(0)
    entry = {"id": "random", "revision": None, "sample_rate": 24_000, "recipe": "none"}
    encoders = {name: {**entry, "dim": ENCODERS[name].dim} for name in DEFAULTS}
    header, splits = StoreHeader("random", None, 0, "float16", encoders), {}
    for name, rows in SPLITS.items():
        rows = max(COPIES, int(rows * scale))
        ids = [f"{name}{row}" for row in range(rows)]
        sources = [f"{name}-source{row // COPIES}" for row in range(rows)]
        captions, rows_of = random_captions(rng, 2 * rows), np.repeat(np.arange(rows), 2)
        splits[name] = Split(ids, sources, captions, rows_of, ["main"] * 2 * rows)
    with replacing(path) as beside:
        blocks = create_store(beside, header, splits)
        for name in splits:
            for encoder in encoders:
                for chunk in row_chunks(blocks[vector_block(name, encoder)].map(beside, "r+")):
                    chunk[:] = rng.standard_normal(chunk.shape, np.float32) + 3
        write_statistics(beside, blocks, encoders)


def memory() -> dict[str, float]:
    """GB: what the process holds, what of it is its own (the rest is cached files), and the peak."""
    status = Path("/proc/self/status").read_text()
    return {
        name: int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024 / 1e9
        for name, field in (("held", "VmRSS"), ("own", "RssAnon"), ("peak", "VmHWM"))
    }


def steps(run: train.Run, count: int) -> Iterator[str]:
    """Take steps of the first epoch; a line for each."""
    plan = plan_epoch(run.captions.caption_source, run.config.effective_batch_size, run.config.seed, 1)[:count]
    for module in run.modules():
        module.train()
    (space,) = run.spaces
    start = time.perf_counter()
    for data in run.reader.ahead(0, plan):
        loss = train.train_step(run, data).item()
        run.optimizer.step()
        run.schedule.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        seconds, start = time.perf_counter() - start, time.perf_counter()
        held = ", ".join(f"{name} {value:.2f}" for name, value in memory().items())
        rate = len(space.bank) / seconds
        yield f"step {run.step}: loss {loss:.3f}, {seconds:.1f} s, {rate:,.0f} recordings/s, memory in GB: {held}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.training.full_scale --steps 10",
    )
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="captions in a pass (%(default)s)")
    parser.add_argument("--passes", type=int, default=4, help="passes in a step (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the recordings, for a trial (%(default)s)")
    parser.add_argument("--encoder", choices=DEFAULTS, default="mert", help="audio space (%(default)s)")
    parser.add_argument("--work", type=Path, help="where the temporary folder is made (the system's)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write, train, delete."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder, start = Path(name), time.perf_counter()
        write_synthetic_store(folder / "embeddings.h5", args.scale)
        size = (folder / "embeddings.h5").stat().st_size / 1e9
        print(f"store of {size:.2f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        write_qwen3(folder)
        start = time.perf_counter()
        config = TrainingConfig(
            args.encoder,
            data_path=str(folder / "embeddings.h5"),
            text_model=str(folder / "qwen3"),
            log_dir=str(folder / "logs"),
            checkpoint_dir=str(folder / "checkpoints"),
            batch_size=args.batch_size,
            gradient_accumulation_steps=args.passes,
            audio_negatives="bank",
            text_negatives="batch",
        )
        run = train.prepare(config, logging.getLogger("full_scale"))
        (space,) = run.spaces
        print(
            f"prepared in {time.perf_counter() - start:.0f} s: {len(run.captions)} captions, a bank of "
            f"{len(space.bank)} recordings, {space.bank.nbytes / 1e9:.2f} GB as float32, kept in: {space.bank.place}",
            flush=True,
        )
        for line in steps(run, args.steps):
            print(line, flush=True)


if __name__ == "__main__":
    run_script(main)
