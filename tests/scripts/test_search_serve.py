"""`search.py --serve` as a user starts it: a real checkpoint and index on tiny models, in a process of its own."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import index_library
import search
from common.errors import UserError
from helpers.small_library import base_text_model, write_checkpoint, write_music
from helpers.webdriver import browser, why_missing


class Served:
    """The running server and what it was made from."""

    def __init__(self, folder, process, address):
        self.folder, self.process, self.address = folder, process, address

    def get(self, target, headers=None):
        """Status and body."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.address + target, headers=headers or {})) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, target):
        return json.loads(self.get(target)[1])


def arguments(folder):
    checkpoint, index = folder / "muq_best_r1.pt", folder / "library.db"
    return ["--checkpoint", str(checkpoint), "--milvus-uri", str(index), "--device", "cpu"]


@pytest.fixture(scope="module")
def library(tmp_path_factory, tiny_models):
    folder = tmp_path_factory.mktemp("library")
    write_checkpoint(folder / "muq_best_r1.pt", tiny_models, base_text_model(folder / "bert"))
    write_music(folder / "music", count=5, seconds=14.0)
    models = ["--muq-model", str(tiny_models / "muq_mulan"), "--muq-backbone", str(tiny_models / "muq_large")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the log goes there
        index_library.main([str(folder / "music"), *arguments(folder), "--moments", *models])
    return folder


@pytest.fixture(scope="module")
def served(library):
    command = [sys.executable, search.__file__, "--serve", "--port", "0", *arguments(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=library) as process:
        try:
            address = re.match(r"(http://127\.0\.0\.1:\d+)/", process.stdout.readline())[1]
            served, deadline = Served(library, process, address), time.monotonic() + 120
            while served.json("/api/status")["state"] == "loading" and time.monotonic() < deadline:
                time.sleep(0.1)
            yield served
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["calm piano"], "expected no QUERY; what to search for"),
        (["--json", "--not", "vocals"], "expected no --not and no --json"),
        (["--port", "70000"], "--port: expected 0 to 65,535, found 70000"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: expected an address of this machine"),
        (["--port", "0", "--milvus-uri", "missing.db"], "missing.db: no such library"),
        (["--port", "0", "--checkpoint", "missing.pt"], "missing.pt: no such file"),
    ],
)
def test_a_mistake_is_one_line(library, words, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        search.main(["--serve", *arguments(library), *words])


def test_only_indexed_files_are_handed_out(served):
    (served.folder / "music" / "secret.txt").write_text("secret")
    track = served.json("/api/search?q=calm&k=1")["results"][0]
    assert served.get(f"/audio/{track['track']}") == (200, Path(track["path"]).read_bytes())
    status, body = served.get(f"/audio/{track['track']}", {"Range": "bytes=4-7"})
    assert (status, body) == (206, Path(track["path"]).read_bytes()[4:8])
    for target in ("secret.txt", "..%2Fmusic%2Fsecret.txt", "0" * 16, "f" * 16, "0" * 5000):
        status, body = served.get(f"/audio/{target}")
        assert (status, list(json.loads(body))) == (404, ["error"])


@pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
def test_the_page_plays_a_real_track_from_its_best_moment(served):
    expected = served.json("/api/search?q=happy+guitar&k=20&moments=auto")["results"]
    with browser() as window:
        window.open(served.address + "/")
        window.type("#query", "happy guitar")
        window.wait("return document.querySelectorAll('#results li').length === 5")
        titles = window.run("return [...document.querySelectorAll('#results .title')].map(title => title.textContent)")
        assert titles == [hit["title"] for hit in expected]
        window.click("#results li .play")
        audio = "const a = document.getElementById('audio'); return "
        window.wait(audio + f"!a.paused && a.currentTime > {expected[0]['moment']} + 0.3")


# The last test, since it ends the server.
def test_it_answers_as_the_command_line_does_and_lets_go_of_the_database(served, capsys):
    assert served.json("/api/status") == {"state": "ready", "count": 5}
    found = served.json("/api/search?q=calm+piano&k=5")["results"]
    with_moments = served.json("/api/search?q=calm+piano&k=5&moments=auto")["results"]
    less = served.json("/api/search?q=calm+piano&k=5&not=drum")["results"]
    like = served.json(f"/api/like/{found[0]['track']}?k=2")["results"]
    with pytest.raises(UserError, match=f"library.db: held by .*{served.process.pid}"):
        search.main(["calm piano", *arguments(served.folder)])

    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(30) in (143, -signal.SIGTERM)
    capsys.readouterr()

    def command_line(*words):
        (hits,) = search.main([*words, "--k", "5", *arguments(served.folder)])
        return [(hit.track, hit.title, hit.path, hit.moment) for hit in hits]

    def web(results):
        return [(hit["track"], hit["title"], hit["path"], hit["moment"]) for hit in results]

    assert web(found) == command_line("calm piano")
    assert web(with_moments) == command_line("calm piano", "--moments")
    assert all(hit["moment"] is not None for hit in with_moments)
    assert web(less) == command_line("calm piano", "--not", "drum")
    assert web(like) == command_line("--like", found[0]["track"])[:2]
