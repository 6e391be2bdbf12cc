import numpy as np
import pytest
import soundfile

from embedding_models.audio import AudioFormat, track_windows
from embedding_models.lengths import estimate_lengths, evenly, stated_seconds, windows_in


def write(path, seconds, rate=8000):
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)), rate)
    return path, path.stat().st_size


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff", "au", "caf", "w64"])
def test_headers_tell(tmp_path, suffix):
    path, _ = write(tmp_path / f"a.{suffix}", 12.5)
    assert stated_seconds(path) == pytest.approx(12.5, abs=0.15)  # MP3 counts whole frames, with its padding


def test_what_does_not_tell(tmp_path):
    (tmp_path / "broken.mp3").write_bytes(b"no sound" * 100)
    assert stated_seconds(tmp_path / "broken.mp3") == 0
    assert stated_seconds(tmp_path / "none.flac") == 0


@pytest.mark.parametrize("seconds", [0.6, 9.9, 10, 10.1, 20, 35])
def test_windows_are_those_that_are_cut(tmp_path, seconds):
    path, _ = write(tmp_path / "a.wav", seconds)
    assert windows_in(seconds) == len(list(track_windows(path, [AudioFormat(8000, 1)])))


def test_the_rest_goes_with_the_bytes(tmp_path):
    files = [write(tmp_path / f"{number}.wav", 5 + number % 4 * 10) for number in range(60)]
    files.append(write(tmp_path / "one.flac", 31))
    files += [(tmp_path / f"lost{number}.mp3", 1000) for number in range(3)]
    found = estimate_lengths(files, headers=20)
    assert (found.files, found.unknown) == (64, 3)
    assert found.looked_at < 30
    assert found.seconds == pytest.approx(60 * 20 + 31, rel=0.1)
    assert found.windows == pytest.approx(150 + 4, rel=0.1)
    exact = estimate_lengths(files, headers=1000)
    assert (exact.seconds, exact.windows) == (pytest.approx(1231, abs=0.1), 154)
    assert estimate_lengths([]).windows == 0


def test_evenly_takes_from_all_over():
    items = [(number, 1) for number in range(10)]
    assert [number for number, _ in evenly(items, 4)] == [0, 2, 5, 7]
    assert evenly(items, 20) == items
