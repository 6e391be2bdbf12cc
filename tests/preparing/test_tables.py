import json
import math

import pytest

from common.errors import UserError
from preparing.opening import open_dataset
from preparing.own_recordings import TableClips, listed

TEXTS = [f"a {'calm' if number % 2 else 'fast'} song number {number}" for number in range(24)]


def opened(path, **options):
    return open_dataset(str(path), **options)


def by_id(dataset):
    return {each.audio_id: [caption.text for caption in each.captions] for each in dataset.recordings}


def splits(dataset):
    return {each.split for each in dataset.recordings}


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_missing_source_means_the_path(tmp_path):
    rows = [{"audio": f"r{i}.wav", "caption": text, "source_id": math.nan} for i, text in enumerate(TEXTS)]
    dataset = opened(json_lines(tmp_path / "table.jsonl", rows))
    assert splits(dataset) == {"train", "val", "test"}
    assert all(each.source_id == each.audio_id for each in dataset.recordings)


@pytest.mark.parametrize("nothing", ["", "NaN", "nan", "null", "None", " "])
def test_empty_cells_of_a_csv_are_not_given(tmp_path, nothing):
    lines = [f"r{i}.wav,{text},{nothing},{nothing},{nothing}" for i, text in enumerate(TEXTS)]
    (tmp_path / "table.csv").write_text("\n".join(["audio,caption,alt_caption,source_id,split", *lines]))
    dataset = opened(tmp_path / "table.csv")
    assert by_id(dataset) == {f"r{i}.wav": [text] for i, text in enumerate(TEXTS)}
    assert splits(dataset) == {"train", "val", "test"}


def test_numbers_are_read_as_their_digits(tmp_path):
    (tmp_path / "table.csv").write_text("audio,caption,source_id\n" + "a.wav,1980,007\nb.wav,3.50,7\nc.wav,x,\n")
    dataset = opened(tmp_path / "table.csv", val_fraction=0)
    assert by_id(dataset) == {"a.wav": ["1980"], "b.wav": ["3.50"], "c.wav": ["x"]}
    assert [each.source_id for each in dataset.recordings] == ["007", "7", "c.wav"]
    rows = [{"audio": "a.wav", "caption": 12.0, "source_id": 3.0}, {"audio": "b.wav", "caption": 0.25}]
    dataset = opened(json_lines(tmp_path / "table.jsonl", rows), val_fraction=0)
    assert by_id(dataset) == {"a.wav": ["12"], "b.wav": ["0.25"]}
    assert dataset.recordings[0].source_id == "3"


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("['a fast song', 'it\\'s slow, too']", ["a fast song", "it's slow, too"]),
        ('["json, too", null, "b"]', ["json, too", None, "b"]),
        ("['numpy writes' 'no commas'\n 'but lines']", ["numpy writes", "no commas", "but lines"]),
        ("[1980, 2.5]", [1980, 2.5]),
        ("[]", []),
        ("[Verse] a calm song [end]", ["[Verse] a calm song [end]"]),
        ("[a fast song]", ["[a fast song]"]),
        ("['open", ["['open"]),
        (("a", math.nan, "b"), ["a", "b"]),
    ],
)
def test_lists_in_cells(cell, expected):
    assert listed(cell) == expected


def test_one_file_spelt_in_several_ways_is_one_recording(tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "music/a.wav").write_bytes(b"")
    (tmp_path / "link").symlink_to("music")
    spelt = ["music/a.wav", "./music/a.wav", "music/../music/a.wav", str(tmp_path / "music/a.wav"), "link/a.wav"]
    spelt.append("music\\a.wav")
    rows = [{"audio": name, "caption": f"text {number}"} for number, name in enumerate(spelt)]
    dataset = opened(json_lines(tmp_path / "table.jsonl", rows), val_fraction=0)
    assert by_id(dataset) == {"music/a.wav": [f"text {number}" for number in range(len(spelt))]}


def test_columns_of_other_case_semicolons_and_a_byte_order_mark(tmp_path):
    (tmp_path / "table.csv").write_bytes("\ufeffAudio ;CAPTION\na.wav;a song, slow\n".encode())
    assert by_id(opened(tmp_path / "table.csv", val_fraction=0)) == {"a.wav": ["a song, slow"]}


def test_the_hub_s_audio_columns(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"audio": {"_type": "Audio"}, "caption": {"dtype": "string", "_type": "Value"}}
    schema = pa.schema([("audio", audio), ("caption", pa.string())])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})

    def write(name, cells):
        columns = {"audio": cells, "caption": [f"text {i}" for i in range(len(cells))]}
        parquet.write_table(pa.table(columns, schema=schema), tmp_path / name)
        return opened(tmp_path / name, val_fraction=0)

    cells = [{"bytes": b"one", "path": "x.wav"}, {"bytes": b"two", "path": None}, {"bytes": b"three", "path": "x.wav"}]
    dataset = write("bytes.parquet", [*cells, cells[0]])
    names = ["x.wav", "row 2", "x.wav (row 3)"]
    assert by_id(dataset) == dict(zip(names, [["text 0", "text 3"], ["text 1"], ["text 2"]], strict=True))
    assert isinstance(dataset.clips, TableClips)
    assert dict(dataset.clips.read(set(names))) == dict(zip(names, (b"one", b"two", b"three"), strict=True))
    assert dict(dataset.clips.read({"row 2"})) == {"row 2": b"two"}
    dataset = write("paths.parquet", [{"bytes": None, "path": str(tmp_path / "y.wav")}])
    assert list(by_id(dataset)) == [str(tmp_path / "y.wav")]
    with pytest.raises(UserError, match="as paths or as bytes, found 1 recordings with a path and 1 with bytes"):
        write("both.parquet", [cells[0], {"bytes": None, "path": "y.wav"}])


def test_an_empty_split_is_said_at_once(tmp_path):
    rows = [{"audio": f"r{i}.wav", "caption": text, "source_id": "one album"} for i, text in enumerate(TEXTS)]
    path = json_lines(tmp_path / "table.jsonl", rows)
    with pytest.raises(UserError, match=r"found none in val and test \(24 recordings of 1 source;"):
        opened(path)
    assert splits(opened(path, val_fraction=0)) == {"train"}
    rows = [{**row, "source_id": row["audio"], "split": "val" if i < 3 else "train"} for i, row in enumerate(rows)]
    with pytest.raises(UserError, match="found none in test"):
        opened(json_lines(path, rows))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("audio,caption\na.wav,b,c\n", "row 1: expected 2 cells, found more"),
        ("audio,caption\n", "found no row"),
        ("audio,caption,Caption \na.wav,b,\n", "table.csv: expected each column once, found caption more than once"),
        ('audio,caption\na.wav,"b\n', "a.wav"),
    ],
)
def test_a_malformed_csv(tmp_path, text, expected):
    (tmp_path / "table.csv").write_text(text)
    if expected == "a.wav":  # an open quote runs to the end; csv takes it
        assert list(by_id(opened(tmp_path / "table.csv", val_fraction=0))) == [expected]
        return
    with pytest.raises(UserError, match=expected):
        opened(tmp_path / "table.csv")


def test_what_is_no_text_is_refused_by_its_type(tmp_path):
    rows = [{"audio": "a.wav", "caption": {"text": "b"}}]
    with pytest.raises(UserError, match="line 1: expected a text, a number or a list of them as caption, found dict"):
        opened(json_lines(tmp_path / "table.jsonl", rows))
    (tmp_path / "table.csv").write_bytes("audio,caption\na.wav,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read as csv, expected UTF-8"):
        opened(tmp_path / "table.csv")


def test_validation_is_val_and_other_names_are_refused(tmp_path):
    names = ["validation", "Val", "test", "train"]
    rows = [{"audio": f"{name}.wav", "caption": "a", "split": name} for name in names]
    dataset = opened(json_lines(tmp_path / "table.jsonl", rows))
    found = {each.audio_id: each.split for each in dataset.recordings}
    assert found == {"validation.wav": "val", "Val.wav": "val", "test.wav": "test", "train.wav": "train"}
    with pytest.raises(UserError, match="line 1: expected train, val or test as split, found 'dev'"):
        opened(json_lines(tmp_path / "table.jsonl", [{**rows[0], "split": "dev"}]))
