"""The web page's API: answers, bounds, hostile input, loading, batching, files by range, and what the page may load."""

import base64
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import numpy as np
import pytest
import soundfile
from mutagen.flac import FLAC, Picture

from common.errors import UserError
from helpers.searcher_double import HOSTILE, DoubleSearcher, running_server
from music_library import query_worker
from music_library.api_listing import api_listing
from music_library.query_worker import NotReady, QueryWorker, TextQuery, VectorCache
from music_library.searching import without
from music_library.serving import MAX_K, MAX_QUERY, allowed_hosts, listen, serve


def search(client, **query):
    return client.json(f"/api/search?{urlencode(query)}")


def test_search_answers_with_the_searchers_hits(client, double):
    status, answer = search(client, q="  calm piano ", k=3)
    assert status == 200
    expected = double._hits(double.embed(["calm piano"])[0], 3)
    assert [(hit["rank"], hit["track"]) for hit in answer["results"]] == [(hit.rank, hit.track) for hit in expected]
    assert [hit["score"] for hit in answer["results"]] == pytest.approx([hit.score for hit in expected])
    assert all(hit["moment"] is None for hit in answer["results"])
    assert search(client, q="calm piano", k=3, moments="true")[1]["results"][0]["moment"] == 8.0


def test_tags_come_as_they_are_and_undecodable_text_is_replaced(client):
    results = search(client, q="anything", k=6)[1]["results"]
    by_id = {hit["track"]: hit for hit in results}
    assert by_id["id0"]["title"] == HOSTILE
    assert by_id["id1"]["artist"] == "Artist 1�"


def test_not_takes_away_what_it_names(client, double):
    status, answer = search(client, q="piano", **{"not": "vocals"}, not_weight=0.7, k=6)
    vectors = double.embed(["piano", "vocals"])
    scores = {hit.track: hit.score for hit in double._hits(without(vectors[:1], vectors[1], 0.7)[0], 6)}
    assert status == 200
    assert {hit["track"]: hit["score"] for hit in answer["results"]} == pytest.approx(scores)


def test_a_query_of_which_nothing_is_left_is_refused_and_the_others_are_answered(client):
    assert search(client, q="piano", **{"not": "piano"}, not_weight=1)[0] == 400
    with ThreadPoolExecutor(8) as pool:
        asked = [{"q": "piano", "not": "piano" if number % 2 else "vocals", "not_weight": 1} for number in range(8)]
        statuses = [status for status, _ in pool.map(lambda query: search(client, **query), asked)]
    assert statuses == [200, 400] * 4


def test_moments_where_the_index_has_none(tmp_path):
    with running_server(lambda: DoubleSearcher(tmp_path, has_moments=False)) as client:
        client.wait_until_ready()
        status, answer = search(client, q="a", moments="true")
        assert status == 400
        assert "index_library.py --moments" in answer["error"]
        status, answer = search(client, q="a", moments="auto")
        assert (status, answer["results"][0]["moment"]) == (200, None)


def test_post_asks_the_same_in_json(client):
    body = json.dumps({"q": "calm piano", "k": 2, "not": "vocals", "moments": True})
    status, answer = client.json("/api/search", method="POST", body=body, headers={"Content-Type": "application/json"})
    assert (status, answer) == search(client, q="calm piano", k=2, **{"not": "vocals"}, moments=True)


def test_like_answers_with_neighbours_of_a_track(client):
    status, answer = client.json("/api/like/id2?k=2")
    assert status == 200
    assert "id2" not in [hit["track"] for hit in answer["results"]]
    assert len(answer["results"]) == 2


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ("/api/search", {}, 400),
        ("/api/search?q=", {}, 400),
        ("/api/search?q=%20%20", {}, 400),
        (f"/api/search?q={'a' * (MAX_QUERY + 1)}", {}, 400),
        (f"/api/search?q={'a' * 2**20}", {}, 400),
        (f"/api/search?q=a&not={'a' * (MAX_QUERY + 1)}", {}, 400),
        ("/api/search?q=a&k=1000000000", {}, 400),
        (f"/api/search?q=a&k={'9' * 5000}", {}, 400),
        ("/api/search?q=a&k=0", {}, 400),
        ("/api/search?q=a&k=ten", {}, 400),
        ("/api/search?q=a&moments=perhaps", {}, 400),
        ("/api/search?q=a&colour=red", {}, 400),
        ("/api/search", {"method": "POST", "body": "{bad", "headers": JSON}, 400),
        ("/api/search", {"method": "POST", "body": "[]", "headers": JSON}, 400),
        ("/api/search", {"method": "POST", "body": '{"q": ["a"]}', "headers": JSON}, 400),
        ("/api/search", {"method": "POST", "body": b'{"q": "\xff"}', "headers": JSON}, 400),
        ("/api/search", {"method": "POST", "body": '{"q": "a", "k": 1e9}', "headers": JSON}, 400),
        ("/api/search", {"method": "DELETE"}, 405),
        ("/api/like/unknown", {}, 404),
        ("/api/like/id1?k=1000000000", {}, 400),
        ("/api/like/../../etc/passwd", {}, 404),
        ("/audio/unknown", {}, 404),
        ("/audio/../../etc/passwd", {}, 404),
        ("/audio/..%2F..%2Fetc%2Fpasswd", {}, 404),
        ("/audio/%2Fetc%2Fpasswd", {}, 404),
        ("/cover/..%2F..%2Fetc%2Fpasswd", {}, 404),
        ("/audio/id%00", {}, 404),
        ("/../music_library/serving.py", {}, 404),
        ("/nothing", {}, 404),
    ],
)
def test_hostile_input_is_refused_with_one_line(client, target, options, expected):
    status, headers, body = client.request(target, **options)
    assert status == expected, body
    assert headers["Content-Type"] == "application/json"
    message = json.loads(body)
    assert list(message) == ["error"]
    assert "\n" not in message["error"]
    assert 0 < len(message["error"]) < 200
    assert "aaaaaaaa" not in message["error"]  # what was sent is not sent back
    assert "Traceback" not in message["error"]


def test_a_body_of_a_megabyte_is_refused_with_one_line(client):
    status, _, body = client.request("/api/search", "POST", json.dumps({"q": "a" * 2**20}), JSON)
    assert (status, body) == (413, b"Content Too Large")  # in plain text, before any of it is read


def test_bounds_themselves_are_allowed(client):
    assert search(client, q="b" * MAX_QUERY, k=MAX_K)[0] == 200
    assert search(client, q="\0 ' \" ; DROP 😀 \u202e", k=1)[0] == 200


def test_a_request_head_without_end_is_cut_off(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        answer = b""
        try:
            connection.sendall(b"GET /api/search?q=" + b"a" * (8 * 2**20))
            answer = connection.recv(100)
        except OSError:
            pass
    assert not answer or answer.startswith(b"HTTP/1.1 400")
    assert search(client, q="still there")[0] == 200


def test_another_sites_name_for_this_machine_is_refused(client):
    assert client.request("/api/search?q=a", headers={"Host": "evil.example"})[0] == 400
    assert client.request("/api/search?q=a", headers={"Host": f"localhost:{client.port}"})[0] == 200
    assert allowed_hosts("0.0.0.0") is None


def test_a_defect_is_one_line_and_the_next_query_is_answered(client):
    status, answer = search(client, q="crash")
    assert (status, list(answer)) == (500, ["error"])
    assert search(client, q="calm")[0] == 200


@pytest.mark.parametrize(
    ("target", "options", "parameter"),
    [
        ("/api/search?q=piano&not=piano&not_weight=1", {}, "not"),
        ("/api/search?q=a&not_weight=-1", {}, "not_weight"),
        ("/api/search?q=a&k=0", {}, "k"),
        ("/api/search?k=3", {}, "q"),
        ("/api/search?q=a&moments=perhaps", {}, "moments"),
        ("/api/like/id1?k=0", {}, "k"),
        ("/api/search", {"method": "POST", "body": "{bad", "headers": JSON}, "body"),
        ("/api/search", {"method": "POST", "body": '{"q": "a", "not": 3}', "headers": JSON}, "not"),
    ],
)
def test_a_fault_names_the_parameter_of_the_api(client, target, options, parameter):
    status, answer = client.json(target, **options)
    assert status == 400
    assert answer["error"].startswith(f"{parameter}: ")
    assert "--" not in answer["error"]


PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.mark.parametrize(
    ("data", "expected"), [(PNG, 200), (b"<svg onload='alert(1)'/>", 404)], ids=["png", "svg with a script"]
)
def test_a_cover_from_the_tags_and_only_a_raster_picture(client, double, tmp_path, monkeypatch, data, expected):
    path = tmp_path / "covered.flac"
    soundfile.write(path, np.zeros(8000), 8000)
    file, picture = FLAC(path), Picture()
    picture.data, picture.mime, picture.type = data, "image/png", 3
    file.add_picture(picture)
    file.save()
    monkeypatch.setitem(double.paths, "id4", path)
    status, headers, body = client.request("/cover/id4")
    assert status == expected
    if expected == 200:
        assert (headers["Content-Type"], body) == ("image/png", PNG)


def test_no_cover_is_404_and_so_is_a_file_that_is_no_audio(client, double, tmp_path, monkeypatch):
    assert client.json("/cover/id1")[0] == 404
    (tmp_path / "text.mp3").write_text("not audio")
    monkeypatch.setitem(double.paths, "id5", tmp_path / "text.mp3")
    assert client.json("/cover/id5")[0] == 404


def test_pages_load_nothing_from_elsewhere(client):
    for target in ("/", "/docs"):
        status, headers, body = client.request(target)
        page = body.decode()
        assert status == 200
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", page)
    assert "innerHTML" not in client.request("/")[2].decode()


def test_the_api_is_described_for_people_and_for_programs(client):
    status, description = client.json("/openapi.json")
    assert status == 200
    assert {"/api/search", "/api/like/{track}", "/api/status", "/audio/{track}", "/cover/{track}"} == set(
        description["paths"]
    )
    page = client.request("/docs")[2].decode()
    for path in description["paths"]:
        assert path in page
    assert "moments" in page


def test_the_api_s_list_shows_markup_as_text():
    schema = {"properties": {"x": {"type": "string", "description": "<i>'&"}}}
    operation = {"summary": "<script>alert(1)</script>", "parameters": [{"name": "<b>", "schema": {"type": "string"}}]}
    page = api_listing(
        {
            "info": {"title": "<u>"}, "openapi": "3", "paths": {"/<a>": {"get": operation}},
            "components": {"schemas": {"Answer": schema}},
        }
    )  # fmt: skip
    body = page.split("<body>")[1]
    assert not re.findall(r"<(?:script|u|i|a)>", body)
    assert "<code>&lt;b&gt;</code>" in body
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
    assert "&lt;i&gt;&#39;&amp;" in body


def test_while_loading_searches_are_503_and_the_page_is_there(tmp_path):
    may_load = threading.Event()
    double = DoubleSearcher(tmp_path)

    def open_searcher():
        may_load.wait(30)
        return double

    with running_server(open_searcher) as client:
        status, headers, body = client.request("/api/search?q=a")
        assert (status, headers["Retry-After"]) == (503, "2")
        assert "being loaded" in json.loads(body)["error"]
        assert client.json("/api/status") == (200, {"state": "loading", "count": None})
        assert client.request("/audio/id1")[0] == 503
        assert client.request("/")[0] == 200
        may_load.set()
        client.wait_until_ready()
        assert client.json("/api/status") == (200, {"state": "ready", "count": 6})
        assert search(client, q="a")[0] == 200
    assert double.closed


def test_parallel_queries_are_answered_in_batches_by_one_thread(tmp_path):
    double = DoubleSearcher(tmp_path, delay=0.2)
    with running_server(lambda: double) as client:
        client.wait_until_ready()
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda number: search(client, q=f"query {number}", k=3), range(32)))
        assert len(double.embedded) <= 4  # the first alone or with few, the rest together
        assert len(double.found) == len(double.embedded)
        assert double.threads == {client.worker._thread.ident}
        double.delay = 0
        for number, (status, answer) in enumerate(answers):
            expected = double._hits(double.embed([f"query {number}"])[0], 3)
            assert status == 200
            assert [hit["track"] for hit in answer["results"]] == [hit.track for hit in expected]


def test_a_text_asked_again_is_not_embedded_again_and_the_cache_is_bounded(monkeypatch):
    calls = []

    def embed(texts):
        calls.append(texts)
        return np.ones((len(texts), 8), np.float32)

    cache = VectorCache()
    cache.vectors(["a", "b", "a"], embed)
    cache.vectors(["b", "c"], embed)
    assert calls == [["a", "b"], ["c"]]
    monkeypatch.setattr(query_worker, "CACHE_BYTES", 32 * 10)
    for number in range(100):
        cache.vectors([f"text {number}", f"other {number}"], embed)
    assert len(cache) == 10
    monkeypatch.setattr(query_worker, "CACHE_BYTES", 3)  # a vector larger than the whole cache is still answered
    assert set(cache.vectors(["x", "y"], embed)) == {"x", "y"}
    assert len(cache) == 0


def test_beyond_the_longest_queue_requests_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(query_worker, "MAX_WAITING", 4)
    may_go, busy, double = threading.Event(), threading.Event(), DoubleSearcher(tmp_path)
    worker = QueryWorker(lambda: double)
    worker.start()
    while worker.state == "loading":
        pass
    blocked = worker.call(lambda _: (busy.set(), may_go.wait(30)))
    assert busy.wait(30)
    waiting = [worker.text_query(TextQuery(f"{number}", None, 0, 1, False)) for number in range(4)]
    with pytest.raises(NotReady, match="4 requests are waiting"):
        worker.text_query(TextQuery("one more", None, 0, 1, False))
    may_go.set()
    blocked.result(30)
    assert all(len(future.result(30)) == 1 for future in waiting)
    worker.stop()
    assert double.closed
    with pytest.raises(NotReady):
        worker.call(lambda searcher: searcher.count())


def test_a_search_that_cannot_be_opened_ends_the_server_with_its_line(capsys):
    def open_searcher():
        raise UserError("data/library.db: expected an index, found no such folder")

    with pytest.raises(UserError, match="expected an index"):
        serve(open_searcher, port=0)
    assert re.match(r"http://127\.0\.0\.1:\d+/", capsys.readouterr().out)


def test_a_port_in_use_is_one_line():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="expected an address that is free"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="expected an address of this machine"):
        listen("no.such.host.invalid", 0)
