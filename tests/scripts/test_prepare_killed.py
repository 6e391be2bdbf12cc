import itertools
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from test_prepare_dataset import ROOT, arguments, assert_same_store

from helpers.small_musicbench import SmallMusicBench
from preparing.work_file import DONE, WorkFile

# Runs prepare_dataset.py once for each line "N OUTPUT" it reads, in a process of its own that dies by kill -9 just
# before its N-th call that changes files, and prints the exit status. Forking saves the imports of every run.
KILLED_RUNS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import prepare_dataset
from embedding_models.base import AudioEmbeddingModel

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

for line in sys.stdin:
    fatal, output = line.split()
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        run(int(fatal), [*sys.argv[2:], "--output-dir", output])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_killed_at_many_instants(tmp_path, tiny_models, monkeypatch):
    """kill -9 before calls that change files: while rows are written, then before each call that finishes the store."""
    monkeypatch.chdir(tmp_path)
    folder = SmallMusicBench(train_sources=20, copies=1, test=5).write(tmp_path / "data")
    recordings, batch = 45, 4
    command = [sys.executable, "-c", KILLED_RUNS, str(ROOT), *arguments(tiny_models, folder)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def run(fatal, output):
        server.stdin.write(f"{fatal} {output}\n")
        return int(server.stdout.readline())

    assert run(0, "single") == 0
    Path("encoded").unlink()
    path, done, kills = Path("out/embeddings.shard-0-of-1.h5"), 0, 0
    # A batch takes 14 calls: an offset below that dies within the first one, which must do no harm, above it goes on.
    offsets = itertools.cycle([3, 7, 18, 12, 4, 17, 10, 15, 8, 11, 5, 18, 14, 17])
    finishing = itertools.count(1)  # once every row is done: before the first call of the finish, the second, ...
    while (status := run(next(offsets if done < recordings else finishing), "out")) != 0:
        assert status == -9
        kills += 1
        if path.exists():
            with h5py.File(path) as file:  # readable after every kill
                assert "train" in file
            if path.read_bytes()[-24:].startswith(b"WORKFILE"):
                work = WorkFile(path)
                before, done = done, int((work.states == DONE).sum())
                work.close()
                assert done >= before  # done rows never fall
    server.stdin.close()
    assert server.wait() == 0
    assert kills >= 20
    assert_same_store("out/embeddings.h5", "single/embeddings.h5")
    encoded = sum(map(int, Path("encoded").read_text().split()))
    # At most two batches are encoded again: the one that was being written and the one that was being computed.
    assert encoded <= recordings + kills * 2 * batch
