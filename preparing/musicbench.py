"""MusicBench: its files, on the hub or in a folder, as rows with captions.

The metadata are JSON Lines: MusicBench_train.json, MusicBench_test_A.json, MusicBench_test_B.json. Test A and B
are the same recordings with two sets of captions, so they become one recording with up to four captions.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from common import hub
from common.errors import UserError
from preparing.recordings import Row, read_json_lines, storable

REPO_ID = "amaai-lab/MusicBench"
REVISION = "b141e962aacc19ffd51c15732738040377989203"
TAR = "MusicBench.tar.gz"
METADATA = ("MusicBench_train.json", "MusicBench_test_A.json", "MusicBench_test_B.json")
GROUPS = {"MusicBench_test_A.json": "A", "MusicBench_test_B.json": "B"}
COLUMNS = ("location", "main_caption", "alt_caption")

PUBLISHED_ROWS = {"train": 52_768, "test": 400}
COPIES = 10  # rows of train for each of the 5,521 clips of MusicCaps that it was made of, about
PUBLISHED_BYTES = {TAR: 16_757_993_240}

_YOUTUBE_STEM = re.compile(r"([\w-]{11})(_\d+)?", re.ASCII)


def download_sizes(revision: str | None = None) -> tuple[dict[str, int], str]:
    """Bytes of MusicBench's files by name, and where the figures are from: the hub, or what was published.

    Asks the hub; where it cannot be reached, the tar's published size stands alone.
    """
    try:
        sizes = hub.file_sizes(REPO_ID, [*METADATA, TAR], revision=revision or REVISION, repo_type="dataset")
    except UserError as error:
        return dict(PUBLISHED_BYTES), f"published size of the tar, metadata not counted; {error}"
    return sizes, f"asked of {hub.endpoint()}"


def source_id(audio_id: str) -> str:
    """The source of a MusicBench location: the YouTube id that its file name starts with, else the whole stem.

    Augmented copies are named <id>_<number>; the id has 11 characters and may itself end in _<number>.
    """
    stem = PurePosixPath(audio_id).stem
    match = _YOUTUBE_STEM.fullmatch(stem)
    return match[1] if match else stem


def metadata_in(folder: Path) -> list[Path]:
    """Paths of the three metadata files of a MusicBench folder."""
    missing = [name for name in METADATA if not (folder / name).is_file()]
    if missing:
        found = sorted(entry.name for entry in folder.iterdir())
        shown = ", ".join(found[:5]) + (f", ... ({len(found)} entries)" if len(found) > 5 else "")
        raise UserError(
            f"--dataset {folder}: expected {', '.join(METADATA)} and {TAR} or its extracted datashare/;"
            f" missing {', '.join(missing)}; found {shown or 'an empty folder'}"
        )
    return [folder / name for name in METADATA]


def rows_of(files: list[Path]) -> Iterator[Row]:
    """The rows of the metadata files, train first. Raises UserError for files without rows or columns."""
    for path in files:
        group = GROUPS.get(path.name, "")
        prefix, split = (f"{group}/", "test") if group else ("", "train")
        empty = True
        for number, row in read_json_lines(path):
            where = f"{path}, line {number}"
            if empty:
                _require_columns(where, row)
                empty = False
            location = _location(where, row.get("location"))
            captions = [(f"{prefix}main", row.get("main_caption")), (f"{prefix}alt", row.get("alt_caption"))]
            yield Row(location, source_id(location), split, captions, where, group)
        if empty:
            raise UserError(f"{path}: expected a JSON object a line, found no line")


def _require_columns(where: str, row: dict) -> None:
    missing = [column for column in COLUMNS if column not in row]
    if missing:
        raise UserError(
            f"{where}: expected the columns {', '.join(COLUMNS)}; missing {', '.join(missing)}; found {', '.join(row)}"
        )


def _location(where: str, value: object) -> str:
    """A location as a plain relative path with forward slashes. Raises UserError for anything that leaves the root."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: expected a relative path as location, found {value!r}")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.name or not storable(value):
        raise UserError(f"{where}: expected a location inside the data set's folder, found {value!r}")
    return str(path)
