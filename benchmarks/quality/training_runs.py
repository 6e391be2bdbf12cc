"""Runs of train.py for the comparisons: a process each, results as JSON lines, tables of mean and spread."""

import itertools
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UserError
from text_to_audio.measuring.summary import COLUMNS, FILE_NAME, read_summary

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("t2a_R@1", "t2a_R@10", "t2a_MRR", "a2t_R@1")


def train_once(
    encoder: str, flags: list[str], timed: bool = False, measure: Callable[[Path], dict] | None = None
) -> dict:
    """Train with these flags and return the summary's entry of `encoder`, with what the run took.

    Adds "seconds" and "cpu_seconds" of the whole process, "step_seconds" (see there) if `timed`, "ridge" where the
    flags have --baseline, and what `measure` finds in the folder of checkpoints. Paths in the flags are absolute: the
    process has an empty folder of its own. `UserError` where it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outputs = ["--checkpoint-dir", str(folder / "checkpoints"), "--log-dir", str(folder / "logs")]
        command = [sys.executable, str(ROOT / "train.py"), "--audio-encoder", encoder, *flags, *outputs]
        start, before = time.perf_counter(), cpu_seconds_of_children()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise UserError(f"{' '.join(command)}: ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        entry = read_summary(folder / "checkpoints" / FILE_NAME)[encoder]
        entry |= {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds_of_children() - before, 1)}
        if timed:
            entry["step_seconds"] = step_seconds(folder / "logs" / encoder)
        if "--baseline" in flags:
            entry["ridge"] = ridge_row(encoder, (folder / "train.log").read_text(encoding="utf-8"))
        return entry | (measure(folder / "checkpoints") if measure else {})


def cpu_seconds_of_children() -> float:
    """Processor time of the runs that have ended, which a busy machine stretches less than the clock's."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def step_seconds(curves: Path) -> float:
    """Median seconds from step to step, from the instants of TensorBoard's points.

    The median leaves out the pairs of points that have a validation between them, as long as they are the fewer.
    """
    events = EventAccumulator(str(curves), size_guidance={"scalars": 0}).Reload()
    points = events.Scalars("train/loss")
    if len(points) < 2:
        raise UserError(f"expected two points of train/loss or more to take the time from, found {len(points)}")
    pairs = itertools.pairwise(points)
    return round(statistics.median((b.wall_time - a.wall_time) / (b.step - a.step) for a, b in pairs), 4)


def ridge_row(encoder: str, log: str) -> dict[str, float]:
    """Text -> audio metrics of the ridge regression that --baseline prints."""
    found = re.search(rf"^{re.escape(encoder)} ridge((?:\s+\d[\d.]*){{{len(COLUMNS)}}})\s*$", log, re.MULTILINE)
    if not found:
        raise UserError(f"expected a line '{encoder} ridge' in train.log, found none")
    return dict(zip(COLUMNS, map(float, found.group(1).split()), strict=True))


def read_results(path: Path) -> list[dict]:
    """The results so far; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_result(path: Path, result: dict) -> None:
    """Add a line; one that a kill cut off is ended first, so that it spoils no other."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean and sample standard deviation as text; the mean alone of one value, nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compared(results: list[dict], base: list[dict]) -> list[str]:
    """Cells of one setting: METRICS, then what R@1, R@10 and MRR gain on `base`, pairwise by seed."""
    cells = [spread([each[name] for each in results], digits_of(name)) for name in METRICS]
    by_seed = {each["seed"]: each for each in base}
    pairs = [(each, by_seed[each["seed"]]) for each in results if each["seed"] in by_seed]
    for name in METRICS[:3]:
        gains = [each[name] - other[name] for each, other in pairs if each is not other]
        cells.append(spread(gains, digits_of(name), "+") if gains else "")
    return cells


def digits_of(metric: str) -> int:
    """Digits after the point: MRR is from 0 to 1, the others are percentages."""
    return 3 if metric.endswith("MRR") else 1
