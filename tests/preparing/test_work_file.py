import os

import h5py
import numpy as np
import pytest

from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from preparing.clips import sound_digest
from preparing.merging import finish
from preparing.work_file import DONE, STATE_OF_REASON, TODO, WorkFile, check_settings, shard_path
from store.reading import SPLITS, EmbeddingStore
from store.verifying import faults
from store.writing import write_store

SETTINGS = {"dtype": "float32", "recordings": "abc"}


def shard_splits(splits, shard, shards):
    return {name: split.take(np.arange(shard, len(split.audio_id), shards)) for name, split in splits.items()}


def fill(work, splits, vectors, shard=0, shards=1, skip=()):
    for name in SPLITS:
        for row in range(len(work.splits[name].audio_id)):
            source = row * shards + shard
            if (name, source) in skip:
                work.commit([(name, row, STATE_OF_REASON["unreadable"])])
                continue
            for encoder in work.header.encoders:
                assert work.write(name, row, encoder, vectors[name, encoder][source])
            work.write_digest(name, row, digest_of(splits, name, source))
            work.commit([(name, row, DONE)])


def digest_of(splits, name, row):
    return sound_digest(splits[name].audio_id[row].encode())


def test_rows_and_states_survive_reopening(tmp_path, store_parts):
    header, splits, vectors = store_parts
    path = shard_path(tmp_path, 0, 1)
    work = WorkFile.create(path, header, splits, SETTINGS, [])
    assert (work.states == TODO).all()
    work.write("val", 1, "muq", vectors["val", "muq"][1])
    work.commit([("val", 1, DONE), ("test", 3, STATE_OF_REASON["missing"])])
    work.close()
    again = WorkFile(path)
    assert again.settings == SETTINGS
    assert again.state("val").tolist() == [TODO, DONE, TODO]
    assert again.state("test").tolist() == [TODO, TODO, TODO, STATE_OF_REASON["missing"]]
    with h5py.File(path) as file:  # readable as HDF5 while it is in work
        np.testing.assert_array_equal(file["val/muq_embeddings"][1], vectors["val", "muq"][1])
    again.close()


def test_a_vector_that_does_not_fit_is_refused(tmp_path):
    header, splits = make_header("float16"), make_splits()
    work = WorkFile.create(shard_path(tmp_path, 0, 1), header, splits, SETTINGS, [])
    with np.errstate(over="ignore"):
        assert not work.write("train", 0, "latent", np.full(4, 1e6, np.float32))
    assert not work.write("train", 0, "latent", np.array([0, np.nan, 0, 0]))
    assert work.write("train", 0, "latent", np.ones(4))
    with pytest.raises(ValueError, match="shape"):
        work.write("train", 0, "latent", np.ones(5))
    work.close()


@pytest.mark.parametrize(("shards", "skip"), [(1, ()), (1, (("train", 2),)), (2, ()), (3, (("test", 0),))])
def test_finishing_gives_the_store_of_a_single_run(tmp_path, store_parts, shards, skip):
    header, splits, vectors = store_parts
    said = []
    for shard in range(shards):
        path = shard_path(tmp_path, shard, shards)
        work = WorkFile.create(path, header, shard_splits(splits, shard, shards), SETTINGS, [])
        fill(work, splits, vectors, shard, shards, skip)
        work.close()
        finished = finish(tmp_path, shards, said.append)
        assert (finished is not None) == (shard == shards - 1)
    kept = {
        name: [row for row in range(len(split.audio_id)) if (name, row) not in skip] for name, split in splits.items()
    }
    expected = tmp_path / "expected.h5"
    write_store(
        expected,
        header,
        {name: split.take(np.array(kept[name])) for name, split in splits.items()},
        {(name, encoder): rows[kept[name]] for (name, encoder), rows in vectors.items()},
        [(splits[name].audio_id[row], "unreadable") for name, row in skip],
        {name: np.array([list(digest_of(splits, name, row)) for row in rows], np.uint8) for name, rows in kept.items()},
    )
    a, b = EmbeddingStore(tmp_path / "embeddings.h5"), EmbeddingStore(expected)
    assert a.skipped() == b.skipped()
    for name in SPLITS:
        assert a.split(name).audio_id == b.split(name).audio_id
        assert a.split(name).caption == b.split(name).caption
        assert a.split(name).caption_audio.tolist() == b.split(name).caption_audio.tolist()
        np.testing.assert_array_equal(a.digests(name), b.digests(name))
        for encoder in header.encoders:
            np.testing.assert_array_equal(a.vectors(name, encoder), b.vectors(name, encoder))
    for encoder in header.encoders:
        np.testing.assert_array_equal(a.statistics(encoder), b.statistics(encoder))
    assert list(faults(a.path)) == []
    assert sorted(os.listdir(tmp_path)) == ["embeddings.h5", "expected.h5"]


def test_a_kill_between_cut_and_rename_is_mended(tmp_path, store_parts, monkeypatch):
    header, splits, vectors = store_parts
    path = shard_path(tmp_path, 0, 1)
    work = WorkFile.create(path, header, splits, SETTINGS, [])
    fill(work, splits, vectors)
    work.close()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("preparing.work_file.publish", die)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path, 1, print)
    assert path.exists()
    monkeypatch.undo()
    assert finish(tmp_path, 1, print) == tmp_path / "embeddings.h5"
    assert list(faults(tmp_path / "embeddings.h5")) == []


def test_leftovers_of_a_kill_after_the_merge_are_removed(tmp_path, store_parts):
    header, splits, vectors = store_parts
    write_store(tmp_path / "embeddings.h5", header, splits, vectors)
    WorkFile.create(shard_path(tmp_path, 1, 2), header, splits, SETTINGS, []).close()
    assert finish(tmp_path, 2, print) == tmp_path / "embeddings.h5"
    assert os.listdir(tmp_path) == ["embeddings.h5"]


def test_shards_of_different_settings_are_not_merged(tmp_path, store_parts):
    header, splits, vectors = store_parts
    for shard, settings in enumerate((SETTINGS, {**SETTINGS, "recordings": "xyz"})):
        work = WorkFile.create(shard_path(tmp_path, shard, 2), header, splits, settings, [])
        fill(work, splits, vectors)
        work.close()
    with pytest.raises(UserError, match="other settings"):
        finish(tmp_path, 2, print)


def test_other_settings_are_named(tmp_path):
    with pytest.raises(UserError, match="dtype: 'float32' there, 'float16' now"):
        check_settings(tmp_path, SETTINGS, {**SETTINGS, "dtype": "float16"})
    check_settings(tmp_path, SETTINGS, SETTINGS)


def test_a_work_file_cut_in_half_is_one_line(tmp_path, store_parts):
    header, splits, _ = store_parts
    path = shard_path(tmp_path, 0, 1)
    WorkFile.create(path, header, splits, SETTINGS, []).close()
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(UserError, match="truncated"):
        WorkFile(path)


def test_vectors_are_written_before_their_state(tmp_path, store_parts, monkeypatch):
    """A power cut after any system call leaves no row that is marked done and not on disk."""
    header, splits, _ = store_parts
    work = WorkFile.create(shard_path(tmp_path, 0, 1), header, splits, SETTINGS, [])
    calls = []
    pwrite, fsync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: calls.append(len(data)) or pwrite(fd, data, at))
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    vectors = make_vectors(header, splits)
    for encoder in header.encoders:
        work.write("train", 0, encoder, vectors["train", encoder][0])
    work.commit([("train", 0, DONE)])
    assert calls == [24, 16, "fsync", 1, "fsync"]
    work.close()
