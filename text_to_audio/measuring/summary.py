"""training_summary.json: the test metrics of every audio encoder, and the table that is made of it."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import UserError, run_script
from common.files import locked, replacing
from text_to_audio.measuring.metrics import chance_level, rounded

FILE_NAME = "training_summary.json"
COLUMNS = ("t2a_R@1", "t2a_R@5", "t2a_R@10", "t2a_MRR", "t2a_median_rank")


def update_summary(folder: Path, encoder: str, metrics: dict[str, Any]) -> Path:
    """Put one encoder's entry into the folder's summary; the other encoders' entries stay. Returns its path.

    Processes that finish at the same time wait for each other. `UserError` where the file there is not JSON or cannot
    be written; it stays as it was.
    """
    return _change(folder, lambda summary: {**summary, encoder: rounded(metrics)})


def rename_earlier(folder: Path, encoders: Iterable[str]) -> dict[str, str]:
    """Name the entries of these encoders after the time their runs began, to make room; returns encoder -> new name.

    "muq" becomes "muq (2026-11-27 02:10)", with seconds where there is such an entry already. `UserError` as
    `update_summary`.
    """
    path, names = folder / FILE_NAME, dict[str, str]()
    if not path.exists():
        return names

    def renamed(summary: dict[str, dict]) -> dict[str, dict]:
        for encoder in encoders:
            if encoder in summary:
                names[encoder] = _earlier_name(encoder, summary, path)
        return {names.get(name, name): entry for name, entry in summary.items()}

    _change(folder, renamed)
    return names


def _earlier_name(encoder: str, summary: dict[str, dict], path: Path) -> str:
    written = datetime.fromtimestamp(path.stat().st_mtime).isoformat(timespec="milliseconds")
    started = str(summary[encoder].get("started", written)).replace("T", " ")  # old versions did not say when
    names = [f"{encoder} ({started[:length]})" for length in (16, 19, 23)]  # to the minute, second, millisecond
    return next((name for name in names if name not in summary), names[-1])


def _change(folder: Path, change: Callable[[dict[str, dict]], dict[str, dict]]) -> Path:
    path = folder / FILE_NAME
    try:
        with locked(folder / f".{FILE_NAME}.lock"):
            summary = change(read_summary(path) if path.exists() else {})
            with replacing(path) as beside:
                beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: could not write the test metrics ({error.strerror})") from error
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
    width = max(16, *(len(name) + 2 for name in rows))
    lines = [" " * width + "".join(f"{column.removeprefix('t2a_'):>14}" for column in COLUMNS)]
    for name, metrics in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{rounded(metrics)[column]:>14}" for column in COLUMNS))
    return "\n".join(lines)


def table_with_chance(metrics: dict[str, dict[str, float]]) -> str:
    """The table of {name: metrics}, with a random ranking's line for every gallery size in it."""
    galleries = sorted({int(entry["gallery"]) for entry in metrics.values()})
    chance = {f"chance of {gallery}": chance_level(gallery) for gallery in galleries}
    return table({**metrics, **chance})


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
