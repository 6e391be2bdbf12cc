import itertools
from pathlib import Path

import h5py
import pytest
from test_prepare_dataset import arguments, assert_same_store

from helpers.killed_runs import KilledRuns, grow_and_kill
from helpers.small_musicbench import SmallMusicBench
from preparing.work_file import DONE, WorkFile


@pytest.mark.slow
def test_killed_at_many_instants(tmp_path, tiny_models, monkeypatch):
    """kill -9 before calls that change files: while rows are written, then before each call that finishes the store."""
    monkeypatch.chdir(tmp_path)
    folder = SmallMusicBench(train_sources=20, copies=1, test=5).write(tmp_path / "data")
    recordings, batch = 45, 4
    runs = KilledRuns(arguments(tiny_models, folder), "muq")
    assert runs.run(0, "--output-dir", "single") == 0
    runs.encoded()
    path, done, kills = Path("out/embeddings.shard-0-of-1.h5"), 0, 0
    # A batch takes 14 calls: an offset below that dies within the first one, which must do no harm, above it goes on.
    offsets = itertools.cycle([3, 7, 18, 12, 4, 17, 10, 15, 8, 11, 5, 18, 14, 17])
    finishing = itertools.count(1)  # once every row is done: before the first call of the finish, the second, ...
    while (status := runs.run(next(offsets if done < recordings else finishing), "--output-dir", "out")) != 0:
        assert status == -9
        kills += 1
        if path.exists():
            with h5py.File(path) as file:  # readable after every kill
                assert "train" in file
            work = WorkFile(path)
            before, done = done, int((work.states == DONE).sum())
            work.close()
            assert done >= before  # done rows never fall
    runs.close()
    assert kills >= 20
    assert_same_store("out/embeddings.h5", "single/embeddings.h5")
    # At most two batches are encoded again: the one that was being written and the one that was being computed.
    assert runs.encoded() <= recordings + kills * 2 * batch


def test_a_store_that_grows_loses_nothing_when_killed(tmp_path, tiny_models, monkeypatch):
    """helpers/killed_runs.py does it as often as it is told to."""
    monkeypatch.chdir(tmp_path)
    flags = ["--device", "cpu", "--batch-size", "4", "--latent-model", str(tiny_models / "music2latent")]
    flags += ["--muq-model", str(tiny_models / "muq_mulan"), "--muq-backbone", str(tiny_models / "muq_large")]
    assert len(list(grow_and_kill(flags, kills=3, seed=1))) == 3
