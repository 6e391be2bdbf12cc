"""Measure a checkpoint on a stored split again, without training."""

import argparse
import json
import sys

from text_to_audio.checkpoints import read_checkpoint
from text_to_audio.config import TrainingConfig
from text_to_audio.errors import UserError, run_script
from text_to_audio.evaluation import Evaluator, by_subset
from text_to_audio.inference import load_checkpoint
from text_to_audio.metrics import rounded
from text_to_audio.store import EmbeddingStore
from text_to_audio.summary import table_with_chance


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Retrieval metrics of a checkpoint on a split of a store.",
        epilog="examples: python evaluate.py --checkpoint checkpoints/muq_best_r1.pt\n"
        "          python evaluate.py --checkpoint checkpoints/muq_last.pt --split val --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint written by train.py")
    parser.add_argument("--data-path", metavar="FILE", help="the store (default: the one it was trained on)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="(default: %(default)s)")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)", metavar="STR"
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON and nothing else")
    return parser


def open_store(checkpoint: str, config: TrainingConfig, data_path: str | None) -> EmbeddingStore:
    """The store to measure on; `UserError` where its space is not as wide as the checkpoint's."""
    store = EmbeddingStore(data_path or config.data_path)
    found = store.dim(config.audio_encoder)
    if found != config.audio_dim:
        raise UserError(
            f"{store.path}: expected {config.audio_encoder} vectors {config.audio_dim} wide, as {checkpoint} was "
            f"trained on, found {found}"
        )
    return store


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print the metrics and return them, unrounded."""
    arguments = build_parser().parse_args(argv)
    stored = read_checkpoint(arguments.checkpoint)["config"]
    store = open_store(
        arguments.checkpoint, TrainingConfig.from_dict(stored, arguments.checkpoint), arguments.data_path
    )
    text_encoder, projection, config = load_checkpoint(arguments.checkpoint, arguments.device)
    evaluator = Evaluator(text_encoder, store, arguments.split, config)
    metrics = evaluator.measure(text_encoder, projection)
    metrics["gallery"] = len(evaluator.gallery)
    if arguments.json:
        sys.stdout.write(json.dumps(rounded(metrics), indent=2) + "\n")
        return metrics
    sys.stdout.write(
        f"text -> audio on the {arguments.split} split of {store.path}\n"
        f"{table_with_chance(by_subset(metrics, config.audio_encoder))}\n"
    )
    sys.stdout.write("\n".join(f"{name}: {value}" for name, value in rounded(metrics).items()) + "\n")
    return metrics


if __name__ == "__main__":
    run_script(main)
