"""The local web page and its JSON API: search, tracks like a track, audio with ranges, covers. See `create_app`."""

import asyncio
import base64
import dataclasses
import hashlib
import ipaddress
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.telemetry import TelemetryConfig
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import UserError
from music_library.api_listing import api_listing
from music_library.byte_ranges import settle_range
from music_library.cover_art import cover_art
from music_library.query_worker import NotReady, QueryWorker, Refused, TextQuery

if TYPE_CHECKING:
    from music_library.searching import Hit, Searcher

MAX_QUERY, MAX_K = 1000, 100
"""The longest query in characters, and the most tracks of one answer."""
MAX_BODY = 64 * 1024
"""The longest body of a POST, in bytes."""
MAX_HEAD = 2 * 2**20
"""The longest request line with headers that is read before it is refused, in bytes."""
MEDIA_TYPES = {
    ".mp3": "audio/mpeg", ".mp2": "audio/mpeg", ".flac": "audio/flac", ".wav": "audio/wav", ".ogg": "audio/ogg",
    ".oga": "audio/ogg", ".opus": "audio/ogg", ".m4a": "audio/mp4", ".m4b": "audio/mp4", ".mp4": "audio/mp4",
    ".aac": "audio/aac", ".wma": "audio/x-ms-wma", ".aif": "audio/aiff", ".aiff": "audio/aiff", ".aifc": "audio/aiff",
    ".au": "audio/basic", ".snd": "audio/basic", ".mka": "audio/matroska", ".weba": "audio/webm",
    ".wv": "audio/x-wavpack", ".ape": "audio/x-ape", ".w64": "audio/x-w64", ".caf": "audio/x-caf",
    ".wave": "audio/wav", ".rf64": "audio/wav", ".m4r": "audio/mp4", ".webm": "audio/webm", ".spx": "audio/ogg",
    ".ac3": "audio/ac3", ".eac3": "audio/eac3", ".dts": "audio/vnd.dts", ".amr": "audio/amr", ".tta": "audio/x-tta",
    ".tak": "audio/x-tak", ".mpc": "audio/x-musepack", ".dsf": "audio/x-dsf", ".dff": "audio/x-dff",
}  # fmt: skip
PAGE = Path(__file__).with_name("search_page.html")
GONE = "the track's file is no longer where it was indexed"
NO_TELEMETRY: TelemetryConfig = {"auto_configure": False, "tracing": False, "metrics": False, "logs": False}
"""Queries stay on this machine, whatever the environment says."""

log = logging.getLogger(__name__)

Route = TypeVar("Route", bound=Callable[..., Any])
Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_QUERY)]


class SearchQuery(BaseModel):
    """What to search for."""

    model_config = ConfigDict(populate_by_name=True, extra="forbid")

    q: Words = Field(description="the words to search for", examples=["calm piano with soft strings"])
    k: int = Field(10, ge=1, le=MAX_K, description="how many tracks")
    unwanted: Annotated[str, StringConstraints(strip_whitespace=True, max_length=MAX_QUERY)] | None = Field(
        None, alias="not", description="what the tracks should not sound like"
    )
    not_weight: float = Field(0.5, ge=0, le=2, description="how strongly `not` counts")
    moments: bool | Literal["auto"] = Field(
        False, description="rank tracks by their best ten seconds and say where these are; auto: if they are indexed"
    )


class Track(BaseModel):
    """One track of an answer."""

    rank: int = Field(description="from 1")
    score: float = Field(description="cosine similarity, -1 to 1")
    track: str = Field(description="the id to use in /api/like/, /audio/ and /cover/")
    path: str = Field(description="the file, as it was indexed")
    title: str
    artist: str
    album: str
    duration: float = Field(description="seconds")
    moment: float | None = Field(description="where the best window starts, in seconds; null where it is not known")

    @classmethod
    def from_hit(cls, hit: "Hit") -> "Track":
        """The same, as text that UTF-8 can hold: a file name need not be valid UTF-8."""
        values = dataclasses.asdict(hit)
        for name, value in values.items():
            if isinstance(value, str):
                values[name] = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return cls(**values)


class Answer(BaseModel):
    """The tracks found, best first."""

    results: list[Track]


class Status(BaseModel):
    """Whether queries are answered yet."""

    state: str = Field(description="loading, ready or failed")
    count: int | None = Field(description="how many tracks are indexed; null while loading")


class Problem(BaseModel):
    """Why a request was not answered, in one line."""

    error: str


UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}
UNSATISFIABLE: dict[int | str, dict[str, Any]] = {416: {"model": Problem}}


def create_app(
    open_searcher: Callable[[], "Searcher"],
    hosts: list[str] | None = None,
) -> FastAPI:
    """The page at /, the API under /api, audio and covers; `app.state.worker` is the thread that searches.

    `open_searcher` is called in that thread when the app starts; until it returns, searches are answered with 503.
    `hosts`: the Host headers that are answered (any by default), so that no web page elsewhere can point its own name
    at this server.
    """
    worker = QueryWorker(open_searcher)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(
        title="Search music by text", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        max_body_size=MAX_BODY, telemetry=NO_TELEMETRY,
        responses={400: {"model": Problem}, 500: {"model": Problem}, 503: {"model": Problem}},
    )  # fmt: skip
    app.state.worker = worker
    app.add_middleware(FixedHeaders)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    _add_errors(app)
    _add_pages(app)
    _add_search(app, worker)
    _add_files(app, worker)
    return app


def _get(app: FastAPI, path: str, **options: Any) -> Callable[[Route], Route]:
    """`app.get`, with HEAD answered as well: the same without the body, and not listed a second time."""

    def add(function: Route) -> Route:
        app.head(path, include_in_schema=False)(function)
        return app.get(path, **options)(function)

    return add


def _add_search(app: FastAPI, worker: QueryWorker) -> None:
    """The JSON API."""

    async def search(query: SearchQuery) -> Answer:
        moments = None if query.moments == "auto" else query.moments
        asked = TextQuery(query.q, query.unwanted or None, query.not_weight, query.k, moments)
        hits = await asyncio.wrap_future(worker.text_query(asked))
        return Answer(results=[Track.from_hit(hit) for hit in hits])

    @_get(app, "/api/search", summary="Tracks that sound like a text")
    async def search_get(query: Annotated[SearchQuery, Query()]) -> Answer:
        return await search(query)

    @app.post("/api/search", summary="The same, asked in JSON")
    async def search_post(query: SearchQuery) -> Answer:
        return await search(query)

    @_get(app, "/api/like/{track}", summary="Tracks that sound like an indexed track", responses=UNKNOWN)
    async def like(track: str, k: Annotated[int, Query(ge=1, le=MAX_K)] = 10) -> Answer:
        def ask(searcher: "Searcher") -> list["Hit"] | None:
            return None if searcher.path_of(track) is None else searcher.like(track, k)

        hits = await asyncio.wrap_future(worker.call(ask))
        if hits is None:
            raise HTTPException(404, "no indexed track has this id")
        return Answer(results=[Track.from_hit(hit) for hit in hits])

    @_get(app, "/api/status", summary="Is the model loaded, and how many tracks are there")
    async def status() -> Status:
        count = None
        if worker.state == "ready":
            count = await asyncio.wrap_future(worker.call(lambda searcher: searcher.count()))
        return Status(state=worker.state, count=count)


def _add_files(app: FastAPI, worker: QueryWorker) -> None:
    """Audio and covers of indexed tracks. A track is named by its id, so that no path is ever taken from a request."""

    async def indexed_file(track: str) -> Path:
        path = await asyncio.wrap_future(worker.call(lambda searcher: searcher.path_of(track)))
        if path is None:
            raise HTTPException(404, "no indexed track has this id")
        if not await asyncio.to_thread(path.is_file):
            raise HTTPException(404, GONE)
        return path

    IndexedFile = Annotated[Path, Depends(indexed_file)]

    @_get(app, "/audio/{track}", summary="The track's file; takes a Range header", response_class=FileResponse,
          responses=UNKNOWN | UNSATISFIABLE)  # fmt: skip
    async def audio(path: IndexedFile, request: Request) -> FileResponse:
        media_type = MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
        try:
            response = FileResponse(path, media_type=media_type, stat_result=await asyncio.to_thread(path.stat))
        except OSError:
            raise HTTPException(404, GONE) from None
        settle_range(request, response)
        return response

    @_get(app, "/cover/{track}", summary="The cover in the file's tags", response_class=Response, responses=UNKNOWN)
    def cover(path: IndexedFile) -> Response:
        found = cover_art(path)
        if found is None:
            raise HTTPException(404, "the file's tags hold no picture", {"Cache-Control": "private, max-age=600"})
        return Response(found[0], media_type=found[1], headers={"Cache-Control": "private, max-age=3600"})


def _add_pages(app: FastAPI) -> None:
    """The search page and a plain list of the API; neither loads anything from elsewhere."""
    page = PAGE.read_text(encoding="utf-8")
    policy = content_policy(page)

    @_get(app, "/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    @_get(app, "/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        listing = api_listing(app.openapi())
        return HTMLResponse(listing, headers={"Content-Security-Policy": content_policy(listing)})


def content_policy(page: str) -> str:
    """A Content-Security-Policy under which the page's own inline script and style run, and nothing else."""

    def sources(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    return (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src 'self' data:; media-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _problem(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": " ".join(text.split())}, status, headers)


def _parameter(fault: dict[str, Any]) -> str:
    """The parameter that pydantic finds fault with; "body" for a body that is no JSON.

    A place is ("query" | "body" | "path", the parameter, the type of a union that was tried...).
    """
    if fault["type"] == "json_invalid" or len(fault["loc"]) == 1:
        return str(fault["loc"][0])
    return str(fault["loc"][1])[:80]


def _add_errors(app: FastAPI) -> None:
    """Every failure is one line of JSON. What was sent is never repeated in it."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        parameter = _parameter(faults[0])
        reasons = " or ".join(dict.fromkeys(fault["msg"] for fault in faults if _parameter(fault) == parameter))
        return _problem(400, f"{parameter}: {reasons}" if parameter else reasons)

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> JSONResponse:
        return _problem(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(NotReady)
    async def not_ready(_: Request, error: NotReady) -> JSONResponse:
        return _problem(503, str(error), {"Retry-After": str(error.retry_after)})

    @app.exception_handler(Refused)
    async def cannot(_: Request, error: Refused) -> JSONResponse:
        return _problem(400, str(error))

    @app.exception_handler(UserError)
    async def failed(_: Request, error: UserError) -> JSONResponse:
        log.error("%s", error)
        return _problem(500, str(error))

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:
        return _problem(500, "the search failed; the server's output says why")


class FixedHeaders:
    """ASGI middleware: browsers neither guess another type for a file nor tell other sites of this page."""

    HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self.HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. `UserError` where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host}: expected an address of this machine ({error.strerror})") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(128)  # before the address is printed: who connects at once waits, and is not refused
    except OSError as error:
        listening.close()
        raise UserError(f"{host}:{port}: expected an address that is free ({error.strerror})") from None
    return listening


def allowed_hosts(host: str) -> list[str] | None:
    """The Host headers to answer: this machine's own names where only it can connect, else any (None)."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    return ["localhost", "127.0.0.1", "[::1]", "::1", host] if loopback else None


def make_server(app: FastAPI) -> uvicorn.Server:
    """uvicorn with the limits of this page."""
    return uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, http="h11", h11_max_incomplete_event_size=MAX_HEAD,
            timeout_graceful_shutdown=3, limit_concurrency=1000,
        )
    )  # fmt: skip


def serve(
    open_searcher: Callable[[], "Searcher"],
    host: str = "127.0.0.1",
    port: int = 8770,
) -> None:
    """Serve until a signal comes. `UserError` where the address is taken; what `open_searcher` raises is raised."""
    listening = listen(host, port)
    app = create_app(open_searcher, allowed_hosts(host))
    server = make_server(app)

    def leave() -> None:
        server.should_exit = True

    app.state.worker.on_failure = leave
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listening.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listening])
    if app.state.worker.failure:
        raise app.state.worker.failure
