"""A finished store as the source of the next one: which of its vectors hold, and what is taken and what computed."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from embedding_models.pipeline import Clip, Finished, Vectors
from preparing.clips import sound_digest
from preparing.recordings import Dataset
from store.reading import SPLITS, EmbeddingStore, StoreHeader, read_blocks, vector_block

_PRECISIONS = ("float16", "tf32", "float32")  # from the least to the best
_ROWS_AT_ONCE = 256  # that are taken between two commits
_TRIED = 20  # files that are read to tell a data set that was moved from another one

Place = tuple[str, int]  # split and row in the earlier store


def holding_spaces(then: StoreHeader, now: StoreHeader) -> list[str]:
    """The spaces of a run whose vectors in an earlier store hold: same encoder, revision and recipe, as precise.

    An encoder is the same by its weights where both say them, else by id and revision. What the run's entry does not
    say, as before its encoder is loaded, is not compared.
    """
    return [name for name in now.encoders if name in then.encoders and _holds(then, now, name)]


def _holds(then: StoreHeader, now: StoreHeader, space: str) -> bool:
    left_out = {"precision"}
    if space in then.weights and space in now.weights:
        if then.weights[space] != now.weights[space]:
            return False
        left_out |= {"id", "revision"}
    before, entry = then.encoders[space], now.encoders[space]
    same = all(before.get(key) == value for key, value in entry.items() if key not in left_out)
    return same and _precision(then, space) >= _precision(now, space)


def _precision(header: StoreHeader, space: str) -> int:
    return _PRECISIONS.index(header.encoders[space].get("precision", header.dtype))


def noted_precision(precision: str) -> dict[str, str]:
    """What an encoder's entry says of a run's precision: TF32 is stored as float32 and is not the same."""
    return {"precision": "tf32"} if precision == "tf32" else {}


class EarlierStore:
    """What the next store can take of a finished one, by the sound of a recording and, where that is all, by its id.

    spaces: those whose vectors hold for the run. by_id: whether an id means the same recording there as in the run's
    data set: in one of the same name and revision. has_digests: not so in a store of an older version.
    """

    def __init__(self, path: Path, header: StoreHeader, dataset: Dataset):
        store = EmbeddingStore(path)
        then = store.header
        self.spaces = holding_spaces(then, header)
        self.by_id = (then.dataset, then.revision) == (dataset.name, dataset.revision) and dataset.clips.stable_ids
        self._pinned = self.by_id and then.revision is not None
        # Read row by row, not mapped: pages of a mapping count as the process's memory until they are needed elsewhere.
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        self._blocks = read_blocks(path)
        self._digests = {name: store.digests(name) for name in SPLITS}
        self.has_digests = self._digests["train"] is not None
        self._place_of_id = {
            audio_id: (name, row) for name in SPLITS for row, audio_id in enumerate(store.split(name).audio_id)
        }
        places = ((self.digest(place), place) for place in self._place_of_id.values())
        self._place_of_sound = {digest: place for digest, place in places if digest is not None}

    def digest(self, place: Place) -> bytes | None:
        """What identifies the sound of a row; None where nobody has read its file."""
        digests = self._digests[place[0]]
        digest = b"" if digests is None else digests[place[1]].tobytes()
        return digest if any(digest) else None

    def find_unread(self, audio_id: str, gone: bool = False) -> Place | None:
        """The row of a recording whose file has not been read: in a data set of one revision, or where no digest is.

        gone: its file is not there any more, so that its sound cannot have become another.
        """
        place = self._place_of_id.get(audio_id)
        if place is None or not self.by_id:
            return None
        return place if gone or self._pinned or self.digest(place) is None else None

    def find(self, audio_id: str, digest: bytes | None) -> Place | None:
        """The row of a recording whose file has this digest."""
        if digest in self._place_of_sound:
            return self._place_of_sound[digest]
        return self.find_unread(audio_id)

    def knows_any(self, dataset: Dataset) -> bool:
        """Whether a recording of the data set is in the store; where no id is, the first few files are read."""
        if any(recording.audio_id in self._place_of_id for recording in dataset.recordings):
            return True
        if not self._place_of_sound:
            return False
        dataset.clips.prepare()
        clips = dataset.clips.read({recording.audio_id for recording in dataset.recordings})
        return any(sound_digest(audio) in self._place_of_sound for _, audio in islice(clips, _TRIED))

    def has_changed(self, audio_id: str, digest: bytes | None) -> bool:
        """Whether the recording of this id sounded otherwise then."""
        place = self._place_of_id.get(audio_id) if self.by_id else None
        return place is not None and self.digest(place) not in (None, digest)

    def vectors(self, place: Place) -> Vectors:
        """A row's vectors in the spaces that hold."""
        split, row = place
        found = {}
        for space in self.spaces:
            block = self._blocks[vector_block(split, space)]
            data = os.pread(self._file.fileno(), block.row_bytes, block.offset + row * block.row_bytes)
            found[space] = np.frombuffer(data, block.dtype)
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Sources:
    """Where each vector of a run comes from: taken from the earlier store, if there is one, or computed.

    Stands between the reading of the clips and the encoders: notes what each file sounds like and which spaces are
    still wanted of it, and adds what is taken to what was computed. `taken` and `computed` count vectors by space.
    """

    def __init__(self, earlier: EarlierStore | None, spaces: Iterable[str]):
        self.earlier = earlier
        self.taken: Counter[str] = Counter()
        self.computed: Counter[str] = Counter()
        self.changed = self.unread = self.gone = 0  # recordings
        self._spaces = list(spaces)
        self._digests: dict[str, bytes | None] = {}
        self._places: dict[str, Place] = {}

    def unread_rows(self, audio_ids: Iterable[str], gone: bool = False) -> Iterator[Finished]:
        """Those of the recordings that are taken whole without their files, in lists as the encoders give them."""
        found: Finished = []
        for audio_id in audio_ids:
            place = self._unread_place(audio_id, gone)
            if place is None or self.earlier is None:
                continue
            self._places[audio_id], self._digests[audio_id] = place, self.earlier.digest(place)
            self.gone += gone
            self.unread += not gone
            found.append((audio_id, {}))
            if len(found) == _ROWS_AT_ONCE:
                yield found
                found = []
        if found:
            yield found

    def is_kept(self, audio_id: str) -> bool:
        """Whether the earlier store has all vectors of a recording whose file is gone."""
        return self._unread_place(audio_id, True) is not None

    def _unread_place(self, audio_id: str, gone: bool) -> Place | None:
        if self.earlier is None or set(self._spaces) - set(self.earlier.spaces):
            return None
        return self.earlier.find_unread(audio_id, gone)

    def noted(self, clips: Iterable[tuple[str, bytes | Path]]) -> Iterator[Clip]:
        """Pass clips on, each after its digest and its row in the earlier store were noted."""
        for audio_id, audio in clips:
            digest = self._digests[audio_id] = sound_digest(audio)
            if self.earlier is not None:
                place = self.earlier.find(audio_id, digest)
                if place is not None:
                    self._places[audio_id] = place
                self.changed += self.earlier.has_changed(audio_id, digest)
            yield audio_id, audio

    def wanted(self, audio_id: object) -> Collection[str]:
        """The spaces in which a recording's vectors have to be computed."""
        if self.earlier is None or str(audio_id) not in self._places:
            return self._spaces
        return [space for space in self._spaces if space not in self.earlier.spaces]

    def joined(self, audio_id: str, computed: Vectors) -> tuple[Vectors, bytes | None]:
        """All vectors of a recording, and what identifies its sound; it is forgotten here."""
        place, digest = self._places.pop(audio_id, None), self._digests.pop(audio_id, None)
        taken = {} if place is None or self.earlier is None else self.earlier.vectors(place)
        self.taken.update(taken.keys())
        self.computed.update(computed.keys())
        return {**taken, **computed}, digest

    def forget(self, audio_id: str) -> None:
        """Forget a recording that is skipped."""
        self._places.pop(audio_id, None)
        self._digests.pop(audio_id, None)

    def lines(self) -> Iterator[str]:
        """What was taken and what computed, once all is done; nothing without an earlier store."""
        if self.earlier is None:
            return
        for what, counts in (("taken from the store before", self.taken), ("computed", self.computed)):
            listed = ", ".join(f"{space} {counts[space]:,}" for space in self._spaces if counts[space])
            yield f"vectors {what}: {listed or 'none'}"
        reasons = {
            "of {:,} recordings the file is another than then": self.changed,
            "{:,} recordings were taken by their id, without reading their files": self.unread,
            "the files of {:,} recordings are gone; their vectors were taken by the id": self.gone,
        }
        yield from (line.format(number) for line, number in reasons.items() if number)


def gathered(batches: Iterable[Finished]) -> Iterator[Finished]:
    """Join lists of recordings of which nothing was computed, so that they are not committed one by one."""
    waiting: Finished = []
    for finished in batches:
        waiting += finished
        if len(waiting) >= _ROWS_AT_ONCE or any(result != {} for _, result in finished):
            yield waiting
            waiting = []
    if waiting:
        yield waiting
