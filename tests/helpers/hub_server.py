"""A stand-in for the Hugging Face hub on loopback, with the faults that a real one has."""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_FROM = 10_000  # bytes; larger files are redirected to another address, with a SHA-256 as etag
_PIECE = 1 << 14
_RESOLVE = re.compile(r"/(?:(datasets)/)?(.+?)/resolve/([^/]+)/(.+)")
_INFO = re.compile(r"/api/(models|datasets)/(.+?)(?:/(revision|tree)/([^/]+))?")


def etag(content):
    if len(content) >= LFS_FROM:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    status: int = 0
    sent: int = 0  # bytes of the body


@dataclass
class Hub:
    """`repos` maps ("model" | "dataset", id) to {file name: content}. The other fields are faults to come."""

    repos: dict = field(default_factory=dict)
    drop_after: list = field(default_factory=list)  # close the connection after so many bytes of a large file
    busy: list = field(default_factory=list)  # answer 429 with these headers, one a request
    busy_after_drop: list = field(default_factory=list)  # the same, from the next drop on
    always_busy: bool = False
    gated: set = field(default_factory=set)
    seconds_per_piece: float = 0.0
    damage: bool = False  # send other bytes than the etag says
    ignore_range: bool = False
    requests: list = field(default_factory=list)

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.content_url = f"http://localhost:{self._server.server_port}"  # contents are served by another host
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def downloads(self):
        """The requests for the bodies of large files."""
        return [r for r in self.requests if r.method == "GET" and r.path.startswith("/cdn/") and r.status < 300]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.request_record = Request(self.command, path, self.headers.get("Range"))
        self.hub.requests.append(self.request_record)
        if self.hub.always_busy or self.hub.busy:
            self._reply(429, {} if self.hub.always_busy is True else self.hub.busy.pop(0))
        elif path.startswith("/cdn/"):
            self._content(next(c for files in self.hub.repos.values() for c in files.values() if etag(c) == path[5:]))
        elif match := _INFO.fullmatch(path):
            self._info(*match.groups())
        elif match := _RESOLVE.fullmatch(path):
            self._file(*match.groups())
        else:
            self._reply(404, {})

    def _repo(self, kind, repo_id, revision):
        """The repository's files, or None after answering with the hub's own error."""
        if repo_id in self.hub.gated:
            return self._reply(403, {"X-Error-Code": "GatedRepo"})
        files = self.hub.repos.get(("dataset" if kind == "datasets" else "model", repo_id))
        if files is None:
            return self._reply(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", COMMIT):
            return self._reply(404, {"X-Error-Code": "RevisionNotFound"})
        return files

    def _info(self, kind, repo_id, view, revision):
        files = self._repo(kind, repo_id, revision)
        if files is None:
            return
        if view == "tree":
            answer = [{"type": "file", "path": n, "size": len(c), "oid": etag(c)[:40]} for n, c in files.items()]
        else:
            siblings = [{"rfilename": n, "size": len(c), "blobId": etag(c)[:40]} for n, c in files.items()]
            answer = {"id": repo_id, "sha": COMMIT, "siblings": siblings}
        self._reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _file(self, kind, repo_id, revision, name):
        files = self._repo(kind, repo_id, revision)
        if files is None:
            return
        headers = {"X-Repo-Commit": COMMIT}
        if name not in files:
            self._reply(404, headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = files[name]
        headers["ETag"] = f'"{etag(content)}"'
        if len(content) < LFS_FROM:
            self._content(content, headers)
            return
        linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        self._reply(302, headers | linked | {"Location": f"{self.hub.content_url}/cdn/{etag(content)}"})

    def _content(self, content, headers=None):
        headers, start, status = dict(headers or {}), 0, 200
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match and not self.hub.ignore_range:
            start, status = int(match[1]), 206
            if start >= len(content):
                self._reply(416, {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        self._reply(status, headers, body[::-1] if self.hub.damage else body)

    def _reply(self, status, headers, body=b""):
        """Send the answer, in pieces, and stop short where a drop is due."""
        self.request_record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        large = len(body) >= LFS_FROM
        end = self.hub.drop_after.pop(0) if large and self.hub.drop_after else len(body)
        try:
            for start in range(0, end, _PIECE):
                piece = body[start : min(start + _PIECE, end)]
                self.wfile.write(piece)
                self.request_record.sent += len(piece)
                if large:
                    time.sleep(self.hub.seconds_per_piece)
        except ConnectionError:  # the client was killed
            self.close_connection = True
        if end < len(body):
            self.hub.busy, self.hub.busy_after_drop = self.hub.busy_after_drop, []
            self.close_connection = True
