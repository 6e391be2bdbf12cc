"""Audio files over the web page: whole, by ranges with and without sense, HEAD, types, files that are gone."""

import json

import pytest

from music_library.byte_ranges import byte_ranges
from music_library.music_folder import READABLE_KINDS
from music_library.serving import MEDIA_TYPES


def test_audio_whole_and_by_range(client, double):
    expected = double.paths["id1"].read_bytes()
    status, headers, body = client.request("/audio/id1")
    assert (status, body) == (200, expected)
    assert headers["Content-Type"] == "audio/wav"
    assert headers["Accept-Ranges"] == "bytes"
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, headers, body = client.request("/audio/id1", headers={"Range": "bytes=100-199"})
    assert (status, body) == (206, expected[100:200])
    assert headers["Content-Range"] == f"bytes 100-199/{len(expected)}"
    assert client.request("/audio/id1", headers={"Range": "bytes=-10"})[2] == expected[-10:]
    status, headers, body = client.request("/audio/id1", headers={"Range": "bytes=0-1, 10-19,9999999-"})
    assert status == 206  # what lies beyond the end is left out, the rest is sent
    assert body.count(b"Content-Range: bytes") == 2
    assert expected[10:20] in body


IGNORED = [
    "bytes=x-y", "bytes=20-10", "bytes", "bytes=", "bytes=-", "bytes=5", "seconds=1-2", "bytes=+1-2", "bytes=1_0-20",
    "bytes=1-2,x", "bytes=0-1;2-3", "bytes=٣-٤", "bytes=--5", f"bytes={','.join('1-1' for _ in range(101))}",
]  # fmt: skip


@pytest.mark.parametrize("asked", IGNORED)
def test_a_range_without_meaning_is_ignored(client, double, asked):
    expected = double.paths["id1"].read_bytes()
    headers = {"Range": asked.encode()}
    status, answered, body = client.request("/audio/id1", headers=headers)
    assert (status, body) == (200, expected)
    assert "Content-Range" not in answered


@pytest.mark.parametrize("asked", ["bytes={size}-", "bytes=-0", "bytes={size}-{size}0,-0", f"bytes={'9' * 5000}-"])
def test_a_range_beyond_the_end_is_416_in_one_line(client, double, asked):
    size = double.paths["id1"].stat().st_size
    status, headers, body = client.request("/audio/id1", headers={"Range": asked.format(size=size)})
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
    assert list(json.loads(body)) == ["error"]
    assert "Range" in json.loads(body)["error"]


def test_a_range_is_honoured_only_for_the_file_it_was_meant_for(client):
    _, headers, _ = client.request("/audio/id1")
    for condition, expected in ((headers["ETag"], 206), ('"another"', 200), (f"W/{headers['ETag']}", 200)):
        asked = {"Range": "bytes=0-9", "If-Range": condition}
        assert client.request("/audio/id1", headers=asked)[0] == expected
    beyond = {"Range": "bytes=99999999-", "If-Range": '"another"'}
    assert client.request("/audio/id1", headers=beyond)[0] == 200  # of another file this range may make sense


def naive_ranges(first, last, size):
    """The bytes of `bytes=first-last` by listing them, None where it has to be ignored."""
    if first is None:
        return list(range(size))[-last:] if last else []
    if last is not None and last < first:
        return None
    return [i for i in range(size) if i >= first and (last is None or i <= last)]


def test_ranges_against_listing_the_bytes():
    for size in (0, 1, 5):
        for first in (None, 0, 1, 4, 5, 9):
            for last in (None, 0, 1, 4, 5, 9):
                if first is None and last is None:
                    continue
                expected = naive_ranges(first, last, size)
                header = f"Bytes = {'' if first is None else first}-{'' if last is None else last}"
                found = byte_ranges(header, size)
                if found is not None:
                    found = [i for start, end in found for i in range(start, end + 1)]
                assert found == expected, (header, size)


@pytest.mark.parametrize("target", ["/", "/docs", "/openapi.json", "/api/status", "/api/search?q=a", "/api/like/id1",
                                    "/audio/id1", "/audio/unknown", "/cover/id1", "/api/search?q="])  # fmt: skip
def test_head_is_answered_as_get_without_the_body(client, target):
    status, headers, body = client.request(target)
    answered, others, nothing = client.request(target, method="HEAD", headers={"Range": "bytes=0-1"})
    assert (answered, nothing) == (status, b"")
    assert others["Content-Type"] == headers["Content-Type"]
    assert others["Content-Length"] == str(len(body))


def test_every_kind_of_audio_file_has_its_type(client, double, tmp_path, monkeypatch):
    assert set(MEDIA_TYPES) >= READABLE_KINDS
    assert all(kind.startswith("audio/") for kind in MEDIA_TYPES.values())
    for suffix, kind in {".m4a": "audio/mp4", ".AIFF": "audio/aiff", ".aif": "audio/aiff", ".opus": "audio/ogg",
                         ".mp4": "audio/mp4", ".flac": "audio/flac", ".wma": "audio/x-ms-wma"}.items():  # fmt: skip
        path = tmp_path / f"song{suffix}"
        path.write_bytes(b"any")
        monkeypatch.setitem(double.paths, "id5", path)
        assert client.request("/audio/id5")[1]["Content-Type"] == kind


def test_a_file_that_is_gone_is_404(client, double, monkeypatch):
    monkeypatch.setitem(double.paths, "id3", double.folder / "gone.wav")
    assert client.json("/audio/id3") == (404, {"error": "the track's file is no longer where it was indexed"})
