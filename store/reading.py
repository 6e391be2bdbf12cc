"""embeddings.h5: its layout and how it is read; `writing.py` is the other half.

One row per recording, captions point at their row. Vectors are contiguous and uncompressed, so a reader
maps them straight from the file: `numpy.memmap` at the data set's offset, several times faster than indexing
through h5py.

    /                     attrs: format, version, dataset, revision, seed, dtype, encoders and weights (JSON)
    /{train,val,test}/audio_id, source_id        (N,)  str
    /{train,val,test}/{encoder}_embeddings       (N, D) float32 | float16
    /{train,val,test}/audio_digest               (N, 16) uint8, of the bytes of the recording's file; zeros: not known
    /{train,val,test}/caption, caption_kind      (C,)  str
    /{train,val,test}/caption_audio              (C,)  int64, the row of the caption's recording
    /statistics/{encoder}/{mean,std}             (D,)  float32, over the train recordings
    /skipped/{audio_id,reason}                   (S,)  str
    /states                                      (rows,) uint8, and the attribute settings: only in a file that began
                                                 as a work file (preparing/work_file.py); readers ignore them

An HDF5 user block of 4,096 bytes before it all holds the checksum of what never changes (checksum.py).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import h5py
import numpy as np

from common.errors import UserError
from store.checksum import check_undamaged

FORMAT = "text-audio-embeddings"
VERSION = 1
STATES = "states"  # the data set of a work file
DIGEST_BYTES = 16  # of BLAKE2b over the bytes of a recording's file
Result = TypeVar("Result")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class StoreHeader:
    """What the whole file is made of; the root attributes.

    `encoders` maps a space's name ("muq", ...) to {id, revision, dim, sample_rate, recipe}; `weights` maps it to a
    digest of the encoder's parameters, which stores of older versions do not have.
    """

    dataset: str
    revision: str | None
    seed: int
    dtype: str
    encoders: dict[str, dict]
    weights: dict[str, str] = field(default_factory=dict)

    @property
    def numpy_dtype(self) -> np.dtype:
        """The vectors' type on disk, little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        """Bytes of one recording's vectors in all spaces."""
        return sum(encoder["dim"] for encoder in self.encoders.values()) * self.numpy_dtype.itemsize


@dataclass
class Split:
    """The strings of one split: N recordings and the C captions that point at them."""

    audio_id: list[str] = field(default_factory=list)
    source_id: list[str] = field(default_factory=list)
    caption: list[str] = field(default_factory=list)
    caption_audio: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    caption_kind: list[str] = field(default_factory=list)

    def take(self, rows: np.ndarray) -> "Split":
        """Return the split of these rows alone, in their order, with their captions."""
        new_row = np.full(len(self.audio_id), -1, np.int64)
        new_row[rows] = np.arange(len(rows))
        target = new_row[self.caption_audio]
        kept = np.flatnonzero(target >= 0)
        kept = kept[np.argsort(target[kept], kind="stable")]  # captions follow the order of their recordings
        return Split(
            [self.audio_id[row] for row in rows],
            [self.source_id[row] for row in rows],
            [self.caption[i] for i in kept],
            target[kept],
            [self.caption_kind[i] for i in kept],
        )


@dataclass(frozen=True)
class Block:
    """Where a contiguous data set lies in the file: byte offset, shape and element type."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (of one element where the data set has one axis)."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def map(self, path: str | Path, mode: Literal["r", "r+"] = "r") -> np.ndarray:
        """Map the block as an array; an empty block cannot be mapped and is a plain empty array."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(path, self.dtype, mode, self.offset, self.shape)


def vector_block(split: str, encoder: str) -> str:
    """Name of the data set that holds a split's vectors in one space."""
    return f"{split}/{encoder}_embeddings"


def digest_block(split: str) -> str:
    """Name of the data set that holds what identifies the sound of a split's recordings; older stores have none."""
    return f"{split}/audio_digest"


def statistics_block(encoder: str, which: str) -> str:
    """Name of the data set that holds a space's "mean" or "std"."""
    return f"statistics/{encoder}/{which}"


def read_header(path: str | Path) -> StoreHeader:
    """Read the root attributes; raises `UserError` where the file is no store or is cut off."""
    return _read(path, lambda file: _header(path, file))


def read_settings(path: str | Path) -> dict | None:
    """What a work file says of the run that made it; None for another file."""
    return _read(path, lambda file: json.loads(file.attrs["settings"]) if "settings" in file.attrs else None)


def _header(path: str | Path, file: h5py.File) -> StoreHeader:
    found = file.attrs.get("format")
    if found != FORMAT:
        raise UserError(f"{path}: expected a store of prepare_dataset.py (format {FORMAT!r}), found {found!r}")
    if file.attrs["version"] != VERSION:
        raise UserError(f"{path}: expected store version {VERSION}, found {file.attrs['version']}; prepare it again")
    attributes = {name: file.attrs[name] for name in ("dataset", "revision", "seed", "dtype", "encoders")}
    return StoreHeader(
        attributes["dataset"],
        attributes["revision"] or None,
        int(attributes["seed"]),
        attributes["dtype"],
        json.loads(attributes["encoders"]),
        json.loads(file.attrs.get("weights", "{}")),
    )


def _read(path: str | Path, take: Callable[[h5py.File], Result]) -> Result:
    """What `take` reads from an open store; `UserError` for a file that is missing, damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a store written by prepare_dataset.py")

    def read() -> Result:
        with h5py.File(path, "r") as file:
            return take(file)

    try:
        check_undamaged(path, read)
        return read()
    except OSError as error:
        raise UserError(f"{path}: expected an HDF5 store, found a file HDF5 cannot open ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]  # what h5py makes of damage that HDF5 does not notice
        raise UserError(f"{path}: expected a store of prepare_dataset.py, found a damaged one ({reason})") from error


def read_blocks(path: str | Path) -> dict[str, Block]:
    """Return where the data sets lie that are written in place: vectors, statistics, digests, a work file's states."""
    blocks = _read(path, lambda file: blocks_of(path, file))
    end = max(block.offset + block.row_bytes * block.shape[0] for block in blocks.values())
    if end > Path(path).stat().st_size:
        raise UserError(f"{path}: expected {end:,} bytes, found {Path(path).stat().st_size:,}: truncated or damaged")
    return blocks


def blocks_of(path: str | Path, file: h5py.File) -> dict[str, Block]:
    """As `read_blocks`, of an open file; `path` is for messages."""
    header = _header(path, file)
    names = [vector_block(split, encoder) for split in SPLITS for encoder in header.encoders]
    names += [statistics_block(encoder, which) for encoder in header.encoders for which in ("mean", "std")]
    names += [name for name in (STATES, *map(digest_block, SPLITS)) if name in file]
    blocks = {}
    for name in names:
        if name not in file:
            raise UserError(f"{path}: expected the data set /{name}, it is not there")
        dataset = file[name]
        if dataset.chunks is not None:
            raise UserError(f"{path}: expected /{name} to be contiguous, found chunks of {dataset.chunks}")
        blocks[name] = Block(dataset.id.get_offset() or 0, dataset.shape, dataset.dtype)
    return blocks


def read_split(path: str | Path, name: str) -> Split:
    """Read the strings of one split."""
    columns = ("audio_id", "source_id", "caption", "caption_kind")

    def take(file: h5py.File) -> Split:
        group = file[name]
        text = {column: group[column].asstr()[:].tolist() for column in columns}
        return Split(caption_audio=group["caption_audio"][:], **text)

    return _read(path, take)


class EmbeddingStore:
    """A finished embeddings.h5, read-only.

    Holds paths and offsets, no open file: it can be pickled and used in worker processes. Raises `UserError`
    where the file is missing, cut off or not a store.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.header = read_header(self.path)
        self._blocks = read_blocks(self.path)
        self._splits: dict[str, Split] = {}

    def __getstate__(self) -> dict:
        return {**vars(self), "_splits": {}}  # another process reads the strings it needs

    @property
    def encoders(self) -> dict[str, dict]:
        """Space name -> {id, revision, dim, sample_rate, recipe}."""
        return self.header.encoders

    def dim(self, encoder: str) -> int:
        """Width of a space; `UserError` where the store does not hold it."""
        if encoder not in self.encoders:
            raise UserError(
                f"{self.path}: expected vectors of {encoder!r}, found {', '.join(self.encoders)}; "
                f"prepare them with prepare_dataset.py --encoders"
            )
        return self.encoders[encoder]["dim"]

    def split(self, name: str) -> Split:
        """The strings of "train", "val" or "test", read once: to be left as they are."""
        if name not in self._splits:
            self._splits[name] = read_split(self.path, name)
        return self._splits[name]

    def vectors(self, split: str, encoder: str) -> np.ndarray:
        """A split's vectors, (N, D) float32 or float16, mapped read-only."""
        self.dim(encoder)
        return self._blocks[vector_block(split, encoder)].map(self.path)

    def digests(self, split: str) -> np.ndarray | None:
        """What identifies the sound of a split's recordings, (N, 16) uint8, mapped; None in a store without them.

        Each is BLAKE2b (16 bytes) of the bytes of the recording's file, or all zero where nobody has read that.
        """
        block = self._blocks.get(digest_block(split))
        return None if block is None else block.map(self.path)

    def statistics(self, encoder: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each dimension over the train recordings, (D,) float32 each."""
        self.dim(encoder)
        mean, std = (self._blocks[statistics_block(encoder, which)].map(self.path) for which in ("mean", "std"))
        return np.array(mean), np.array(std)

    def skipped(self) -> list[tuple[str, str]]:
        """(audio id, reason) of every recording that is not in the file."""

        def take(file: h5py.File) -> list[tuple[str, str]]:
            ids, reasons = (file[f"skipped/{column}"].asstr()[:].tolist() for column in ("audio_id", "reason"))
            return list(zip(ids, reasons, strict=True))

        return _read(self.path, take)
