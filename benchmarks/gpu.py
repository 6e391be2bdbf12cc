"""What one CUDA card does with this toolkit: encoders, preparing, the training step, validation, a query.

Random weights of the published sizes, made where they are needed; no hub. Prints a table, a line as each figure is
there, and writes the same as JSON. Meant for at most six minutes on one card.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, this folder is the path
from benchmarks.card import encoders, models, training
from benchmarks.card.timing import ceilings
from common.errors import UserError, run_script

PARTS = ("encoders", "prepare", "steps", "plain")
Row = tuple[str, dict[str, float]]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples: python benchmarks/gpu.py\n"
        "          python benchmarks/gpu.py --parts steps --steps default 'gradient caching'\n"
        "          python benchmarks/gpu.py --small        (tiny models, on a CPU too: does it run?)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure besides the card's ceilings (all)")
    add("--steps", nargs="+", metavar="NAME", help="which of the steps, by their names in the table (all)")
    add("--clips", type=int, default=400, help="clips that prepare_dataset.py gets (%(default)s)")
    add("--rounds", type=int, default=2, help="timed steps of each run (%(default)s)")
    add("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="where the figures go (%(default)s)")
    add("--small", action="store_true", help="tiny models and few clips, to try the script")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure part by part."""
    args = build_parser().parse_args(argv)
    if not (torch.cuda.is_available() or args.small):
        raise UserError("expected a CUDA card, found none; --small tries the script on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}", flush=True)
    found: dict[str, dict[str, float]] = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        for title, figures in measure(args, device, Path(name)):
            found[title] = figures
            shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            print(f"{time.perf_counter() - started:5.0f} s  {title:32s} {shown}", flush=True)
            args.json.write_text(json.dumps({"card": card, "torch": torch.__version__, "figures": found}, indent=1))


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> Iterator[Row]:
    """The rows of the table, as they are measured."""
    top = ceilings(device, args.small)
    yield "ceilings", top
    if {"encoders", "prepare"} & set(args.parts):
        models.write_encoders(folder / "models", args.small)
    if "encoders" in args.parts:
        yield from encoders.measure_encoders(folder / "models", device, args.small)
    if "prepare" in args.parts:
        clips = 8 if args.small else args.clips
        table = encoders.write_clips(folder / "clips", clips)
        workers = os.cpu_count() or 1
        yield from encoders.measure_preparing(folder / "models", table, folder / "stores", device, clips, workers)
    if {"steps", "plain"} & set(args.parts):
        yield from measure_training(args, device, folder, top["bf16 product, TFLOP/s"])


def measure_training(args: argparse.Namespace, device: torch.device, folder: Path, ceiling: float) -> Iterator[Row]:
    """The rows of the training step."""
    models.write_store(folder / "embeddings.h5", args.small)
    text_model = models.write_text_model(folder, args.small)
    runs = training.configs(folder / "embeddings.h5", text_model, folder, device)
    if args.small:
        runs = {
            name: replace(each, batch_size=4, gradient_accumulation_steps=2, hidden_dim=16)
            for name, each in runs.items()
        }
    chosen = {name: runs[name] for name in args.steps or runs if name in runs}
    if unknown := set(args.steps or ()) - set(runs):
        raise UserError(f"--steps: expected some of {', '.join(runs)}, found {', '.join(sorted(unknown))}")
    if "plain" in args.parts:
        yield training.measure_plain_loop(runs["default"], 1)
    if "steps" in args.parts:
        yield from training.measure_steps(chosen, ceiling, args.rounds)


if __name__ == "__main__":
    run_script(main)
