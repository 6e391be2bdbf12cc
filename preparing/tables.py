"""Tables of any kind as rows of plain values: CSV, JSON Lines or a JSON list, Parquet and Arrow.

A cell that holds nothing - empty, null or not a number - is None, whatever the format writes for it.
"""

import csv
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from preparing.recordings import read_json_lines

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}

_NOTHING = {"", "nan", "none", "null", "na", "n/a", "<na>"}
_LONGEST_CELL = 1 << 24  # characters; a list of captions is longer than csv's 131,072 now and then

Table = Iterator[tuple[str, dict[str, object]]]


def read_table(path: Path) -> Table:
    """Yield (place for error messages, values by column) of each row, read as it is asked for.

    Column names lose surrounding white space and their case. Raises `UserError` that names file and row.
    """
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        rows = _json_table(path)
    elif suffix in CSV_SUFFIXES:
        rows = _csv_table(path, suffix)
    elif suffix in BUILDERS:
        rows = _datasets_table(path, suffix)
    else:
        known = ", ".join([*JSON_SUFFIXES, *CSV_SUFFIXES, *BUILDERS])
        raise UserError(f"--dataset {path}: expected a folder or a table ({known}), found {suffix or 'no suffix'}")
    for where, values in rows:
        yield where, {str(name).strip().lower(): _value(value) for name, value in values.items() if name is not None}


def _value(value: object) -> object:
    """The value of a cell; None where it stands for nothing."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str) and value.strip().lower() in _NOTHING:
        return None
    return value


def _csv_table(path: Path, suffix: str) -> Table:
    """Every cell as the text it is, so that an id 007 stays 007. Semicolons, as some spreadsheets write them, too."""
    csv.field_size_limit(min(_LONGEST_CELL, sys.maxsize))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            by_semicolon = suffix == ".csv" and "," not in header and ";" in header
            rows = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ";" if by_semicolon else ",")
            _require_distinct(path, [name.strip().lower() for name in rows.fieldnames or ()])
            for number, row in enumerate(rows, start=1):
                if None in row:
                    raise UserError(f"{path}, row {number}: expected {len(rows.fieldnames or ())} cells, found more")
                yield f"{path}, row {number}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as {suffix[1:]}, expected UTF-8 ({error}); save it as such") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as {suffix.removeprefix('.')} ({error})") from error


def _require_distinct(path: Path, names: list[str]) -> None:
    """`UserError` where two columns have one name, of which a row would keep the last."""
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: expected each column once, found {', '.join(twice)} more than once")


def _json_table(path: Path) -> Table:
    """JSON Lines, or one JSON list of objects."""
    if not path.read_bytes()[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from ((f"{path}, line {number}", row) for number, row in read_json_lines(path))
        return
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON Lines or one JSON list, found malformed JSON ({error})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, entry {number}: expected one JSON object, found {type(row).__name__}")
        yield f"{path}, entry {number}", row


def _datasets_table(path: Path, suffix: str) -> Table:
    """Parquet and Arrow through Hugging Face `datasets`: streamed, and with Audio columns as they are stored."""
    from datasets import load_dataset  # here, since importing it takes about a second

    try:
        table = load_dataset(BUILDERS[suffix], data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(table.decode(False), start=1):
            yield f"{path}, row {number}", row
    except Exception as error:  # each of its readers has errors of its own; all mean that the file is not readable
        reason = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot be read as {suffix.removeprefix('.')} ({reason[0]})") from error
