"""One's own recordings: a table with an audio path and captions a row, in any format that `datasets` reads.

    audio         path of the audio file, absolute or relative to the table's folder       (required)
    caption       a text, or a list of texts; `captions` is the same                       (required)
    alt_caption   one more text
    source_id     recordings of one source never end up in different splits                (default: the audio path)
    split         train, val or test, in every row or in none

Rows of one audio path are one recording with all their captions.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from preparing.clips import FileClips
from preparing.recordings import Row, read_json_lines, storable
from store.reading import SPLITS

JSON_SUFFIXES = (".json", ".jsonl")
BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
REQUIRED = "expected the columns audio and caption (or captions)"


def read_own_recordings(path: Path) -> tuple[list[Row], FileClips]:
    """Read a table of one's own recordings. Raises UserError that names the file and the row."""
    rows: list[Row] = []
    for where, values in _table(path):
        if not rows:
            _require_columns(path, values)
        rows.append(_row(where, values))
        if (rows[0].split is None) != (rows[-1].split is None):
            raise UserError(f"{where}: expected a split in every row or in none ({', '.join(SPLITS)})")
    if not rows:
        raise UserError(f"{path}: {REQUIRED}; found no row")
    return rows, FileClips({row.audio_id: path.parent / row.audio_id for row in rows})


def _table(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (place for error messages, values by column) of each row."""
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        yield from _json_table(path)
    elif suffix in BUILDERS:
        yield from _datasets_table(path, suffix)
    else:
        known = ", ".join([*JSON_SUFFIXES, *BUILDERS])
        raise UserError(f"--dataset {path}: expected a folder or a table ({known}), found {suffix or 'no suffix'}")


def _json_table(path: Path) -> Iterator[tuple[str, dict]]:
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


def _datasets_table(path: Path, suffix: str) -> Iterator[tuple[str, dict]]:
    """Everything else, through Hugging Face `datasets`, streamed so that no copy goes into its cache."""
    from datasets import load_dataset  # here, since importing it takes about a second

    options = {"sep": "\t"} if suffix == ".tsv" else {}
    try:
        table = load_dataset(BUILDERS[suffix], data_files=str(path), split="train", streaming=True, **options)
        rows = list(table)
    except Exception as error:  # each of its readers has errors of its own; all mean that the file is not readable
        reason = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot be read as {suffix.removeprefix('.')} ({reason[0]})") from error
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _require_columns(path: Path, values: dict) -> None:
    if "audio" not in values or not {"caption", "captions"} & values.keys():
        raise UserError(f"{path}: {REQUIRED}; found {', '.join(map(str, values)) or 'none'}")


def _row(where: str, values: dict) -> Row:
    audio = values.get("audio")
    if not isinstance(audio, str) or not audio.strip() or not storable(audio):
        raise UserError(f"{where}: expected the path of a file as audio, found {str(audio)[:80]!r}")
    source = values.get("source_id")
    source_id = audio if source is None else str(source)
    split = values.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: expected train, val or test as split, found {split!r}")
    if not storable(source_id):
        raise UserError(f"{where}: source_id cannot be stored: {source_id!r}")
    return Row(audio, source_id, split, _captions(values), where)


def _captions(values: dict) -> list[tuple[str, object]]:
    """The first text is the main caption, all others are alternatives."""
    texts: list[object] = []
    for column in ("caption", "captions", "alt_caption"):
        value = values.get(column)
        texts += value if isinstance(value, list | tuple) else [value]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    return [("main" if number == 0 else "alt", text) for number, text in enumerate(texts)]
