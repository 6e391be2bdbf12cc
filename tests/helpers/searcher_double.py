"""A searcher that needs no model and no database, and a server on a free port, for the tests of the web page."""

import contextlib
import http.client
import json
import threading
import time

import numpy as np
import soundfile

from music_library.searching import Hit
from music_library.serving import create_app, listen, make_server

HOSTILE = '<img src=x onerror="document.title=1"><b>"\'&'


class DoubleSearcher:
    """Tracks in a folder; a text's vector comes from its letters. It notes how and in which threads it was called."""

    def __init__(self, folder, tracks=6, delay=0.0, has_moments=True):
        self.has_moments = has_moments
        self.folder, self.delay = folder, delay
        self.embedded, self.found, self.threads, self.closed = [], [], set(), False
        self.paths = {f"id{number}": folder / f"track {number} é'\".wav" for number in range(tracks)}
        self.vectors = self._normalised(np.random.default_rng(0).normal(size=(tracks, 16)))
        for number, path in enumerate(self.paths.values()):
            tone = 0.1 * np.sin(2 * np.pi * 220 * (number + 1) * np.arange(8000 * 20) / 8000)
            soundfile.write(path, tone, 8000)

    @staticmethod
    def _normalised(vectors):
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def embed(self, texts):
        self.threads.add(threading.get_ident())
        self.embedded.append(list(texts))
        time.sleep(self.delay)
        if "crash" in texts:
            raise RuntimeError("a defect")
        seeds = [sum(map(ord, text)) for text in texts]
        return self._normalised(np.stack([np.random.default_rng(seed).normal(size=16) for seed in seeds]))

    def find(self, vectors, k, moments=False):
        self.threads.add(threading.get_ident())
        self.found.append((len(vectors), k, moments))
        return [self._hits(vector, k, moments) for vector in vectors]

    def _hits(self, vector, k, moments=False):
        scores = self.vectors @ vector
        titles = [HOSTILE, *(f"Song {row}" for row in range(1, len(scores)))]
        return [
            Hit(
                rank, float(scores[row]), f"id{row}", str(self.paths[f"id{row}"]), titles[row],
                f"Artist {row}\udcff", "", 20.0, 8.0 if moments else None,
            )
            for rank, row in enumerate(np.argsort(-scores)[:k], 1)
        ]  # fmt: skip

    def like(self, track, k):
        self.threads.add(threading.get_ident())
        return self._hits(self.vectors[list(self.paths).index(track)], k + 1)[1:]

    def path_of(self, track):
        self.threads.add(threading.get_ident())
        return self.paths.get(track)

    def count(self):
        return len(self.paths)

    def close(self):
        self.closed = True


class Client:
    """Requests to a server on this machine, each on a connection of its own."""

    def __init__(self, port, worker):
        self.port, self.worker = port, worker

    def request(self, target, method="GET", body=None, headers=None):
        """Status, headers and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, target, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def json(self, target, **more):
        """Status and the body read as JSON."""
        status, _, body = self.request(target, **more)
        return status, json.loads(body)

    def wait_until_ready(self):
        deadline = time.monotonic() + 30
        while self.json("/api/status")[1]["state"] == "loading":
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextlib.contextmanager
def running_server(open_searcher, hosts=None):
    """A `Client` of the page's server, which runs in a thread."""
    app = create_app(open_searcher, hosts)
    server, listening = make_server(app), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    client = Client(listening.getsockname()[1], app.state.worker)
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield client
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
