import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from store.reading import SPLITS, EmbeddingStore, Split
from store.verifying import faults
from store.writing import column_statistics, create_store, write_store

OLD = Path(__file__).parents[1] / "data/written_by_1a63506/data/musicbench_embeddings/embeddings.h5"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read_back(tmp_path, dtype):
    header, splits = make_header(dtype), make_splits((5, 0, 2))
    vectors = make_vectors(header, splits)
    digests = {name: np.random.default_rng(2).integers(0, 256, (5, 16), np.uint8) for name in ("train",)}
    write_store(tmp_path / "e.h5", header, splits, vectors, [("gone.wav", "missing")], digests)
    store = pickle.loads(pickle.dumps(EmbeddingStore(tmp_path / "e.h5")))
    assert store.header == header
    for name in SPLITS:
        for column in ("audio_id", "source_id", "caption", "caption_kind"):
            assert getattr(store.split(name), column) == getattr(splits[name], column)
        np.testing.assert_array_equal(store.split(name).caption_audio, splits[name].caption_audio)
    for (name, encoder), expected in vectors.items():
        found = store.vectors(name, encoder)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(store.digests("train"), digests["train"])
    assert not store.digests("test").any()  # nobody has read those files
    assert store.skipped() == [("gone.wav", "missing")]
    assert list(faults(store.path)) == []


def test_a_store_of_an_older_version_has_no_digests():
    store = EmbeddingStore(OLD)
    assert [store.digests(name) for name in SPLITS] == [None, None, None]
    assert list(faults(OLD)) == []


def test_layout_is_the_documented_one(tmp_path, store_parts):
    header, splits, vectors = store_parts
    write_store(tmp_path / "e.h5", header, splits, vectors)
    expected = {f"/{split}" for split in SPLITS} | {"/statistics", "/skipped"}
    columns = ("audio_id", "source_id", "audio_digest", "caption", "caption_audio", "caption_kind")
    for split in SPLITS:
        expected |= {f"/{split}/{column}" for column in columns}
        expected |= {f"/{split}/{encoder}_embeddings" for encoder in header.encoders}
    for encoder in header.encoders:
        expected |= {f"/statistics/{encoder}{tail}" for tail in ("", "/mean", "/std")}
    expected |= {"/skipped/audio_id", "/skipped/reason"}
    with h5py.File(tmp_path / "e.h5") as file:
        found = set()
        file.visit(lambda name: found.add("/" + name))
        assert found == expected
        assert set(file.attrs) == {"format", "version", "dataset", "revision", "seed", "dtype", "encoders"}
        data = file["train/muq_embeddings"]
        assert data.chunks is None
        assert data.compression is None
        np.testing.assert_array_equal(data[:], vectors["train", "muq"])  # h5py reads what the map wrote
        assert isinstance(file["train/caption"].asstr()[0], str)


def test_file_is_hardly_larger_than_its_content(tmp_path):
    header, splits = make_header(dims={"muq": 1536, "latent": 576}), make_splits((900, 100, 60))
    write_store(tmp_path / "e.h5", header, splits, make_vectors(header, splits))
    rows = sum(len(split.audio_id) for split in splits.values())
    strings = sum(
        len(text.encode())
        for split in splits.values()
        for column in (split.audio_id, split.source_id, split.caption, split.caption_kind)
        for text in column
    )
    bound = rows * header.row_bytes + 2 * 4 * (1536 + 576) + 3 * strings + 256 * 1024
    assert os.path.getsize(tmp_path / "e.h5") <= bound


def test_statistics_equal_numpys():
    vectors = np.random.default_rng(1).normal(1000, 0.01, (301, 5)).astype(np.float32)  # cancellation would show
    mean, std = column_statistics(vectors)
    np.testing.assert_allclose(mean, vectors.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, vectors.astype(np.float64).std(0), rtol=1e-9)
    with pytest.raises(UserError, match="no train recording"):
        column_statistics(vectors[:0])


def test_take_keeps_captions_with_their_recording():
    split = make_splits((4, 0, 0))["train"]
    taken = split.take(np.array([3, 1]))
    assert taken.audio_id == ["data/train0003.wav", "data/train0001.wav"]
    assert taken.caption_audio.tolist() == [0, 0, 1, 1]
    assert [text.split()[2] for text in taken.caption] == ["3", "3", "1", "1"]


def test_files_that_are_no_store_are_one_line(tmp_path, store_parts):
    header, splits, vectors = store_parts
    path = tmp_path / "e.h5"
    with pytest.raises(UserError, match="no such file"):
        EmbeddingStore(path)
    path.write_text("not HDF5")
    with pytest.raises(UserError, match="cannot open"):
        EmbeddingStore(path)
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(UserError, match="expected a store"):
        EmbeddingStore(path)
    write_store(path, header, splits, vectors)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    with pytest.raises(UserError, match="truncated"):
        EmbeddingStore(path)


def test_unknown_space_names_what_is_there(tmp_path, store_parts):
    header, splits, vectors = store_parts
    write_store(tmp_path / "e.h5", header, splits, vectors)
    with pytest.raises(UserError, match="'mert', found muq, latent"):
        EmbeddingStore(tmp_path / "e.h5").vectors("train", "mert")


def test_a_failed_write_leaves_nothing_and_the_old_file(tmp_path, store_parts):
    header, splits, vectors = store_parts
    path = tmp_path / "e.h5"
    write_store(path, header, splits, vectors)
    before = path.read_bytes()
    broken = dict(vectors)
    broken["val", "muq"] = np.zeros((3, 5), np.float32)
    with pytest.raises(ValueError, match="broadcast"):
        write_store(path, header, splits, broken)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["e.h5"]


def test_too_little_space_is_refused_before_anything_is_written(tmp_path):
    header = make_header(dims={"muq": 10**9})
    splits = make_splits((100_000, 0, 0), captions=1)
    with pytest.raises(UserError, match=r"needs 400,\d+,\d+\.\d MB of disk"):
        create_store(tmp_path / "e.h5", header, splits)
    assert os.listdir(tmp_path) == []


def _leak(splits, vectors):
    splits["val"].source_id[0] = splits["train"].source_id[0]


def _no_caption(splits, vectors):
    splits["train"].caption_audio[:2] = 1


def _nan(splits, vectors):
    vectors["test", "muq"][1, 2] = np.nan


def _zero(splits, vectors):
    vectors["train", "latent"][2] = 0


def _twice(splits, vectors):
    splits["test"].audio_id[1] = splits["test"].audio_id[0]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_leak, "1 sources are in train and in val"),
        (_no_caption, "/train: 1 recordings have no caption"),
        (_nan, "/test/muq_embeddings: 1 rows are not finite"),
        (_zero, "/train/latent_embeddings: 1 rows are all zero"),
        (_twice, "/test: 1 audio ids occur twice"),
    ],
)
def test_verify_finds_each_fault(tmp_path, store_parts, damage, expected):
    header, splits, vectors = store_parts
    damage(splits, vectors)
    write_store(tmp_path / "e.h5", header, splits, vectors)
    assert [line[: len(expected)] for line in faults(tmp_path / "e.h5")] == [expected]


def test_verify_finds_stale_statistics(tmp_path, store_parts):
    header, splits, vectors = store_parts
    write_store(tmp_path / "e.h5", header, splits, vectors)
    with h5py.File(tmp_path / "e.h5", "r+") as file:
        file["statistics/muq/std"][0] = 9
    assert list(faults(tmp_path / "e.h5")) == ["/statistics/muq/std: differs from that of the train rows"]


def test_an_empty_split_is_a_split():
    assert Split().take(np.zeros(0, np.int64)).audio_id == []
