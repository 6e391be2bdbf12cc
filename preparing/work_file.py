"""One shard of the embeddings while they are being computed: rows in place, a state per row, resumable.

The file is a store (store/) whose structure is complete from the start, with one state byte per row in the data set
/states and the run's settings in an attribute. It opens as HDF5 at any time; finishing it is writing the statistics
and renaming. Nothing is ever moved or grown in between: a process killed at any instant loses at most its open batch.

Older versions kept states, settings and a footer past HDF5's end of file; such a shard goes on, and finishing it also
cuts that tail off.
"""

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import publish, replacing
from preparing.differences import differences
from store.reading import (
    SPLITS,
    STATES,
    Split,
    StoreHeader,
    digest_block,
    read_blocks,
    read_header,
    read_settings,
    read_split,
    vector_block,
)
from store.writing import create_store

TODO, DONE = 0, 1
REASONS = {2: "missing", 3: "unreadable", 4: "too short", 5: "not finite"}
STATE_OF_REASON = {reason: state for state, reason in REASONS.items()}

# A state as it is stored: itself in the low half of the byte, its complement in the high half, but 0 for "to do". No
# flipped bit turns one into another, above all not a row to do into one that is done.
_CODES = np.array([TODO, *(state | (15 - state) << 4 for state in (DONE, *REASONS))], np.uint8)
_FOOTER = struct.Struct("<8sQQ")  # magic, bytes of the HDF5 part, bytes of the settings
_MAGIC = b"WORKFILE"


def shard_path(folder: Path, split_id: int, num_splits: int) -> Path:
    """Path of a shard's work file."""
    return folder / f"embeddings.shard-{split_id}-of-{num_splits}.h5"


def any_shards(folder: Path) -> list[Path]:
    """Paths of every work file in a folder, of whatever number of shards."""
    return sorted(folder.glob("embeddings.shard-*-of-*.h5"))


class WorkFile:
    """An open shard. `states` holds a uint8 per row, the splits' rows one after another.

    Rows are addressed by (split, row). `write` then `commit`: the state is set only after the row is on disk.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header = read_header(path)
        self.blocks = read_blocks(path)
        self.splits = {name: read_split(path, name) for name in SPLITS}
        sizes = [len(self.splits[name].audio_id) for name in SPLITS]
        self._first_row = dict(zip(SPLITS, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        settings, self._hdf5_bytes = read_settings(path), None
        if settings is None:
            settings, self._hdf5_bytes = _read_tail(path, sum(sizes))
        self.settings = settings
        self._states_at = self.blocks[STATES].offset if STATES in self.blocks else self._hdf5_bytes or 0
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by `close`
        stored = np.frombuffer(os.pread(self._file.fileno(), sum(sizes), self._states_at), np.uint8)
        self._codes = _CODES if self._hdf5_bytes is None else np.arange(len(_CODES), dtype=np.uint8)
        if len(stored) != sum(sizes) or not np.isin(stored, self._codes).all():
            self.close()
            raise UserError(f"{path}: expected a state for each row, found damaged ones; remove the file and run again")
        self.states = (stored[:, None] == self._codes).argmax(axis=1).astype(np.uint8)

    @classmethod
    def create(
        cls,
        path: Path,
        header: StoreHeader,
        splits: dict[str, Split],
        settings: dict,
        skipped: Iterable[tuple[str, str]],
    ) -> "WorkFile":
        """Make the file with every row to do; it appears under its name only when it is whole.

        `settings` is what a later run must agree with; `skipped` names recordings known to be unusable.
        """
        with replacing(path) as beside:
            create_store(beside, header, splits, skipped, settings)
        return cls(path)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data).cast("B")
        while len(view):  # pwrite may write less than asked for
            written = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[written:], offset + written

    def state(self, split: str) -> np.ndarray:
        """The states of one split's rows, a view of `states`."""
        first = self._first_row[split]
        return self.states[first : first + len(self.splits[split].audio_id)]

    def write(self, split: str, row: int, encoder: str, vector: np.ndarray) -> bool:
        """Write one recording's vector in place; False where it is not finite in the stored type."""
        stored = np.ascontiguousarray(vector, self.header.numpy_dtype)
        if not np.isfinite(stored).all():
            return False
        block = self.blocks[vector_block(split, encoder)]
        if stored.shape != block.shape[1:]:
            raise ValueError(f"expected a vector of shape {block.shape[1:]}, found {stored.shape}")
        self._write(stored.data, block.offset + row * block.row_bytes)
        return True

    def write_digest(self, split: str, row: int, digest: bytes) -> None:
        """Write what identifies a recording's sound; a work file of an older version has no room for it."""
        block = self.blocks.get(digest_block(split))
        if block is not None:
            self._write(digest, block.offset + row * block.row_bytes)

    def commit(self, rows: Iterable[tuple[str, int, int]]) -> None:
        """Set the states of (split, row, state) after what was written has reached the disk."""
        os.fsync(self._file.fileno())
        for split, row, state in rows:
            index = self._first_row[split] + row
            self.states[index] = state
            self._write(self._codes[state : state + 1].tobytes(), self._states_at + index)
        os.fsync(self._file.fileno())

    def finish_in_place(self, target: Path) -> None:
        """Give the file its final name; the statistics must have been written."""
        os.fsync(self._file.fileno())
        if self._hdf5_bytes is not None:
            os.ftruncate(self._file.fileno(), self._hdf5_bytes)
        self.close()
        publish(self.path, target)

    def close(self) -> None:
        """Close the file; what was committed stays."""
        self._file.close()


def _read_tail(path: Path, rows: int) -> tuple[dict, int]:
    """The settings and the bytes of the HDF5 part of an older version's work file, whose tail holds `rows` states."""
    damaged = UserError(f"{path}: expected a work file, found its end missing; remove the file and run again")
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - _FOOTER.size)
        magic, hdf5_bytes, settings_bytes = _FOOTER.unpack(file.read())
        if magic != _MAGIC or hdf5_bytes + rows + settings_bytes + _FOOTER.size != size:
            raise damaged
        file.seek(hdf5_bytes + rows)
        try:
            return json.loads(file.read(settings_bytes)), hdf5_bytes
        except ValueError as error:
            raise damaged from error


def tail_is_cut(path: Path) -> bool:
    """True where an older version's `finish_in_place` was killed between its cut and its rename."""
    if STATES in read_blocks(path):  # a damaged file raises UserError here
        return False
    with open(path, "rb") as file:
        file.seek(-_FOOTER.size, os.SEEK_END)
        return not file.read().startswith(_MAGIC)


def check_settings(path: Path, found: dict, expected: dict, remedy: str = "--overwrite") -> None:
    """Raise `UserError` that lists where a shard's settings differ from this run's.

    The weights are not compared with those of an older version's shard, which does not say them.
    """
    expected = {name: value for name, value in expected.items() if name in found or name != "weights"}
    listing = differences({name: found.get(name) for name in expected}, expected)
    if listing:
        raise UserError(f"{path}: was begun with other settings; use those, or {remedy}:{listing}")
