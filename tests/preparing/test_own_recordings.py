import csv
import json
from collections import Counter

import pytest

from common.errors import UserError
from preparing.opening import open_dataset
from preparing.recordings import Caption

COLUMNS = ("audio", "caption", "alt_caption", "source_id", "split")
ROWS = [
    dict(zip(COLUMNS, values, strict=True))
    for values in [
        ("music/one.flac", "a slow waltz", "in three", "album", "train"),
        ("music/two.flac", "a fast polka", None, "album", "train"),
        ("music/three.flac", "a march", "brass", "other", "val"),
        ("music/four.flac", "a drone", "", "third", "test"),
    ]
]


@pytest.fixture
def table(tmp_path):
    (tmp_path / "music").mkdir()
    for row in ROWS:
        (tmp_path / row["audio"]).write_bytes(b"sound")
    return tmp_path / "table"


def write(path, rows):
    """Write rows as the table that the suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_table_gives_the_same(table, suffix):
    path = write(table.with_suffix(suffix), ROWS)
    dataset = open_dataset(str(path))
    found = [(r.audio_id, r.source_id, r.split, r.captions) for r in dataset.recordings]
    assert found == [
        ("music/one.flac", "album", "train", (Caption("main", "a slow waltz"), Caption("alt", "in three"))),
        ("music/two.flac", "album", "train", (Caption("main", "a fast polka"),)),
        ("music/three.flac", "other", "val", (Caption("main", "a march"), Caption("alt", "brass"))),
        ("music/four.flac", "third", "test", (Caption("main", "a drone"),)),
    ]
    assert dataset.name == path.name
    clips = dict(dataset.clips.read({"music/two.flac", "music/four.flac"}))
    assert clips == {name: table.parent / name for name in ("music/two.flac", "music/four.flac")}


def test_lists_of_captions_and_rows_of_one_audio(table):
    rows = [
        {"audio": "music/one.flac", "captions": ["first", "second", None, "first", 3]},
        {"audio": "music/two.flac", "captions": []},
        {"audio": "music/one.flac", "captions": "third"},
    ]
    dataset = open_dataset(str(write(table.with_suffix(".jsonl"), rows)), val_fraction=0)
    assert [(r.audio_id, r.source_id) for r in dataset.recordings] == [("music/one.flac", "music/one.flac")]
    assert dataset.recordings[0].captions == (
        Caption("main", "first"),
        Caption("alt", "second"),
        Caption("alt", "3"),
        Caption("main", "third"),
    )
    assert dataset.dropped["no caption"] == ["music/two.flac"]


def test_absolute_paths_and_numbers_as_source_ids(table):
    path = str(table.parent / "music/one.flac")
    rows = [{"audio": path, "caption": "a", "source_id": 17}]
    dataset = open_dataset(str(write(table.with_suffix(".jsonl"), rows)), val_fraction=0)
    assert dataset.recordings[0].source_id == "17"
    assert [(audio_id, str(found)) for audio_id, found in dataset.clips.read({path})] == [(path, path)]


def test_without_splits_sources_are_shared_out(table):
    rows = [{"audio": f"{i}.wav", "caption": f"text {i}", "source_id": f"s{i // 2}"} for i in range(200)]
    path = str(write(table.with_suffix(".jsonl"), rows))
    recordings = open_dataset(path).recordings
    assert Counter(r.split for r in recordings) == {"train": 160, "val": 20, "test": 20}
    for split in ("train", "val", "test"):
        sources = Counter(r.source_id for r in recordings if r.split == split)
        assert set(sources.values()) == {2}
    assert recordings == open_dataset(path).recordings
    assert recordings != open_dataset(path, seed=1).recordings


def test_val_is_taken_from_train_where_only_train_and_test_are_given(table):
    rows = [{"audio": f"{i}.wav", "caption": "text", "split": "test" if i < 5 else "train"} for i in range(45)]
    recordings = open_dataset(str(write(table.with_suffix(".jsonl"), rows))).recordings
    assert Counter(r.split for r in recordings) == {"train": 36, "val": 4, "test": 5}


def test_of_one_source_only_the_most_held_out_split_stays(table):
    rows = [
        {"audio": f"{source}-{split}.wav", "caption": "text", "split": split, "source_id": source}
        for source, splits in {"a": "train", "b": "train val", "c": "train val test"}.items()
        for split in splits.split()
    ]
    dataset = open_dataset(str(write(table.with_suffix(".jsonl"), rows)))
    assert [r.audio_id for r in dataset.recordings] == ["a-train.wav", "b-val.wav", "c-test.wav"]
    assert dataset.dropped["leak"] == ["b-train.wav", "c-train.wav", "c-val.wav"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"file": "a.wav", "text": "b"}], "expected the columns audio and caption.*found file, text"),
        ([{"audio": "a.wav"}], "found audio"),
        ([], "found no row"),
        ([{"audio": None, "caption": "b"}], "line 1: expected the path of a file as audio, found 'None'"),
        ([{"audio": {"bytes": "x"}, "caption": "b"}], "line 1: expected the path"),
        ([{"audio": "a.wav", "caption": "b", "split": "dev"}], "line 1: expected train, val or test.*'dev'"),
        (
            [{"audio": "a.wav", "caption": "b", "split": "val"}, {"audio": "b.wav", "caption": "b"}],
            "line 2: expected a split in every row or in none",
        ),
        (
            [{"audio": "a.wav", "caption": "b", "source_id": 1}, {"audio": "a.wav", "caption": "b", "source_id": 2}],
            "line 2: a.wav was given the source id 1 before, now 2",
        ),
        ([{"audio": "a.wav", "caption": "b", "split": "val"}], "no recording is left to train on"),
    ],
)
def test_a_malformed_table_is_named_with_its_line(table, rows, expected):
    path = write(table.with_suffix(".jsonl"), rows)
    with pytest.raises(UserError, match=expected) as caught:
        open_dataset(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["table.csv", "table.parquet", "table.json", "table.xls", "table"])
def test_files_that_are_no_tables_are_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00\x01\xff[ this is nothing" * 20)
    with pytest.raises(UserError, match=name) as caught:
        open_dataset(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_broken_json_list_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"audio": "a.wav", "caption": "b"},')
    with pytest.raises(UserError, match="malformed JSON"):
        open_dataset(str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('[{"audio": "a.wav", "caption": "b"}, 3]')
    with pytest.raises(UserError, match="entry 2: expected one JSON object, found int"):
        open_dataset(str(tmp_path / "a.json"))
