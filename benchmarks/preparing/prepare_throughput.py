"""How fast prepare_dataset.py feeds its encoders: decoding alone, free encoders, tiny encoders.

(a) decode, resample and write full-size rows in a plain loop, per core and with `--num-workers` threads;
(b) the product's pipeline with encoders that cost nothing but emit full-size vectors, in turn with (a);
(c) the product's pipeline with tiny encoders (`--models`, from examples/make_tiny_models.py): the share of
    wall time in which the encoders waited for audio.
"""

import argparse
import io
import math
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch

from embedding_models.audio import AudioFormat, track_windows
from embedding_models.base import AudioEmbeddingModel
from embedding_models.pipeline import StageSeconds, embed_clips
from examples.make_tiny_models import FOLDERS, encoder_spec
from preparing.clips import TarClips
from preparing.work_file import DONE, WorkFile
from store.reading import Split, StoreHeader

FULL_SIZE = {"muq": (1536, 24_000, 1), "mert": (76_800, 24_000, 1), "latent": (576, 44_100, 2)}
BATCH = 8
WANTED_CLIPS_PER_SECOND = 50


class FreeEncoder(AudioEmbeddingModel):
    """Costs nothing and gives vectors of the published width."""

    def __init__(self, name: str):
        super().__init__("none", None, "cpu", "float32")
        self.name = name
        width, self.sample_rate, self.channels = FULL_SIZE[name]
        self.frame_dim = width // 3
        self._vector = torch.rand(width)

    def _vectors(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Return the same vector for each window."""
        return self._vector.expand(len(waveforms), -1)


def make_tar(path: Path, clips: int, rate: int, channels: int) -> list[str]:
    """Write a MusicBench-like tar.gz of 10 s PCM16 clips; return their ids."""
    rng, names = np.random.default_rng(0), []
    tones = np.sin(2 * np.pi * np.outer(np.arange(10 * rate) / rate, [220, 440, 1760])).sum(1) / 8
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for number in range(clips):
            samples = tones[:, None] + 0.05 * rng.standard_normal((10 * rate, channels))
            buffer = io.BytesIO()
            soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
            names.append(f"data/{number:011d}.wav")
            member = tarfile.TarInfo(f"datashare/{names[-1]}")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return names


def make_work_file(folder: Path, names: list[str], encoders: list[AudioEmbeddingModel]) -> WorkFile:
    """A work file for these clips, all in train, with one caption each."""
    entries = {e.name: {"id": e.model, "dim": e.dim, "sample_rate": e.sample_rate} for e in encoders}
    train = Split(names, names, names, np.arange(len(names)), ["main"] * len(names))
    splits = {"train": train, "val": Split(), "test": Split()}
    path = folder / f"work-{time.monotonic_ns()}.h5"
    return WorkFile.create(path, StoreHeader("benchmark", None, 0, "float32", entries), splits, {}, [])


def write_rows(work: WorkFile, rows: dict[str, int], results: list[tuple[str, dict]]) -> None:
    """Write and commit a batch as prepare_dataset.py does."""
    for name, vectors in results:
        for encoder, vector in vectors.items():
            work.write("train", rows[name], encoder, vector)
    work.commit([("train", rows[name], DONE) for name, _ in results])


def run_plain(tar: Path, names: list[str], folder: Path, workers: int) -> float:
    """(a): decode, resample, write; clips/s."""
    encoders = [FreeEncoder(name) for name in FULL_SIZE]
    formats = {AudioFormat(e.sample_rate, e.channels) for e in encoders}
    vectors = {e.name: np.ones(e.dim, np.float32) for e in encoders}
    work, rows = make_work_file(folder, names, encoders), {name: row for row, name in enumerate(names)}
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:

        def decode(clip: tuple[str, bytes]) -> str:
            for _ in track_windows(io.BytesIO(clip[1]), formats):
                pass
            return clip[0]

        source, batch = TarClips(tar).read(set(names)), []
        while group := [clip for _, clip in zip(range(4 * BATCH), source, strict=False)]:
            for name in pool.map(decode, group):
                batch.append((name, vectors))
                if len(batch) == BATCH:
                    write_rows(work, rows, batch)
                    batch = []
        write_rows(work, rows, batch)
    speed = len(names) / (time.perf_counter() - started)
    work.close()
    work.path.unlink()
    return speed


def run_pipeline(
    tar: Path, names: list[str], folder: Path, workers: int, encoders: list[AudioEmbeddingModel]
) -> tuple[float, StageSeconds, float]:
    """(b), (c): the product's pipeline; clips/s, where its time went, and wall seconds."""
    work, rows = make_work_file(folder, names, encoders), {name: row for row, name in enumerate(names)}
    seconds, started = StageSeconds(), time.perf_counter()
    for finished in embed_clips(TarClips(tar).read(set(names)), encoders, BATCH, workers, seconds):
        write_rows(work, rows, finished)
    wall = time.perf_counter() - started
    assert (work.states == DONE).all()
    work.close()
    work.path.unlink()
    return len(names) / wall, seconds, wall


def tiny_encoders(models: Path) -> list[AudioEmbeddingModel]:
    """The three encoders of examples/make_tiny_models.py."""
    return [encoder_spec(models, name, device="cpu").load() for name in FOLDERS]


def main(argv: list[str] | None = None) -> None:
    """Run the three measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.preparing.prepare_throughput --models demo/models",
    )
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--rate", type=int, default=16_000)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=Path, help="folder of tiny models, for (c)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        tar = folder / "clips.tar.gz"
        names = make_tar(tar, args.clips, args.rate, args.channels)
        one = np.median([run_plain(tar, names, folder, 1) for _ in range(args.rounds)])
        needed = math.ceil(WANTED_CLIPS_PER_SECOND / one)
        print(f"(a) one worker: {one:.1f} clips/s; {WANTED_CLIPS_PER_SECOND} clips/s take {needed} such cores")
        ratios = []
        for _ in range(args.rounds):
            plain = run_plain(tar, names, folder, args.num_workers)
            free = [FreeEncoder(name) for name in FULL_SIZE]
            pipeline, _, _ = run_pipeline(tar, names, folder, args.num_workers, free)
            ratios.append(pipeline / plain)
            columns = f"(a) {args.num_workers} workers {plain:.1f} clips/s   (b) pipeline {pipeline:.1f} clips/s"
            print(f"{columns}   ratio {ratios[-1]:.2f}")
        print(f"(b) / (a), median: {np.median(ratios):.2f}")
        if args.models:
            speed, seconds, wall = run_pipeline(tar, names, folder, args.num_workers, tiny_encoders(args.models))
            print(
                f"(c) tiny encoders: {speed:.1f} clips/s; they waited {100 * seconds.wait / wall:.1f} % of {wall:.1f} s"
            )


if __name__ == "__main__":
    main()
