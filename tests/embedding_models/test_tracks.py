"""Whole tracks of any length: what ffmpeg decodes, where windows start, the thread that decodes ahead."""

import shutil
import subprocess
import threading
import time

import numpy as np
import psutil
import pytest
import soundfile

from embedding_models.audio import AudioError, AudioFormat, track_windows
from embedding_models.tracks import _ahead, embed_track, needs_ffmpeg, open_track, window_starts
from helpers.small_library import spec, write_track

FORMATS = [AudioFormat(24_000, 1), AudioFormat(44_100, 2)]
with_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")


def convert(source, target, *words):
    command = ["ffmpeg", "-v", "error", "-y", "-i", str(source), *words, f"file:{target}"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return target


@with_ffmpeg
@pytest.mark.parametrize(("name", "words"), [("it's: 1.m4a", []), ("x.wma", []), ("x.aac", []), ("-x.mp4", ["-vn"])])
def test_ffmpeg_decodes_what_libsndfile_does_not(tmp_path, name, words):
    wav = write_track(tmp_path / "x.wav", 3, 24.0, rate=44_100)
    path = convert(wav, tmp_path / name, *words, "-b:a", "256k")
    assert needs_ffmpeg(path)
    seconds, windows = open_track(path, FORMATS)
    assert seconds == pytest.approx(24, abs=2)  # a bare AAC stream has no length, ffprobe takes it from the bit rate
    found = list(windows)
    expected = list(track_windows(wav, FORMATS))
    assert len(found) == len(expected) == 3
    for wanted in FORMATS:
        assert found[0][wanted].shape == expected[0][wanted].shape
        # lossy, and an encoder may put some samples in front: compare loudness and spectrum, not samples
        a, b = (np.abs(np.fft.rfft(w[0][wanted][0]))[:40_000].reshape(-1, 100).sum(1) for w in (found, expected))
        assert np.corrcoef(a, b)[0, 1] > 0.98
        assert np.linalg.norm(found[0][wanted]) == pytest.approx(np.linalg.norm(expected[0][wanted]), rel=0.1)


@with_ffmpeg
def test_wavs_through_ffmpeg_are_what_libsndfile_reads(tmp_path):
    wav = write_track(tmp_path / "x.wav", 3, 12.0, rate=44_100)
    lossless = convert(wav, tmp_path / "x.m4a", "-c:a", "alac")
    for found, expected in zip(open_track(lossless, FORMATS)[1], track_windows(wav, FORMATS), strict=True):
        for wanted in FORMATS:
            np.testing.assert_allclose(found[wanted], expected[wanted], atol=1e-4)


@with_ffmpeg
def test_broken_files_that_ffmpeg_reads(tmp_path):
    wav = write_track(tmp_path / "x.wav", 3, 24.0)
    whole = convert(wav, tmp_path / "x.m4a", "-movflags", "faststart").read_bytes()
    for name, content in (("cut.m4a", whole[: len(whole) // 2]), ("text.m4a", b"dear diary"), ("empty.wma", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AudioError, match=name) as error:
            list(open_track(tmp_path / name, FORMATS)[1])
        assert error.value.reason == "unreadable"
    short = convert(write_track(tmp_path / "s.wav", 3, 0.2), tmp_path / "short.m4a")
    with pytest.raises(AudioError, match=r"expected 0\.5 or more"):
        list(open_track(short, FORMATS)[1])


@with_ffmpeg
def test_leaving_early_ends_ffmpeg(tmp_path):
    wav = write_track(tmp_path / "x.wav", 3, 60.0)
    path = convert(wav, tmp_path / "x.m4a")
    _, windows = open_track(path, FORMATS)
    next(windows)
    windows.close()
    children = psutil.Process().children(recursive=True)
    assert not [child for child in children if f"file:{path}" in child.cmdline()]


def test_without_ffmpeg_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AudioError, match="read by ffmpeg, which is not installed"):
        open_track(tmp_path / "x.m4a", FORMATS)


def test_opus_is_read_without_ffmpeg_where_libsndfile_can(tmp_path, monkeypatch):
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        pytest.skip("this libsndfile has no Opus")
    path = tmp_path / "x.opus"
    with soundfile.SoundFile(path, "w", 48_000, 2, format="OGG", subtype="OPUS") as file:
        file.write(soundfile.read(write_track(tmp_path / "x.wav", 3, 12.0, rate=48_000))[0])
    monkeypatch.setenv("PATH", str(tmp_path))
    seconds, windows = open_track(path, FORMATS)
    assert (round(seconds), len(list(windows))) == (12, 2)


def test_where_windows_start():
    assert window_starts(1, 4.0) == [0.0]
    assert window_starts(1, 10.0) == [0.0]
    assert window_starts(3, 25.5) == [0.0, 10.0, 15.5]
    assert window_starts(3, 99.0) == [0.0, 10.0, 20.0]  # a header that promises too much
    assert window_starts(2, 0.0) == [0.0, 0.0]


def test_a_track_is_the_mean_of_what_is_given(tmp_path, tiny_models):
    encoder = spec(tiny_models, "latent").load()
    path = write_track(tmp_path / "x.flac", 3, 37.0)
    seconds, parts = embed_track(encoder, path, 3)
    parts = list(parts)
    assert (round(seconds), [len(part) for part in parts]) == (37, [3, 1])
    np.testing.assert_allclose(np.concatenate(parts).mean(0), encoder.embed_file(path), rtol=1e-4, atol=1e-4)


def test_the_thread_ahead_stops_when_nobody_listens():
    made = []

    def items():
        for number in range(1000):
            made.append(number)
            yield number

    ahead = _ahead(items(), 2)
    assert [next(ahead), next(ahead)] == [0, 1]
    threads = threading.active_count()
    ahead.close()
    time.sleep(0.5)
    assert threading.active_count() < threads
    assert len(made) < 10

    def failing():
        yield 1
        raise AudioError("unreadable", "broken")

    with pytest.raises(AudioError, match="broken"):
        list(_ahead(failing(), 2))
