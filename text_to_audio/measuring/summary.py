"""training_summary.json: the test metrics of every audio encoder, and the table that is made of it."""

import argparse
import json
import sys
from pathlib import Path

from common.errors import UserError, run_script
from common.files import Lock, publish
from text_to_audio.measuring.metrics import chance_level, rounded

FILE_NAME = "training_summary.json"
COLUMNS = ("t2a_R@1", "t2a_R@5", "t2a_R@10", "t2a_MRR", "t2a_median_rank")


def update_summary(folder: Path, encoder: str, metrics: dict[str, float | int]) -> Path:
    """Put one encoder's entry into the folder's summary; the other encoders' entries stay. Returns its path.

    Processes that finish at the same time wait for each other. `UserError` where the file there is not JSON or cannot
    be written; it stays as it was.
    """
    path = folder / FILE_NAME
    lock = Lock(folder / f".{FILE_NAME}.lock", wait=True)
    try:
        summary = read_summary(path) if path.exists() else {}
        summary[encoder] = rounded(metrics)
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        publish(beside, path)
    except OSError as error:
        raise UserError(f"{path}: could not write the metrics of {encoder} ({error.strerror})") from error
    finally:
        lock.release()
    return path


def read_summary(path: Path) -> dict[str, dict]:
    """Encoder -> metrics; `UserError` where the file is missing or not a summary."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; train.py writes it when a training ends") from error
    except ValueError as error:
        raise UserError(f"{path}: expected JSON as train.py writes it, found {error}") from error
    if not isinstance(summary, dict) or not all(isinstance(entry, dict) for entry in summary.values()):
        raise UserError(f"{path}: expected an object with an entry per audio encoder")
    return summary


def table(rows: dict[str, dict[str, float]]) -> str:
    """Text -> audio metrics, a line per name."""
    lines = [f"{'':<16}" + "".join(f"{column.removeprefix('t2a_'):>14}" for column in COLUMNS)]
    for name, metrics in rows.items():
        lines.append(f"{name:<16}" + "".join(f"{rounded(metrics)[column]:>14}" for column in COLUMNS))
    return "\n".join(lines)


def table_with_chance(metrics: dict[str, dict[str, float]]) -> str:
    """The table of {name: metrics}, with a random ranking's line for every gallery size in it."""
    galleries = sorted({int(entry["gallery"]) for entry in metrics.values()})
    chance = {f"chance of {gallery}": chance_level(gallery) for gallery in galleries}
    return table({**metrics, **chance})


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Print the test metrics of every trained audio encoder beside chance.",
        epilog="example: python -m text_to_audio.measuring.summary checkpoints",
    )
    parser.add_argument("folder", type=Path, help="the --checkpoint-dir of the training")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    summary = read_summary(build_parser().parse_args(argv).folder / FILE_NAME)
    sys.stdout.write(f"text -> audio on the test split\n{table_with_chance(summary)}\n")


if __name__ == "__main__":
    run_script(main)
