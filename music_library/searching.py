"""Queries against an indexed library: texts, tracks, a text without another, moments inside tracks."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from common.errors import UserError
from music_library.index_space import IndexSpace, recorded_space
from music_library.milvus_index import DEFAULT_URI, MAX_RESULTS, Found, VectorDatabase
from music_library.vector_files import VectorFiles, kept_vectors
from text_to_audio.model.checkpoints import read_checkpoint
from text_to_audio.model.inference import LoadedCheckpoint, embed_texts_batch, load_checkpoint

TRACK_FIELDS = ["path", "title", "artist", "album", "duration"]
_RERANKED = 10  # candidates per result wanted, where audio is compared with audio in a narrow index


@dataclass(frozen=True)
class Hit:
    """A track that was found.

    rank: from 1. score: the cosine with the query. track: the track's id, the same as long as its path is, safe in a
    URL. duration: seconds. moment: where its best window starts, in seconds, if moments were searched.
    """

    rank: int
    score: float
    track: str
    path: str
    title: str
    artist: str
    album: str
    duration: float
    moment: float | None = None


def moments_collection(space: str) -> str:
    """The collection of a space's windows."""
    return f"{space}_moments"


def track_name(number: int) -> str:
    """A track's id as text: 16 hexadecimal digits."""
    return f"{number:016x}"


def track_number(track: str) -> int | None:
    """The number behind a track's id; None for what is no id."""
    if len(track) != 16 or not set(track) <= set("0123456789abcdef"):
        return None
    number = int(track, 16)
    return number if number < 1 << 63 else None


def without(vectors: np.ndarray, unwanted: np.ndarray, weight: float, setting: str = "--not") -> np.ndarray:
    """Queries (n, dim) less `weight` times the unit vector `unwanted` (dim,), at unit length again.

    Raises `UserError`, which names the `setting` that was given, where nothing is left.
    """
    rest = vectors - weight * unwanted / np.linalg.norm(unwanted)
    lengths = np.linalg.norm(rest, axis=1, keepdims=True)
    if (lengths < 1e-6).any():
        raise UserError(f"{setting}: nothing is left of the query; expected it to differ from what it is to be without")
    return (rest / lengths).astype(np.float32)


def replaced_prefix(path: str, mapping: tuple[str, str] | None) -> str:
    """The path with FROM at its start, as whole folders, replaced by TO."""
    if mapping is None:
        return path
    start, target = mapping
    try:
        inner = PurePosixPath(path).relative_to(start)
    except ValueError:
        return path
    return str(PurePosixPath(target) / inner)


class Searcher:
    """A checkpoint and the library it was indexed for. One thread at a time; made by `open_searcher`."""

    def __init__(
        self, model: LoadedCheckpoint, database: VectorDatabase, space: IndexSpace, files: Path,
        map_path: tuple[str, str] | None = None,
    ):  # fmt: skip
        self.text_encoder, self.projection, self.config = model
        self.space, self._database, self._files = space, database, files
        self._map_path = map_path
        self._search_params: dict[str, dict] = {}
        for name in (space.name, moments_collection(space.name)):
            if identity := database.identity(name):
                self._search_params[name] = identity["search_params"]
                database.load(name)
        self.has_moments = moments_collection(space.name) in self._search_params

    def embed(self, texts: list[str]) -> np.ndarray:
        """Texts as unit vectors (n, audio_dim) float32."""
        return embed_texts_batch(texts, self.text_encoder, self.projection, str(self.config.torch_device))

    def find(self, vectors: np.ndarray, k: int, moments: bool = False) -> list[list[Hit]]:
        """The k tracks nearest to each query, best first; with `moments` by their best ten seconds.

        vectors: (n, audio_dim) unit vectors as `embed` gives them. Raises `UserError` for moments of a library that
        was indexed without.
        """
        queries = self.space.queries(np.asarray(vectors, np.float32))
        if moments:
            return self._best_moments(queries, k)
        name = self.space.name
        answers = self._database.search(name, queries, k, TRACK_FIELDS, self._search_params[name])
        return [[self._hit(rank, found) for rank, found in enumerate(hits, 1)] for hits in answers]

    def like(self, track: str, k: int) -> list[Hit]:
        """The k tracks that sound most like an indexed one, without itself.

        In a narrow index the candidates are ranked again on the plain vectors: two tracks differ outside the
        subspace that text reaches. Raises `UserError` for a track that is not indexed.
        """
        number, name = track_number(track), self.space.name
        rows = self._database.get(name, [number], ["embedding"]) if number is not None else {}
        if number not in rows:
            raise UserError(f"--like: no track {track!r} in {self._database.uri}")
        wanted = max(_RERANKED * (k + 1), 200) if self.space.narrow else k + 1
        query = np.asarray(rows[number]["embedding"], np.float32)[None]
        (found,) = self._database.search(name, query, wanted, TRACK_FIELDS, self._search_params[name])
        if self.space.narrow:
            found = self._reranked(number, found)
        others = [each for each in found if each.id != number][:k]
        return [self._hit(rank, each) for rank, each in enumerate(others, 1)]

    def path_of(self, track: str) -> Path | None:
        """Where an indexed track's file is; None for whatever is not indexed."""
        number = track_number(track)
        rows = self._database.get(self.space.name, [number], ["path"]) if number is not None else {}
        return Path(replaced_prefix(rows[number]["path"], self._map_path)) if number in rows else None

    def track_of(self, path: str | Path) -> str | None:
        """The id of the track at a path (as indexed or as mapped), or None."""
        from music_library.music_folder import track_id  # here, as the web page has no use for the folder walk

        back = self._map_path and (self._map_path[1], self._map_path[0])
        spellings = [os.path.realpath(path), os.path.abspath(path)]  # the second: indexed before links were resolved
        for each in dict.fromkeys([*spellings, *(replaced_prefix(each, back) for each in [str(path), *spellings])]):
            number = track_id(Path(os.path.abspath(each)))
            if self._database.get(self.space.name, [number], ["path"]):
                return track_name(number)
        return None

    def count(self) -> int:
        """Indexed tracks."""
        return self._database.count(self.space.name)

    def close(self) -> None:
        """Leave the database; a local one is then free for another process."""
        self._database.close()

    def _hit(self, rank: int, found: Found, moment: float | None = None) -> Hit:
        fields = dict(found.fields)
        fields["path"] = replaced_prefix(fields["path"], self._map_path)
        return Hit(rank, float(found.score), track_name(found.id), moment=moment, **fields)

    def _best_moments(self, queries: np.ndarray, k: int) -> list[list[Hit]]:
        if not self.has_moments:
            raise UserError(
                f"{self._database.uri}: {self.space.name} was indexed without moments; "
                f"run `python index_library.py MUSIC_DIR --moments` with the same checkpoint"
            )
        # One search answers nearly all queries: a few ask again, where few tracks hold all of the nearest windows.
        limit = 8 * k
        nearest = self._nearest_windows(queries, limit)
        return [
            self._best_moments_of(query[None], k, limit, windows)
            for query, windows in zip(queries, nearest, strict=True)
        ]

    def _nearest_windows(self, queries: np.ndarray, limit: int) -> list[list[Found]]:
        name = moments_collection(self.space.name)
        return self._database.search(name, queries, limit, ["track", "start"], self._search_params[name])

    def _best_moments_of(self, query: np.ndarray, k: int, limit: int, windows: list[Found]) -> list[Hit]:
        """The best moments of one query (1, dim), from its `limit` nearest windows and more where they do not do."""
        size = 0
        while True:
            best: dict[int, Found] = {}
            for window in windows:
                best.setdefault(window.fields["track"], window)
            if len(best) >= k or len(windows) <= size or limit >= MAX_RESULTS:
                break
            limit, size = 4 * limit, len(windows)
            (windows,) = self._nearest_windows(query, limit)
        rows = self._database.get(self.space.name, list(best)[: 2 * k], TRACK_FIELDS)
        hits: list[Hit] = []
        for track, window in best.items():
            if track in rows and len(hits) < k:
                fields = {field: rows[track][field] for field in TRACK_FIELDS}
                hits.append(self._hit(len(hits) + 1, Found(track, window.score, fields), window.fields["start"]))
        return hits

    def _reranked(self, number: int, found: list[Found]) -> list[Found]:
        with VectorFiles(self._files, self.space.name) as files:
            rows = files.rows_of([number, *(each.id for each in found)])
            if number not in rows:
                raise UserError(f"{self._files}: the plain vectors of this track are not there; index it again")
            candidates = [each for each in found if each.id in rows]
            vectors = self.space.standardised(files.vectors[[rows[number], *(rows[each.id] for each in candidates)]])
        scores = vectors[1:] @ vectors[0]
        order = np.argsort(-scores, kind="stable")
        return [Found(candidates[i].id, float(scores[i]), candidates[i].fields) for i in order]


def mending(checkpoint: str | Path, uri: str) -> str:
    """The command that makes an index anew from the plain vectors, for this checkpoint."""
    place = "" if uri == DEFAULT_URI else f" --milvus-uri {uri}"
    return f"python index_library.py --reindex --checkpoint {checkpoint}{place}"


def check_identity(found: dict, wanted: dict, uri: str, checkpoint: str | Path) -> None:
    """Raise `UserError`, with the command that mends it, where a collection was made for something else."""
    for key in ("space", "audio_dim", "recipe", "projection"):
        if found.get(key) != wanted[key]:
            what = "another projection" if key == "projection" else f"{key} {found.get(key)!r}"
            expected = "that of this checkpoint" if key == "projection" else repr(wanted[key])
            raise UserError(
                f"{uri}: {wanted['space']}: indexed with {what}, expected {expected} ({checkpoint}); "
                f"mend it with `{mending(checkpoint, uri)}`"
            )


def open_searcher(
    checkpoint: str | Path,
    milvus_uri: str = DEFAULT_URI,
    token: str | None = None,
    device: str = "auto",
    map_path: tuple[str, str] | None = None,
    vectors_dir: str | Path | None = None,
    precision: str = "",
) -> Searcher:
    """Load a checkpoint and open the library that was indexed for it.

    milvus_uri: a Milvus Lite folder (*.db) or a server's address, with `token` where it wants one. map_path: (FROM,
    TO), the start of the indexed paths and what it is here. vectors_dir: the plain vectors (default: beside the
    index). precision: of the text model's arithmetic, see `load_checkpoint`. Raises `UserError` where either is
    missing, held by another process, or made for something else.
    """
    contents = read_checkpoint(checkpoint)
    recorded = recorded_space(contents, checkpoint)
    database = VectorDatabase(milvus_uri, token)
    try:
        model = load_checkpoint(checkpoint, device, contents, precision)
        name = model.config.audio_encoder
        identity = database.identity(name)
        files = Path(vectors_dir) if vectors_dir else kept_vectors(milvus_uri, identity)
        if identity is None:
            raise UserError(
                f"{milvus_uri}: expected the audio space {name!r} of {checkpoint}, found "
                f"{', '.join(database.names()) or 'nothing'}; "
                f"index it with `python index_library.py MUSIC_DIR --checkpoint {checkpoint}`"
            )
        space = IndexSpace(name, model.projection, recorded["recipe"], recorded["id"], identity["narrow"], files / name)
        for each in (identity, database.identity(moments_collection(name))):
            if each is not None:
                check_identity(each, space.identity, milvus_uri, checkpoint)
        return Searcher(model, database, space, files, map_path)
    except BaseException:
        database.close()
        raise
