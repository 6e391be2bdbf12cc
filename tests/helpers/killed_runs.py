"""Runs of prepare_dataset.py that die by kill -9 just before a call that changes files.

PYTHONPATH=.:tests python -m helpers.killed_runs [KILLS]     # a store that grows, killed at 50 random instants
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import h5py
import numpy as np

from helpers.small_musicbench import clip, wav_bytes
from store.reading import SPLITS, EmbeddingStore
from store.verifying import faults

ROOT = Path(__file__).parents[2]

# For each line [N, flags] that it reads: a run in a process of its own, killed before its N-th call that changes files;
# prints the exit status. Forking saves the imports of every run, those of the encoders named on its command line too.
# Files: `encoded` has the windows of every batch, `calls` how many such calls the last whole run made.
_SERVER = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import prepare_dataset
from embedding_models.base import AudioEmbeddingModel
from embedding_models.registry import ENCODERS

for name in sys.argv[2:]:
    ENCODERS[name].load_class()

def run(fatal, flags):
    calls, encoded = [], open("encoded", "a")

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    for name in ("pwrite", "fsync", "replace", "ftruncate", "posix_fallocate"):
        setattr(os, name, counted(getattr(os, name)))
    begin = AudioEmbeddingModel.begin

    def counted_begin(self, waveforms):
        print(len(waveforms), file=encoded, flush=True)
        return begin(self, waveforms)

    AudioEmbeddingModel.begin = counted_begin
    prepare_dataset.main(flags)
    print(len(calls), file=open("calls", "w"))

for line in sys.stdin:
    fatal, flags = json.loads(line)
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        run(fatal, flags)
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class KilledRuns:
    """prepare_dataset.py with flags that all runs have in common, in the working directory; they use `encoders`."""

    def __init__(self, flags: list[str], *encoders: str):
        self._flags = flags
        command = [sys.executable, "-c", _SERVER, str(ROOT), *encoders]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._to, self._from = cast(TextIO, self._server.stdin), cast(TextIO, self._server.stdout)

    def run(self, fatal: int, *flags: str) -> int:
        """The exit status of a run that is killed before its call number `fatal`, or (0) of a whole one."""
        self._to.write(json.dumps([fatal, [*self._flags, *flags]]) + "\n")
        return int(self._from.readline())

    def encoded(self) -> int:
        """Windows that the encoders were given since this was last asked."""
        path = Path("encoded")
        total = sum(map(int, path.read_text().split())) if path.exists() else 0
        path.unlink(missing_ok=True)
        return total

    def close(self) -> None:
        """End the server; it must have met no fault."""
        self._to.close()
        assert self._server.wait() == 0


def write_table(recordings: int, edited: bool) -> None:
    """table.jsonl in the working directory, and its one-second files."""
    lines = []
    for number in range(recordings):
        path = Path(f"{number}.wav")
        if not path.exists():
            path.write_bytes(wav_bytes(clip(number, 1.0)))
        text = "an edited caption" if edited and number == 3 else f"song {number}"
        lines.append(json.dumps({"audio": path.name, "captions": [text, f"piece {number}"]}))
    Path("table.jsonl").write_text("\n".join(lines))


def vectors_by_id(path: Path, space: str) -> dict[str, np.ndarray]:
    """A space's vectors by audio id."""
    store = EmbeddingStore(path)
    return {
        audio_id: np.array(vector)
        for name in SPLITS
        for audio_id, vector in zip(store.split(name).audio_id, store.vectors(name, space), strict=True)
    }


def assert_same(path: Path, expected: Path, old: Path) -> None:
    """Two stores say the same; what both have of `old` is equal in every bit, what was computed but for rounding."""
    store, other = EmbeddingStore(path), EmbeddingStore(expected)
    assert (store.header, store.skipped()) == (other.header, other.skipped())
    for name in SPLITS:
        one, two = ({k: list(v) for k, v in vars(each.split(name)).items()} for each in (store, other))
        assert one == two
        np.testing.assert_array_equal(store.digests(name), other.digests(name))
    for space in store.encoders:
        found, wanted = vectors_by_id(path, space), vectors_by_id(expected, space)
        for audio_id, vector in wanted.items():
            np.testing.assert_allclose(found[audio_id], vector, atol=1e-5 * np.abs(vector).max())
    taken = vectors_by_id(path, "muq")
    for audio_id, vector in vectors_by_id(old, "muq").items():
        assert taken[audio_id].tobytes() == vector.tobytes()
    assert list(faults(path)) == []


def grow_and_kill(flags: list[str], kills: int, seed: int) -> Iterator[str]:
    """Kill a run that makes a grown store from a finished one at random instants, each time from the beginning.

    Then the same command runs to its end. Yields a line for each kill: the call, the files that were there, and how
    many windows were encoded in both runs together. Raises AssertionError where anything is lost.
    """
    write_table(12, edited=False)
    before, whole = Path("before/embeddings.h5"), Path("whole/embeddings.h5")
    runs = KilledRuns([*flags, "--dataset", "table.jsonl"], "muq", "latent")
    assert runs.run(0, "--output-dir", "before", "--encoders", "muq") == 0
    old = before.read_bytes()
    write_table(18, edited=True)
    grown = ("--encoders", "muq", "latent")
    shutil.copytree("before", "whole")
    runs.encoded()
    assert runs.run(0, "--output-dir", "whole", *grown) == 0
    needed, calls = runs.encoded(), int(Path("calls").read_text())
    assert needed == 6 + 18
    instants = random.Random(seed)
    for number in range(kills):
        output = f"killed {number}"
        shutil.copytree("before", output)
        fatal = calls - number if number < 2 else instants.randrange(1, calls + 1)  # the last ones are the rename
        while runs.run(fatal, "--output-dir", output, *grown) == 0:  # its batches fell otherwise, with fewer calls
            shutil.rmtree(output)
            shutil.copytree("before", output)
            runs.encoded()
            fatal -= 1
        store, shard = Path(output, "embeddings.h5"), Path(output, "embeddings.shard-0-of-1.h5")
        if store.read_bytes() != old:
            assert_same(store, whole, before)
        if shard.exists():
            with h5py.File(shard) as file:
                assert "train" in file
        there = ", ".join(sorted(os.listdir(output)))
        assert runs.run(0, "--output-dir", output, *grown) == 0
        assert_same(store, whole, before)
        assert [path.name for path in Path(output).iterdir() if path.suffix != ".lock"] == ["embeddings.h5"]
        encoded = runs.encoded()
        assert needed <= encoded <= needed + 2 * 2 * 4  # two batches of four in each of two encoders
        yield f"before call {fatal} of {calls}: {there}; {encoded} windows encoded, {needed} without the kill"
        shutil.rmtree(output)
    runs.close()


def main() -> None:
    """Make tiny encoders and kill as often as the command line says."""
    from examples.make_tiny_models import main as make_tiny_models

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_tiny_models(["--out", "models"])
        flags = ["--device", "cpu", "--batch-size", "4", "--muq-model", "models/muq_mulan"]
        flags += ["--muq-backbone", "models/muq_large", "--latent-model", "models/music2latent"]
        for line in grow_and_kill(flags, int(sys.argv[1]) if len(sys.argv) > 1 else 50, seed=2026):
            print(line, flush=True)


if __name__ == "__main__":
    main()
