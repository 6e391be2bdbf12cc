import io
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr

from embedding_models.audio import AudioError, AudioFormat, track_windows

MONO, STEREO = AudioFormat(24_000, 1), AudioFormat(44_100, 2)


def sound(seconds, rate, channels=1, seed=0):
    """Slow noise: nothing above 4 kHz, so that resampling keeps it."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(round(seconds * 8000), channels)).astype(np.float32) * 0.1
    return soxr.resample(coarse, 8000, rate)[: round(seconds * rate)]


def encoded(samples, rate, container="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def windows(data, *formats):
    return list(track_windows(io.BytesIO(data), formats))


@pytest.mark.parametrize(
    ("seconds", "count"), [(0.5, 1), (3, 1), (9.99, 1), (10, 1), (10.01, 2), (20, 2), (25, 3), (30, 3)]
)
def test_windows_are_ten_seconds_and_the_last_is_the_end(seconds, count):
    samples = sound(seconds, 24_000)
    found = [w[MONO] for w in windows(encoded(samples, 24_000, subtype="FLOAT"), MONO)]
    assert all(window.flags.writeable and window.flags.c_contiguous for window in found)
    assert len(found) == count
    assert all(w.dtype == np.float32 and w.shape == (1, min(len(samples), 240_000)) for w in found)
    for number, window in enumerate(found[:-1]):
        np.testing.assert_array_equal(window[0], samples[number * 240_000 :][:240_000, 0])
    np.testing.assert_array_equal(found[-1][0], samples[-240_000:, 0])


@pytest.mark.parametrize("rate", [8000, 11_127, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("extra", [0, 1, 12_345])
def test_formats_have_the_same_windows_at_every_rate(rate, extra):
    frames = 20 * rate + extra
    data = encoded(np.zeros((frames, 2), dtype=np.int16), rate)
    found = windows(data, MONO, STEREO)
    assert len(found) == (2 if extra == 0 else 3)
    for window in found:
        assert window[MONO].shape == (1, 240_000)
        assert window[STEREO].shape == (2, 441_000)


def test_streamed_resampling_equals_resampling_in_one_go():
    samples = sound(27.3, 16_000, 2)
    found = windows(encoded(samples, 16_000, subtype="FLOAT"), MONO, STEREO)
    whole = {MONO: soxr.resample(samples.mean(axis=1), 16_000, 24_000)[None], STEREO: None}
    whole[STEREO] = soxr.resample(samples, 16_000, 44_100).T
    for form, track in whole.items():
        length = 10 * form.sample_rate
        for number in (0, 1):
            np.testing.assert_allclose(found[number][form], track[:, number * length :][:, :length], atol=1e-5)
        np.testing.assert_allclose(found[2][form], track[:, -length:], atol=1e-5)


def test_the_same_sound_at_two_rates_gives_the_same_window():
    samples = sound(4, 16_000)
    other = soxr.resample(samples, 16_000, 48_000)
    a, b = (windows(encoded(s, r, subtype="FLOAT"), MONO)[0][MONO] for s, r in ((samples, 16_000), (other, 48_000)))
    assert a.shape == b.shape
    np.testing.assert_allclose(a[:, 500:-500], b[:, 500:-500], atol=2e-3)


def test_channels():
    samples = sound(2, 44_100, 2)
    found = windows(encoded(samples, 44_100, subtype="FLOAT"), STEREO, AudioFormat(44_100, 1))[0]
    np.testing.assert_array_equal(found[STEREO], samples.T)
    np.testing.assert_allclose(found[AudioFormat(44_100, 1)][0], samples.mean(axis=1), atol=1e-7)
    mono = windows(encoded(samples[:, :1], 44_100, subtype="FLOAT"), STEREO)[0][STEREO]
    np.testing.assert_array_equal(mono, np.stack([samples[:, 0]] * 2))


def test_eight_channels_become_their_mean():
    samples = sound(1, 44_100, 8)
    found = windows(encoded(samples, 44_100, subtype="FLOAT"), STEREO)[0][STEREO]
    np.testing.assert_allclose(found, np.stack([samples.mean(axis=1)] * 2), atol=1e-7)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_containers(container):
    found = windows(encoded(sound(2, 44_100), 44_100, container), MONO)
    assert abs(found[0][MONO].shape[1] - 48_000) < 1200


def test_silence_is_input_like_any_other():
    assert not windows(encoded(np.zeros(44_100), 44_100), MONO)[0][MONO].any()


def test_a_path_reads_like_its_content(tmp_path):
    data = encoded(sound(1, 22_050), 22_050)
    (tmp_path / "a.wav").write_bytes(data)
    by_path = next(track_windows(tmp_path / "a.wav", [MONO]))[MONO]
    np.testing.assert_array_equal(by_path, windows(data, MONO)[0][MONO])


def nan():
    samples = sound(2, 24_000)
    samples[30_000] = np.nan
    return encoded(samples, 24_000, subtype="FLOAT")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable"),
        (b"this is no audio" * 100, "unreadable"),
        (encoded(sound(2, 24_000), 24_000)[:-20_000], "unreadable"),
        (encoded(sound(2, 24_000), 24_000)[:50], "unreadable"),
        (encoded(sound(2, 24_000), 24_000, "AIFF")[:-20_000], "unreadable"),
        (encoded(sound(4, 24_000), 24_000, "FLAC")[:-20_000], "unreadable"),
        (encoded(sound(4, 24_000), 24_000, "MP3")[:-20_000], "unreadable"),
        (encoded(np.zeros(0), 24_000), "unreadable"),
        (encoded(sound(0.05, 24_000), 24_000), "too short"),
        (encoded(sound(0.499, 24_000), 24_000), "too short"),
        (nan(), "not finite"),
    ],
)
def test_what_cannot_be_embedded(data, reason, tmp_path):
    with pytest.raises(AudioError) as caught:
        windows(data, MONO, STEREO)
    assert caught.value.reason == reason
    (tmp_path / "clip.wav").write_bytes(data)
    with pytest.raises(AudioError, match=r"clip\.wav: ") as caught:
        list(track_windows(tmp_path / "clip.wav", [MONO]))
    assert "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, str(again)) == (reason, str(caught.value))


def test_missing_file(tmp_path):
    with pytest.raises(AudioError, match="No such file") as caught:
        list(track_windows(tmp_path / "no.wav", [MONO]))
    assert caught.value.reason == "unreadable"


def test_a_wav_of_unknown_length_is_not_truncated():
    data = bytearray(encoded(sound(2, 24_000), 24_000))
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", 0xFFFFFFFF)  # as a program writes that streams to a pipe
    assert windows(bytes(data), MONO)[0][MONO].shape == (1, 48_000)


def test_memory_does_not_grow_with_length(tmp_path):
    def peak(seconds):
        soundfile.write(tmp_path / "long.wav", np.zeros(seconds * 16_000, dtype=np.int16), 16_000)
        tracemalloc.start()
        count = sum(1 for _ in track_windows(tmp_path / "long.wav", [MONO, STEREO]))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return count, most

    (few, small), (many, large) = peak(40), peak(400)
    assert (few, many) == (4, 40)
    assert large < 1.2 * small


@pytest.mark.parametrize(("lost", "whole"), [(0.2, True), (0.4, False)])
def test_a_header_that_counts_a_little_too_much(monkeypatch, lost, whole):
    """Ogg files do: a few thousand frames more than the decoder gives."""
    counted = soundfile.SoundFile.frames.fget
    more = property(lambda self: counted(self) + round(lost * self.samplerate))
    monkeypatch.setattr(soundfile.SoundFile, "frames", more)
    data = encoded(sound(12, 24_000), 24_000, "OGG")
    if whole:
        assert len(windows(data, MONO)) == 2
    else:
        with pytest.raises(AudioError, match="truncated"):
            windows(data, MONO)
