"""The one thread that owns the search: opens it, answers waiting text queries in batches, and never queues too much."""

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import UserError
from music_library.searching import without

if TYPE_CHECKING:
    from music_library.searching import Hit, Searcher

MAX_BATCH = 64
"""Text queries answered by one pass of the text model and one search."""
MAX_WAITING = 256
"""Requests that may wait; one more is refused."""
CACHE_BYTES, CACHE_TEXTS = 16 * 2**20, 1024
"""Text vectors that are kept: at most so many bytes, and so many texts."""

log = logging.getLogger(__name__)


class NotReady(Exception):
    """The request cannot be answered now: one line to say why, and after how many seconds to ask again."""

    def __init__(self, text: str, retry_after: int):
        super().__init__(text)
        self.retry_after = retry_after


class Refused(Exception):
    """The request asks for what this search cannot give; one line to say why."""


@dataclass
class TextQuery:
    """A text, what to take away from it and how strongly, and how many hits are wanted.

    moments: whether they come with their best window; None for where the index has windows.
    """

    text: str
    unwanted: str | None
    weight: float
    k: int
    moments: bool | None
    future: Future = field(default_factory=Future)


@dataclass
class Call:
    """Anything else that is asked of the searcher."""

    function: Callable[["Searcher"], Any]
    future: Future = field(default_factory=Future)


class VectorCache:
    """The most recently used text vectors, at most `CACHE_BYTES` and `CACHE_TEXTS` of them."""

    def __init__(self) -> None:
        self._vectors: OrderedDict[str, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._vectors)

    def vectors(self, texts: list[str], embed: Callable[[list[str]], np.ndarray]) -> dict[str, np.ndarray]:
        """A unit vector (audio_dim,) for each text; those not kept are embedded together."""
        known = {text: self._vectors[text] for text in texts if text in self._vectors}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            # Copies: a row that is kept must not keep its whole batch alive.
            known |= {text: row.copy() for text, row in zip(missing, embed(missing), strict=True)}
        for text, vector in known.items():
            self._vectors[text] = vector
            self._vectors.move_to_end(text)
            while len(self._vectors) > min(CACHE_TEXTS, CACHE_BYTES // vector.nbytes):
                self._vectors.popitem(last=False)
        return known


class QueryWorker:
    """Opens a searcher in a thread of its own and answers requests there, so that its calls never overlap."""

    def __init__(self, open_searcher: Callable[[], "Searcher"]):
        self._open = open_searcher
        self._waiting: queue.Queue[TextQuery | Call] = queue.Queue(MAX_WAITING)
        self._cache = VectorCache()
        self._stopping = threading.Event()
        # A daemon, since nothing can interrupt a model that is being loaded.
        self._thread = threading.Thread(target=self._run, name="search", daemon=True)
        self.state = "loading"
        """`loading`, `ready` or `failed`."""
        self.failure: BaseException | None = None
        """Why the searcher could not be opened."""
        self.on_failure: Callable[[], None] | None = None
        """Called in the thread when the searcher could not be opened."""

    def start(self) -> None:
        """Begin to open the searcher; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Refuse what waits, finish the batch in hand and close the searcher."""
        ready = self.state == "ready"
        self._stopping.set()
        if ready:
            self._thread.join()

    def text_query(self, query: TextQuery) -> "Future[list[Hit]]":
        """The hits of a text query, at some time; `NotReady` where it cannot even wait."""
        return self._submit(query)

    def call(self, function: Callable[["Searcher"], Any]) -> Future:
        """What `function` returns for the searcher, at some time; `NotReady` where it cannot even wait."""
        return self._submit(Call(function))

    def _submit(self, request: TextQuery | Call) -> Future:
        if self.state == "loading":
            raise NotReady("the model is being loaded, ask again in a few seconds", 2)
        if self.state == "failed" or self._stopping.is_set():
            raise NotReady("the search is not running; the server's output says why", 60)
        try:
            self._waiting.put_nowait(request)
        except queue.Full:
            raise NotReady(f"{MAX_WAITING} requests are waiting already, ask again in a second", 1) from None
        return request.future

    def _run(self) -> None:
        try:
            searcher = self._open()
        except BaseException as error:
            self.failure, self.state = error, "failed"
            if self.on_failure:
                self.on_failure()
            else:
                log.exception("the search could not be opened")
            return
        self.state = "ready"
        try:
            while not self._stopping.is_set():
                self._answer(searcher, self._take())
        finally:
            self.state = "failed"  # nothing may be put in the queue any more: nobody would take it out
            self._refuse(self._take_waiting(MAX_WAITING))
            searcher.close()

    def _take(self) -> list[TextQuery | Call]:
        """What waits, at most a batch; nothing where nothing came for a while."""
        try:
            first = self._waiting.get(timeout=0.2)
        except queue.Empty:
            return []
        return [first, *self._take_waiting(MAX_BATCH - 1)]

    def _take_waiting(self, at_most: int) -> list[TextQuery | Call]:
        taken: list[TextQuery | Call] = []
        while len(taken) < at_most:
            try:
                taken.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return taken

    @staticmethod
    def _refuse(requests: list[TextQuery | Call]) -> None:
        for request in requests:
            _settle(request.future, error=NotReady("the server is being stopped", 60))

    def _answer(self, searcher: "Searcher", requests: list[TextQuery | Call]) -> None:
        for request in requests:
            if isinstance(request, Call):
                try:
                    result = request.function(searcher)
                except Exception as error:
                    _settle(request.future, error=error)
                else:
                    _settle(request.future, result)
        queries = [request for request in requests if isinstance(request, TextQuery)]
        if queries:
            try:
                self._answer_queries(searcher, queries)
            except Exception as error:
                for query in queries:
                    _settle(query.future, error=error)

    def _answer_queries(self, searcher: "Searcher", queries: list[TextQuery]) -> None:
        texts = [query.text for query in queries] + [query.unwanted for query in queries if query.unwanted]
        vectors = self._cache.vectors(texts, searcher.embed)
        groups: dict[tuple[int, bool], list[tuple[TextQuery, np.ndarray]]] = {}
        for query in queries:  # one search where all want the same k, so that company never changes an answer
            moments = searcher.has_moments if query.moments is None else query.moments
            try:
                vector = _query_vector(query, vectors)
                if moments and not searcher.has_moments:
                    raise Refused("moments: this library was indexed without; `index_library.py --moments` adds them")
            except Refused as refused:
                _settle(query.future, error=refused)
            else:
                groups.setdefault((query.k, moments), []).append((query, vector))
        for (k, moments), group in groups.items():
            answers = searcher.find(np.stack([vector for _, vector in group]), k, moments=moments)
            for (query, _), hits in zip(group, answers, strict=True):
                _settle(query.future, hits)


def _query_vector(query: TextQuery, vectors: dict[str, np.ndarray]) -> np.ndarray:
    """The unit vector (audio_dim,) to search with; `Refused` where nothing is left of it."""
    vector = vectors[query.text]
    if not query.unwanted:
        return vector
    try:
        return without(vector[None], vectors[query.unwanted], query.weight, "not")[0]
    except UserError as error:
        raise Refused(str(error)) from None


def _settle(future: Future, result: Any = None, error: BaseException | None = None) -> None:
    """Give a request its answer, unless whoever asked has gone or it has one."""
    try:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
    except InvalidStateError:
        pass
