"""Render a small data set of demo music in MusicBench's own files: three JSON Lines files and MusicBench.tar.gz."""

import argparse
import gzip
import io
import json
import multiprocessing
import os
import sys
import tarfile
import wave
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, this folder is the path
from common.errors import UserError, run_script
from examples.demo_captions import chord_names, controls, describe, with_controls
from examples.demo_instruments import SAMPLE_RATE
from examples.demo_music import SECONDS, Piece, draw_piece, render

ID_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
TEMPO_FACTORS = {1: 0.8, 2: 0.9, 3: 1.1, 4: 1.2}  # by MusicBench's number of the copy; our own factors
SEMITONES = {5: -3, 6: -2, 7: -1, 8: 1, 9: 2, 10: 3}
VOLUME_COPY = 11
ODD_FORMATS = ((22_050, 1), (44_100, 2), (48_000, 2))  # every tenth source, since MusicBench's are not known
NAMES = ("MusicBench_train.json", "MusicBench_test_A.json", "MusicBench_test_B.json", "MusicBench.tar.gz")


class Clip(NamedTuple):
    """One recording to render: `location` as in MusicBench's metadata, and the wav's format."""

    location: str
    piece: Piece
    sample_rate: int
    channels: int


def copy_of(piece: Piece, number: int) -> Piece:
    """The piece as MusicBench's copy `number` has it: 1-4 tempo, 5-10 pitch, 11 a change of volume.

    Music without a beat has a tempo of None; its copies 1-4 are refused with ValueError.
    """
    if number in TEMPO_FACTORS:
        if piece.bpm is None:
            raise ValueError("music without a beat has no tempo to change")
        factor = TEMPO_FACTORS[number]
        return replace(piece, bpm=piece.bpm * factor, seconds=min(SECONDS, SECONDS / factor))
    if number in SEMITONES:
        return replace(piece, transpose=piece.transpose + SEMITONES[number])
    if number == VOLUME_COPY:
        return replace(piece, volume="rising" if piece.seed % 2 else "falling")
    raise ValueError(f"MusicBench numbers its copies 1 to 11, not {number}")


def copy_numbers(piece: Piece) -> list[int]:
    """The copies that can be made of a piece."""
    return [*(TEMPO_FACTORS if piece.bpm else ()), *SEMITONES, VOLUME_COPY]


def plan(sources: int, test: int, seed: int, copies: int) -> tuple[list[Clip], list[Clip]]:
    """The train and the test recordings; each source's draws depend on `seed` and its own place alone."""
    train, held_out = [], []
    for index in range(sources + test):
        # the test sources are counted from another origin, so that --sources does not change them
        is_test = index >= sources
        place = index - sources if is_test else index
        rng = np.random.default_rng([seed, int(is_test), place])
        name = "".join(ID_LETTERS[i] for i in rng.integers(len(ID_LETTERS), size=11))
        piece = draw_piece(rng)
        odd = place % 10 == 9
        wav_format = ODD_FORMATS[place // 10 % len(ODD_FORMATS)] if odd else (SAMPLE_RATE, 1)
        if is_test:
            held_out.append(Clip(f"data/{name}.wav", piece, *wav_format))
            continue
        train.append(Clip(f"data/{name}.wav", piece, *wav_format))
        numbers = rng.permutation(copy_numbers(piece))[:copies]
        train += [Clip(f"data_aug2/{name}_{j}.wav", copy_of(piece, int(j)), *wav_format) for j in numbers]
    return train, held_out


def row(clip: Clip, main: str, alt: str) -> dict:
    """One line of MusicBench's metadata. Where there is no beat, bpm is null and the list of beats empty."""
    piece = clip.piece
    count = int(np.ceil(piece.seconds / piece.beat_seconds - 1e-9)) if piece.bpm else 0
    names, times = chord_names(piece)
    return {
        "dataset": "MusicBench",
        "location": clip.location,
        "main_caption": main,
        "alt_caption": alt,
        **controls(piece),
        "beats": [[i * piece.beat_seconds for i in range(count)], [float(i % piece.meter + 1) for i in range(count)]],
        "bpm": piece.bpm,
        "chords": names,
        "chords_time": times,
        "key": list(piece.key),
        "keyprob": [1.0],  # known, not estimated
        "is_audioset_eval_mcaps": False,
    }


def metadata(train: list[Clip], held_out: list[Clip], seed: int) -> dict[str, list[dict]]:
    """Rows of the three files. As in MusicBench, train captions carry none, some or all control sentences,
    some recordings have a second row, and test_B is test_A's recordings with control sentences."""
    rows: dict[str, list[dict]] = {name: [] for name in NAMES[:3]}
    for index, clip in enumerate(train):
        rng = np.random.default_rng([seed, 2, index])
        for _ in range(2 if index % 16 == 15 else 1):
            main, alt = describe(clip.piece, rng)
            main = with_controls(main, clip.piece, rng, int(rng.choice([0, 1, 2, 4], p=[0.5, 0.2, 0.2, 0.1])))
            rows["MusicBench_train.json"].append(row(clip, main, alt))
    for index, clip in enumerate(held_out):
        rng = np.random.default_rng([seed, 3, index])
        main, alt = describe(clip.piece, rng)
        rows["MusicBench_test_A.json"].append(row(clip, main, alt))
        main, alt = (with_controls(text, clip.piece, rng, count) for text, count in ((main, 4), (alt, 2)))
        rows["MusicBench_test_B.json"].append(row(clip, main, alt))
    return rows


def samples(clip: Clip) -> np.ndarray:
    """The rendered clip at its own rate, (samples, channels) in 16 bits."""
    sound = render(clip.piece, clip.channels)
    if clip.sample_rate != SAMPLE_RATE:
        sound = np.stack([soxr.resample(channel, SAMPLE_RATE, clip.sample_rate) for channel in sound])
    return (np.clip(sound, -1, 1).T * 32767).round().astype("<i2")


def wav_bytes(clip: Clip) -> bytes:
    """The clip as a PCM16 wav file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(clip.channels)
        file.setsampwidth(2)
        file.setframerate(clip.sample_rate)
        file.writeframes(samples(clip).tobytes())
    return buffer.getvalue()


def write_tar(path: Path, clips: list[Clip], workers: int) -> None:
    """Render all clips into a gzipped tar whose bytes depend on the clips alone."""
    with (
        multiprocessing.Pool(workers) as pool,
        path.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for clip, data in zip(
            clips, tqdm(pool.imap(wav_bytes, clips, chunksize=2), "rendering", len(clips), unit="clip"), strict=True
        ):
            member = tarfile.TarInfo(f"datashare/{clip.location}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def make_dataset(
    out: Path, sources: int = 160, test: int = 64, seed: int = 0, copies: int = 1, workers: int | None = None
) -> dict[str, int]:
    """Write the data set into the folder `out` and return its numbers of recordings and rows.

    Each file is written beside its name and renamed, the tar last. Raises `UserError` where `out` cannot be
    written. The files are the same bytes for any number of `workers` (default: one per core, four at most).
    """
    train, held_out = plan(sources, test, seed, copies)
    rows = metadata(train, held_out, seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = {name: out / f"{name}.partial-{os.getpid()}" for name in NAMES}
        for name, lines in rows.items():
            partial[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        write_tar(partial[NAMES[3]], train + held_out, workers or min(4, os.cpu_count() or 1))
        for name, path in partial.items():
            path.replace(out / name)
    except OSError as error:
        raise UserError(f"{out}: expected a folder that can be written, found: {error}") from error
    return {"train": len(train), "test": len(held_out), **{name: len(lines) for name, lines in rows.items()}}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="example: python -m examples.make_demo_dataset --out demo/dataset --sources 160 --test 64",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the four files")
    parser.add_argument("--sources", type=int, default=160, help="train sources (default: %(default)s)")
    parser.add_argument("--test", type=int, default=64, help="unseen test recordings (default: %(default)s)")
    parser.add_argument("--copies", type=int, default=1, help="augmented copies of a train source, 0 to 7 (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is other music (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core, at most 4)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check the numbers, render, and say what was written."""
    args = build_parser().parse_args(argv)
    for name, lowest, highest in (("sources", 1, None), ("test", 1, None), ("copies", 0, 7), ("workers", 1, None)):
        value = getattr(args, name)
        if value is not None and (value < lowest or (highest is not None and value > highest)):
            limit = f"{lowest} to {highest}" if highest is not None else f"{lowest} or more"
            raise UserError(f"--{name}: expected {limit}, found {value}")
    if args.seed < 0:
        raise UserError(f"--seed: expected 0 or more, found {args.seed}")
    counts = make_dataset(args.out, args.sources, args.test, args.seed, args.copies, args.workers)
    print(f"{args.out}: {counts['train']} train and {counts['test']} test recordings of {SECONDS:.0f} s")
    return 0


if __name__ == "__main__":
    run_script(main)
