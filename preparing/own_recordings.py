"""One's own recordings: a table with an audio file and captions a row, in any format that tables.py reads.

    audio         path of the audio file, absolute or relative to the table's folder; or what the hub's Audio columns
                  hold, a path or the bytes of a file                                      (required)
    caption       a text, or a list of texts; `captions` is the same                       (required)
    alt_caption   one more text
    source_id     recordings of one source never end up in different splits                (default: the audio path)
    split         train, val (or validation) or test, in every row or in none

Rows of one audio file, however its path is spelt, are one recording with all their captions. A number is taken as its
digits, a list written out in a cell as the list. An empty cell is not given.
"""

import ast
import hashlib
import io
import os
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from preparing.clips import ClipSource, FileClips, Progress, no_progress
from preparing.recordings import Row, storable
from preparing.tables import read_table
from store.reading import SPLITS

REQUIRED = "expected the columns audio and caption (or captions)"


def read_own_recordings(path: Path) -> tuple[list[Row], ClipSource]:
    """Read a table of one's own recordings. Raises `UserError` that names the file and the row."""
    rows: list[Row] = []
    audio = _AudioColumn(path)
    for where, values in read_table(path):
        if not rows:
            _require_columns(path, values)
        rows.append(_row(where, values, audio.identify(where, values.get("audio"))))
        if (rows[0].split is None) != (rows[-1].split is None):
            raise UserError(f"{where}: expected a split in every row or in none ({', '.join(SPLITS)})")
    if not rows:
        raise UserError(f"{path}: {REQUIRED}; found no row")
    return rows, audio.clips()


def _require_columns(path: Path, values: dict[str, object]) -> None:
    if "audio" not in values or not {"caption", "captions"} & values.keys():
        raise UserError(f"{path}: {REQUIRED}; found {', '.join(map(str, values)) or 'none'}")


@dataclass
class _AudioColumn:
    """The audio column of the table at `path`: an id for each recording, and where its bytes are.

    files: path by id. embedded: digest of the content by id, for recordings whose bytes are in the table.
    """

    path: Path
    files: dict[str, Path] = field(default_factory=dict)
    embedded: dict[str, bytes] = field(default_factory=dict)
    _id_of_file: dict[str, str] = field(default_factory=dict)

    def identify(self, where: str, value: object) -> str:
        """The id of a row's recording: its path as it was first spelt, or what its bytes are called."""
        content, name = _content_and_name(value)
        if content is not None:
            return self._identify_content(where, content, name)
        if name is None or not name.strip() or not storable(name):
            raise UserError(f"{where}: expected the path of a file as audio, found {str(value)[:80]!r}")
        file = self.path.parent / name
        if "\\" in name and not file.exists():  # spelt on Windows
            file = self.path.parent / name.replace("\\", "/")
        audio_id = self._id_of_file.setdefault(os.path.realpath(file), name)
        self.files.setdefault(audio_id, file)
        return audio_id

    def _identify_content(self, where: str, content: bytes, name: str | None) -> str:
        digest = hashlib.blake2b(content, digest_size=16).digest()
        row = where.rsplit(", ", 1)[-1]
        audio_id = name if name and storable(name) else row
        if self.embedded.get(audio_id, digest) != digest:  # another file of the same name
            audio_id = f"{audio_id} ({row})"
        self.embedded[audio_id] = digest
        return audio_id

    def clips(self) -> ClipSource:
        """Where the recordings' bytes come from. `UserError` for a table that mixes paths and bytes."""
        if self.files and self.embedded:
            raise UserError(
                f"{self.path}: expected audio as paths or as bytes, found {len(self.files)} recordings with a path "
                f"and {len(self.embedded)} with bytes"
            )
        return TableClips(self.path) if self.embedded else FileClips(self.files)


class TableClips(ClipSource):
    """Files that are stored in a table's audio column, read row by row."""

    stable_ids = False  # what has no name of its own is called by the number of its row

    def __init__(self, path: Path):
        self.path = path

    @property
    def size_bytes(self) -> int:
        """Size of the table."""
        return self.path.stat().st_size

    def read(self, wanted: set[str], progress: Progress = no_progress) -> Iterator[tuple[str, bytes | Path]]:
        """Yield (audio id, content). See `ClipSource.read`."""
        open_ids, audio, position = set(wanted), _AudioColumn(self.path), 0
        for where, values in read_table(self.path):
            audio_id = audio.identify(where, values.get("audio"))
            content, _ = _content_and_name(values.get("audio"))
            position += len(content or b"")
            if content is not None and audio_id in open_ids:
                open_ids.remove(audio_id)
                yield audio_id, content
            progress(position)
            if not open_ids:
                return


def _content_and_name(value: object) -> tuple[bytes | None, str | None]:
    """Bytes and path of an audio cell: a path, bytes, or the hub's undecoded {"bytes": ..., "path": ...}."""
    if isinstance(value, bytes):
        return value, None
    if isinstance(value, dict) and {"bytes", "path"} >= value.keys() > set():
        content, name = value.get("bytes"), value.get("path")
        return (content if isinstance(content, bytes) else None), (name if isinstance(name, str) else None)
    return None, value if isinstance(value, str) else None


def _row(where: str, values: dict[str, object], audio_id: str) -> Row:
    source, split = values.get("source_id"), values.get("split")
    source_id = audio_id if source is None else as_text(source)
    if isinstance(split, str):
        split = split.strip().lower()
        split = "val" if split == "validation" else split  # as the hub's data sets call it
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: expected train, val or test as split, found {split!r}")
    if source_id is None or not storable(source_id):
        raise UserError(f"{where}: expected a text or a number as source_id, found {str(source)[:80]!r}")
    return Row(audio_id, source_id, split, _captions(where, values), where)


def _captions(where: str, values: dict[str, object]) -> list[tuple[str, object]]:
    """The first text is the main caption, all others are alternatives."""
    texts: list[str] = []
    for column in ("caption", "captions", "alt_caption"):
        for value in listed(values.get(column)):
            text = as_text(value)
            if text is None and value is not None:
                found = f"{type(value).__name__} {str(value)[:60]!r}"
                raise UserError(f"{where}: expected a text, a number or a list of them as {column}, found {found}")
            texts += [text] if text and text.strip() else []
    return [("main" if number == 0 else "alt", text) for number, text in enumerate(texts)]


def as_text(value: object) -> str | None:
    """A text as it is, a number as its digits (12.0 as 12); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float):
        return (str(int(value)) if value.is_integer() else repr(value)) if abs(value) < float("inf") else None
    return str(value)


def listed(value: object) -> list[object]:
    """The values of a cell: those of a list, written out as text or not, else the value alone.

    A text counts as a list where it is one in Python's or JSON's spelling, or in numpy's, which has no commas.
    """
    if isinstance(value, list | tuple):
        return [each for each in value if not (isinstance(each, float) and each != each)]
    text = value.strip() if isinstance(value, str) else ""
    if not (text.startswith("[") and text.endswith("]")):
        return [value]
    try:
        tokens = [each for each in tokenize.generate_tokens(io.StringIO(text).readline) if each.string.strip()]
        words = [each.string for each in tokens[1:-1] if each.string != ","]
        nothing = {"None", "null", "nan", "NaN"}
        return [None if word in nothing else ast.literal_eval(word) for word in words]
    except (tokenize.TokenError, ValueError, SyntaxError, IndentationError):
        return [value]  # a text that happens to begin and end so
