"""Render demo music as a library holds it: tagged FLAC files, a folder for each style, all of it unseen by training."""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, this folder is the path
from common.errors import UserError, run_script
from examples.demo_captions import CHORD_WORDS, DRUM_WORDS, LEAD_WORDS
from examples.demo_instruments import SAMPLE_RATE
from examples.demo_music import STYLES, Piece, draw_piece
from examples.make_demo_dataset import Clip, plan, samples

MORE = 4  # beside 0 to 3, which make_demo_dataset.py draws with: pieces that are in no data set


class Song(NamedTuple):
    """A recording, where it goes within the library, and its tags."""

    path: Path
    clip: Clip
    title: str
    artist: str


def title(piece: Piece) -> str:
    """What one would call it at a glance: "Calm bossa nova with piano"."""
    return f"{piece.mood.capitalize()} {piece.style} with {LEAD_WORDS[piece.lead][0]}"


def artist(piece: Piece) -> str:
    """Who plays, the lead first, each instrument once: "piano, nylon-string guitar, upright bass, tabla"."""
    players = [LEAD_WORDS[piece.lead][0], CHORD_WORDS[piece.chords][0], piece.bass]
    drums = DRUM_WORDS[piece.drums][0] if piece.drums else None
    return ", ".join(dict.fromkeys(name for name in (*players, drums) if name))


def customary_piece(rng: np.random.Generator) -> Piece:
    """A random piece whose lead is one of its style's own, as in most people's libraries: no metal with a harp."""
    while True:
        piece = draw_piece(rng)
        if piece.lead in STYLES[piece.style].leads:
            return piece


def songs(test: int, more: int, seed: int) -> list[Song]:
    """The test recordings of the data set with this seed, and `more` that are in none."""
    clips = plan(1, test, seed, 0)[1]  # these do not depend on how many train sources there are
    for place in range(more):
        piece = customary_piece(np.random.default_rng([seed, MORE, place]))
        clips.append(Clip("", piece, SAMPLE_RATE, 1))
    found = []
    for number, clip in enumerate(clips, start=1):
        name = title(clip.piece)
        found.append(Song(Path(clip.piece.style, f"{number:03} {name}.flac"), clip, name, artist(clip.piece)))
    return found


def write_song(out: Path, song: Song) -> None:
    """Render one song into the folder `out`, in 16 bits."""
    path = out / song.path
    path.parent.mkdir(parents=True, exist_ok=True)
    rate, channels = song.clip.sample_rate, song.clip.channels
    with soundfile.SoundFile(path, "w", rate, channels, subtype="PCM_16", format="FLAC") as file:
        file.title, file.artist = song.title, song.artist
        file.write(samples(song.clip))


def _write(task: tuple[Path, Song]) -> None:
    write_song(*task)


def make_library(out: Path, test: int, more: int, seed: int, workers: int | None = None) -> list[Song]:
    """Render the whole library into `out`; returns what is in it. `UserError` where the folder cannot be written."""
    found = songs(test, more, seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with multiprocessing.Pool(workers or min(4, os.cpu_count() or 1)) as pool:
            tasks = [(out, song) for song in found]
            for _ in tqdm(pool.imap(_write, tasks, chunksize=4), "rendering", len(tasks), unit="song"):
                pass
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{out}: expected a folder that can be written, found: {error}") from error
    return found


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="example: python -m examples.make_demo_library --out demo/music --test 64 --more 136",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the music")
    add("--test", type=int, default=64, help="test recordings, those of make_demo_dataset.py (default: %(default)s)")
    add("--more", type=int, default=136, help="recordings that are in no data set (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed is other music (default: %(default)s)")
    add("--workers", type=int, help="processes (default: one per core, at most 4)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check the numbers, render, and say what was written."""
    args = build_parser().parse_args(argv)
    for name, lowest in (("test", 0), ("more", 0), ("seed", 0), ("workers", 1)):
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name}: expected {lowest} or more, found {value}")
    if args.test + args.more == 0:
        raise UserError("--test and --more: expected a recording at least, found 0 of each")
    found = make_library(args.out, args.test, args.more, args.seed, args.workers)
    print(f"{args.out}: {len(found)} tagged recordings, {args.test} of them the test recordings")
    return 0


if __name__ == "__main__":
    run_script(main)
