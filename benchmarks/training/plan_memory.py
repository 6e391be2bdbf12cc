"""The plan's peak memory beside a real run's: train.py on a CPU with a text model of 2 GB and more, from start to end.

A Qwen3 of the 4 B model's width and vocabulary with fewer layers is written in bf16, as the published weights are, and
run in float32, so that every weight is resident: what is only mapped from a file would not count. Each run has a
process of its own; what counts is by how much its peak of resident memory (VmHWM, Linux) exceeds what was resident when
everything was imported and nothing loaded. The ratio is that growth over the plan's tensors; the allowance for CUDA has
no part in it. Passes are large, as real ones are: blocks of up to 32 MB stay with glibc when they are freed, in pieces
that later ones do not fit, and a run of small passes takes about a quarter more than its tensors.
"""

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
import train
from benchmarks.own_process import in_own_process, peak_growth
from benchmarks.preparing.full_size import QWEN3_SHAPE
from common.errors import run_script
from examples.make_tiny_models import CORPUS, write_qwen3
from store.reading import EmbeddingStore, Split, StoreHeader
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.planning.footprint import PARTS, Shape, footprint

LIMIT = 0.15  # by which growth and plan may differ
STEPS = 2  # the optimizer's moments are there from the second on


def write_parts(folder: Path, args: argparse.Namespace) -> None:
    """Write the text model, and a store whose captions are all longer than `max_length` tokens."""
    torch.manual_seed(0)
    write_qwen3(folder, QWEN3_SHAPE | {"num_hidden_layers": args.layers})
    AutoModel.from_pretrained(folder / "qwen3", dtype=torch.bfloat16).save_pretrained(folder / "qwen3")
    entry = {"id": "random", "revision": None, "dim": args.audio_dim, "sample_rate": 24_000, "recipe": "none"}
    header, splits, vectors = StoreHeader("random", None, 0, "float32", {"audio": entry}), {}, {}
    for split, rows in (("train", STEPS * args.batch_size * args.passes), ("val", 4), ("test", 4)):
        names = [f"{split}{row}" for row in range(rows)]
        texts = [f"{name} {' '.join(CORPUS)}" for name in names]
        splits[split] = Split(names, names, texts, np.arange(rows), ["main"] * rows)
        vectors[split, "audio"] = np.random.default_rng(rows).standard_normal((rows, args.audio_dim), np.float32)
    write_store(folder / "embeddings.h5", header, splits, vectors)


def settings(folder: Path, args: argparse.Namespace, checkpointing: str) -> dict[str, object]:
    """The run's settings, by the names of `TrainingConfig`."""
    return {
        "audio_encoder": "audio",
        "data_path": str(folder / "embeddings.h5"),
        "text_model": str(folder / "qwen3"),
        "log_dir": str(folder / "logs"),
        "checkpoint_dir": str(folder / f"checkpoints_{checkpointing}"),
        "batch_size": args.batch_size,
        "gradient_accumulation_steps": args.passes,
        "max_length": args.max_length,
        "text_negatives": args.text_negatives,
        "epochs": 1,
        "device": "cpu",
        "gradient_checkpointing": checkpointing,
    }


def resident_growth(folder: Path, args: argparse.Namespace, checkpointing: str) -> int:
    """Bytes by which a whole run raises the peak of resident memory, from start to end."""
    os.chdir(folder)  # for train.log
    torch.set_num_threads(args.threads)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings(folder, args, checkpointing).items()]
    return peak_growth(lambda: train.main(flags))


def planned(folder: Path, args: argparse.Namespace, checkpointing: str) -> tuple[dict[str, int], float]:
    """The plan's bytes by part, and the seconds it took."""
    config = TrainingConfig(**settings(folder, args, checkpointing))
    start = time.perf_counter()
    shape = Shape.of(EmbeddingStore(config.data_path), config.audio_encoders)
    found = footprint(config, shape, train.train_step)
    return found.peak, time.perf_counter() - start


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.training.plan_memory --layers 3",
    )
    for flag, value, text in (
        ("--layers", 2, "layers of the text model, of 36"),
        ("--audio-dim", 1536, "width of the audio space"),
        ("--batch-size", 32, "captions in a pass"),
        ("--passes", 1, "passes in a step"),
        ("--max-length", 104, "tokens of a text"),
        ("--threads", 2, "threads on the CPU"),
    ):
        parser.add_argument(flag, type=int, default=value, metavar="INT", help=f"{text} (default: %(default)s)")
    parser.add_argument("--text-negatives", choices=("micro", "batch"), default="micro", help="(default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print plan and growth with and without checkpointing; returns 1 where they are further apart than they may be."""
    args = build_parser().parse_args(argv)
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_own_process(partial(write_parts, folder, args))
        for checkpointing in tqdm(("on", "off"), desc="runs", leave=False):
            parts, seconds = in_own_process(partial(planned, folder, args, checkpointing))
            grown = in_own_process(partial(resident_growth, folder, args, checkpointing))
            total = sum(parts.values())
            worst = max(worst, abs(grown / total - 1))
            print(f"checkpointing {checkpointing}: " + ", ".join(f"{part} {parts[part] / 1e9:.2f}" for part in PARTS))
            print(
                f"  plan {total / 1e9:.3f} GB ({seconds:.1f} s), growth of the peak {grown / 1e9:.3f} GB, "
                f"ratio {grown / total:.3f}",
                flush=True,
            )
    print(f"furthest from 1 by {worst:.1%}; allowed {LIMIT:.0%}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    run_script(main)
