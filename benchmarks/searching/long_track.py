"""Does memory stay flat on a long track? One is written, embedded as index_library.py does, and memory is watched."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
from common.errors import run_script
from embedding_models.registry import ENCODERS, add_encoder_flags, spec_from_flags
from embedding_models.tracks import embed_track

RATE = 44_100
BATCH = 8  # windows, index_library.py's default


def write_track(path: Path, minutes: int) -> None:
    """Write a stereo FLAC of noise under a slow swell, a minute at a time."""
    rng = np.random.default_rng(0)
    swell = 0.1 + 0.2 * np.sin(np.linspace(0, np.pi, 60 * RATE))[:, None]
    with soundfile.SoundFile(path, "w", RATE, 2) as file:
        for _ in range(minutes):
            file.write(swell * rng.standard_normal((60 * RATE, 2)).clip(-3, 3))


def measure(path: Path, encoder) -> str:
    """Embed a track; windows, seconds, and resident memory after each tenth of it."""
    process, held, started = psutil.Process(), [], time.perf_counter()
    track, parts = embed_track(encoder, path, BATCH)
    windows = 0
    for vectors in parts:
        windows += len(vectors)
        held.append(process.memory_info().rss / 1e6)
    shown = " ".join(f"{held[i * (len(held) - 1) // 10]:.0f}" for i in range(11))
    taken = time.perf_counter() - started
    return f"{track.seconds / 60:5.0f} min, {windows:5} windows, {taken:6.1f} s; MB at each tenth: {shown}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python -m benchmarks.searching.long_track --muq-model demo/models/muq_mulan "
        "--muq-backbone demo/models/muq_large   (after make demo)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--encoder", default="muq", choices=tuple(ENCODERS), help="audio encoder (default: %(default)s)")
    add("--minutes", type=int, nargs="+", default=[2, 10, 180], help="lengths of the tracks (default: 2 10 180)")
    add_encoder_flags(parser, "the published one")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    encoder = spec_from_flags(args, ENCODERS[args.encoder], "auto", "float32").load()
    with tempfile.TemporaryDirectory() as name:
        for minutes in args.minutes:
            path = Path(name, f"{minutes}.flac")
            write_track(path, minutes)
            print(measure(path, encoder), flush=True)
            path.unlink()


if __name__ == "__main__":
    run_script(main)
