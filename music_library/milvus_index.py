"""Everything that speaks to Milvus: a local folder (Milvus Lite) or a server, one collection per audio space."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException

from common.errors import UserError
from common.files import lock_holder

FIELD = "embedding"
SERVER_MAX_DIM = 32_768  # a server refuses wider float vectors; Milvus Lite does not
DEFAULT_URI = "data/library.db"
MAX_RESULTS = 16_384  # Milvus's bound on one search
INDEX_TYPES = {
    "HNSW": ({"M": 16, "efConstruction": 200}, {"ef": 512}),
    "IVF_FLAT": ({"nlist": 128}, {"nprobe": 10}),
    "FLAT": ({}, {}),
}  # type -> (build parameters, search parameters)
AUTO = "auto"
EXACT_ELEMENTS = 30_000_000  # rows x dimensions that Milvus Lite searches exactly in a tenth of a second on two cores
_REGISTER = "text_audio_spaces"  # Milvus Lite keeps no collection description, so identities are rows of their own
_BATCH_BYTES = 16 << 20  # of vectors per request; a server refuses messages of more than 64 MB
_TEXT_BYTES = 1024
_PATH_BYTES = 4096  # Linux's PATH_MAX
_TRACK_FIELDS = {"path": _PATH_BYTES, "title": _TEXT_BYTES, "artist": _TEXT_BYTES, "album": _TEXT_BYTES}

logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # its failures are raised as well, and told in one line
logging.getLogger("milvus_lite").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class IndexChoice:
    """An index type with its parameters: `build` and `search` as Milvus names them. "auto" is to be `resolved`."""

    kind: str = "HNSW"
    build: dict | None = None
    search: dict | None = None

    def __post_init__(self) -> None:
        if self.kind not in (AUTO, *INDEX_TYPES):
            raise UserError(f"--index-type: expected one of {', '.join((AUTO, *INDEX_TYPES))}, found {self.kind!r}")

    @property
    def build_params(self) -> dict:
        """Parameters of building: the type's usual ones, where none were given."""
        return {**INDEX_TYPES[self.kind][0], **(self.build or {})}

    @property
    def search_params(self) -> dict:
        """Parameters of searching: the type's usual ones, where none were given."""
        return {**INDEX_TYPES[self.kind][1], **(self.search or {})}

    def resolved(self, rows: int, dim: int, there: str | None = None) -> "IndexChoice":
        """What auto comes to for a collection of this size; any other choice as it is.

        Exact search (FLAT) as long as it is quick, else HNSW. there: the type that auto came to before: HNSW stays,
        so that a library of about that size is not built anew again and again.
        """
        if self.kind != AUTO:
            return self
        exact = rows * dim <= EXACT_ELEMENTS and there != "HNSW"
        return replace(self, kind="FLAT" if exact else "HNSW")


def kind_of_parameters(*given: dict | None) -> str | None:
    """The index type that has these parameters; None where none are given, `UserError` where no type has them all."""
    names = {name for each in given if each for name in each}
    kinds = [kind for kind, parts in INDEX_TYPES.items() if names <= {name for part in parts for name in part}]
    if not kinds:
        raise UserError(
            f"--index-params, --search-params: expected those of one index type, found {', '.join(sorted(names))}; "
            f"name the type with --index-type"
        )
    return kinds[0] if names else None


@dataclass(frozen=True)
class Found:
    """One row that a search found: its id, the cosine with the query, and the fields that were asked for."""

    id: int
    score: float
    fields: dict


def is_local(uri: str) -> bool:
    """Whether a URI names a Milvus Lite folder rather than a server."""
    return "://" not in uri


def cut(text: str, size: int) -> str:
    """The text cut to at most `size` bytes of UTF-8, never inside a character."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


class VectorDatabase:
    """One Milvus database. Vectors are unit vectors, the metric is L2, scores are cosines: 1 - distance^2 / 2.

    `uri` is a folder whose name ends in ".db" (made where it is missing; one process at a time) or a server's
    address, with `token` where it wants one. Raises `UserError` where neither can be opened.
    """

    def __init__(self, uri: str, token: str | None = None, create: bool = False):
        self.uri, self._local = uri, is_local(uri)
        self._kinds: dict[str, str] = {}  # index types by collection, asked once
        if self._local:
            self._check_folder(Path(uri), create)
        try:
            # Lite's server, in this process, takes pymilvus's pings every ten seconds for an attack and hangs up on a
            # call that lasts minutes, as loading a large library does
            options = {"grpc_options": {"grpc.keepalive_time_ms": 86_400_000}} if self._local else {"timeout": 30}
            self._client = MilvusClient(uri, token=token or "", **options)
        except Exception as error:  # pymilvus wraps some failures and lets others through
            raise UserError(f"{uri}: could not open the database ({_reason(error)})") from error

    def _check_folder(self, folder: Path, create: bool) -> None:
        if folder.suffix != ".db":
            raise UserError(f"{folder}: expected a folder whose name ends in .db, or a server's http://host:port")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: expected a folder of Milvus Lite, found a file")
        if not folder.exists():
            if not create:
                raise UserError(f"{folder}: no such library; expected one made by `python index_library.py MUSIC_DIR`")
            folder.parent.mkdir(parents=True, exist_ok=True)
        if holder := lock_holder(folder / "LOCK"):
            raise UserError(
                f"{folder}: held by {holder}; a Milvus Lite folder serves one process at a time: ask that one "
                f"(its page and /api/search, where it is search.py --serve), or stop it"
            )

    def close(self) -> None:
        """Close the connection; a Lite folder is free for another process after it."""
        self._client.close()
        if self._local:
            from milvus_lite.server_manager import server_manager_instance  # not there beside a server alone

            server_manager_instance.release_server(self.uri)

    def __enter__(self) -> "VectorDatabase":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # what a collection was made from

    def identity(self, name: str) -> dict | None:
        """What `create` noted of a collection, or None where there is none of ours by that name."""
        if not self._client.has_collection(name) or not self._client.has_collection(_REGISTER):
            return None
        self._client.load_collection(_REGISTER)
        rows = self._client.query(_REGISTER, filter=f'name == "{name}"', output_fields=["identity"])
        return json.loads(rows[0]["identity"]) if rows else None

    def names(self) -> list[str]:
        """Every collection there is, but for our register."""
        return sorted(name for name in self._client.list_collections() if name != _REGISTER)

    def has(self, name: str) -> bool:
        """Whether there is a collection of that name, ours or not."""
        return self._client.has_collection(name)

    def create(self, name: str, dim: int, index: IndexChoice, identity: dict, moments: bool = False) -> None:
        """Make a collection of tracks, or of windows where `moments`, and note what it is made from."""
        if not self._local and dim > SERVER_MAX_DIM:
            raise UserError(f"{self.uri}: a server takes at most {SERVER_MAX_DIM:,} dimensions, found {dim:,}")
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field(FIELD, DataType.FLOAT_VECTOR, dim=dim)
        schema.add_field("version", DataType.INT64)
        if moments:
            schema.add_field("track", DataType.INT64)
            schema.add_field("start", DataType.DOUBLE)
        else:
            for field, size in _TRACK_FIELDS.items():
                schema.add_field(field, DataType.VARCHAR, max_length=size)
            schema.add_field("duration", DataType.DOUBLE)
        self.note(name, {**identity, "search_params": index.search_params})
        self._client.create_collection(name, schema=schema, consistency_level="Strong")
        self._create_index(name, index)

    def _create_index(self, name: str, index: IndexChoice) -> None:
        self._kinds.pop(name, None)
        params = self._client.prepare_index_params()
        # a server reads them one by one, which is how pymilvus 3 sends them; Milvus Lite 3.2 takes them from "params"
        sent = {**index.build_params, "params": index.build_params}
        params.add_index(FIELD, index_type=index.kind, metric_type="L2", params=sent)
        self._tell(lambda: self._client.create_index(name, params))
        if self._local:  # a loaded one would be built anew with every data file that Lite merges; `build` loads it
            self._tell(lambda: self._client.release_collection(name))

    def note(self, name: str, identity: dict) -> None:
        """Note what a collection is made from, in the place of what was noted of it."""
        if not self._client.has_collection(_REGISTER):
            schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("name", DataType.VARCHAR, is_primary=True, max_length=255)
            schema.add_field("identity", DataType.VARCHAR, max_length=65_535)
            schema.add_field(FIELD, DataType.FLOAT_VECTOR, dim=2)  # Milvus has no collection without a vector
            params = self._client.prepare_index_params()
            params.add_index(FIELD, index_type="FLAT", metric_type="L2")
            self._client.create_collection(_REGISTER, schema=schema, index_params=params)
        row = {"name": name, "identity": json.dumps(identity, sort_keys=True), FIELD: [0.0, 1.0]}
        self._client.upsert(_REGISTER, [row])
        self._client.flush(_REGISTER)

    def drop(self, name: str) -> None:
        """Remove a collection, where it is there."""
        if self._client.has_collection(name):
            self._client.drop_collection(name)

    # rows

    def versions(self, name: str) -> dict[int, int]:
        """The version of every row, by id."""
        return {row["id"]: row["version"] for row in self.rows(name, ["id", "version"])}

    def rows(self, name: str, fields: list[str], batch_size: int = 1000) -> Iterator[dict]:
        """Every row's fields, in no fixed order."""
        self._client.load_collection(name)
        iterator = self._client.query_iterator(name, batch_size=batch_size, output_fields=fields)
        try:
            while batch := iterator.next():
                yield from batch
        finally:
            iterator.close()

    def upsert(self, name: str, rows: list[dict]) -> None:
        """Put rows in, in the place of those with the same id; their `embedding` is a float32 array."""
        size = max(1, _BATCH_BYTES // (4 * len(rows[0][FIELD]))) if rows else 1
        for start in range(0, len(rows), size):
            batch = [{k: _fitting(k, v) for k, v in row.items()} for row in rows[start : start + size]]
            self._tell(partial(self._client.upsert, name, batch))

    def delete(self, name: str, ids: Iterable[int]) -> None:
        """Take rows out."""
        ids = list(ids)
        for start in range(0, len(ids), 1000):
            self._tell(partial(self._client.delete, name, ids=ids[start : start + 1000]))

    def get(self, name: str, ids: list[int], fields: list[str]) -> dict[int, dict]:
        """Rows by id, of those ids that are there."""
        found: dict[int, dict] = {}
        for start in range(0, len(ids), 1000):
            rows = self._client.get(name, ids=ids[start : start + 1000], output_fields=["id", *fields])
            found |= {row["id"]: row for row in rows}
        return found

    def count(self, name: str) -> int:
        """Rows in a collection."""
        return self._client.query(name, filter="", output_fields=["count(*)"])[0]["count(*)"]

    def _tell(self, call: Callable[[], object]) -> None:
        try:
            call()
        except MilvusException as error:
            raise UserError(f"{self.uri}: Milvus refused the rows ({_reason(error)})") from error

    # searching

    def build(self, name: str, index: IndexChoice, seconds: float = 3600) -> None:
        """Flush, load, and wait until the whole collection is under an index of this kind, made where there is none.

        Raises `UserError` where Milvus took another kind, or the index is not there after `seconds`. Until then a
        search is exact but slow, so that nothing measured before it tells of the index.
        """
        kind = index.kind
        self._tell(lambda: self._client.flush(name))
        if not self._client.list_indexes(name):  # killed in `create`
            self._create_index(name, index)
        if self._local:  # then loading builds what is missing; a server goes on serving meanwhile
            self._tell(lambda: self._client.release_collection(name))
        self._tell(lambda: self._client.load_collection(name))
        found = self._client.describe_index(name, FIELD)["index_type"]
        if found != kind:
            raise UserError(f"{self.uri}: {name}: asked for a {kind} index, Milvus made {found}")
        if self.count(name) == 0:
            return
        deadline, agreed = time.monotonic() + seconds, 0
        while agreed < 2:  # twice in a row: a compaction may be between two steps
            if time.monotonic() > deadline:
                raise UserError(f"{self.uri}: {name}: no complete {kind} index after {seconds:.0f} s")
            agreed = agreed + 1 if self._is_built(name, kind) else 0
            time.sleep(0.05 if agreed < 2 else 0)

    def _is_built(self, name: str, kind: str) -> bool:
        if not self._local:
            return self._client.describe_index(name, FIELD).get("pending_index_rows", 0) == 0
        # Milvus Lite always answers that an index is finished; each data file's index is a file beside it
        folder = Path(self.uri) / "collections" / name / "partitions"
        data = {path.stem for path in folder.glob("*/data/*.parquet")}
        built = {
            path.name.removesuffix(f".{FIELD}.{kind.lower()}.idx")
            for path in folder.glob(f"*/indexes/*.{FIELD}.{kind.lower()}.idx")
        }
        return bool(data) and data <= built

    def search(
        self, name: str, vectors: np.ndarray, k: int, fields: list[str], params: dict | None = None
    ) -> list[list[Found]]:
        """The k nearest rows for each unit vector of (n, dim), best first, with these fields."""
        if not len(vectors):
            return []
        if len(vectors) > 1 and self._local and self._kind(name) == "FLAT":
            # Lite subtracts all rows from all queries in one array: of 100,000 x 1536, 64 queries would take 39 GB
            return [self.search(name, each[None], k, fields, params)[0] for each in vectors]
        params = dict(params or {})
        if "ef" in params:
            params["ef"] = max(params["ef"], min(k, MAX_RESULTS))  # a server refuses less
        try:
            answer = self._client.search(
                name,
                data=list(np.asarray(vectors, np.float32)),
                anns_field=FIELD,
                limit=min(k, MAX_RESULTS),
                output_fields=fields,
                search_params={"metric_type": "L2", "params": params},
            )
        except MilvusException as error:
            raise UserError(f"{self.uri}: the search failed ({_reason(error)})") from error
        return [[Found(hit["id"], 1 - hit["distance"] / 2, dict(hit["entity"])) for hit in hits] for hits in answer]

    def lists(self, name: str) -> int:
        """How many lists an IVF_FLAT index has."""
        found = self._client.describe_index(name, FIELD)
        found |= found.get("params", {})  # Milvus Lite's
        return int(found.get("nlist", INDEX_TYPES["IVF_FLAT"][0]["nlist"]))

    def _kind(self, name: str) -> str:
        if name not in self._kinds:
            self._kinds[name] = self._client.describe_index(name, FIELD)["index_type"]
        return self._kinds[name]

    def load(self, name: str) -> None:
        """Make a collection ready for searches."""
        self._client.load_collection(name)


def _fitting(field: str, value: object) -> object:
    return cut(value, _TRACK_FIELDS[field]) if field in _TRACK_FIELDS and isinstance(value, str) else value


def _reason(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:300]
