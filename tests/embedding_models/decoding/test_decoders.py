"""Two decoders, one result: by content and not by name, and what ffmpeg reads where libsndfile refuses."""

import io
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from embedding_models.audio import AudioError, AudioFormat, track_windows
from embedding_models.decoding import sound as decoding
from helpers.odd_files import alike, convert, encoded, sound, with_ffmpeg

FORMATS = [AudioFormat(24_000, 1), AudioFormat(44_100, 2)]
STEREO = AudioFormat(44_100, 2)
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:{}\n#EXT-X-ENDLIST\n"


def read(file):
    track = track_windows(file, FORMATS)
    windows = list(track)
    return track.seconds, windows


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(encoded(sound(13, 44_100, 2), 44_100))
    return path


@pytest.fixture
def no_ffmpeg(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@with_ffmpeg
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("it's: 1.m4a", []),
        ("x.wma", []),
        ("x.aac", []),
        ("-x.mp4", ["-vn"]),
        ("x.mka", ["-c:a", "aac"]),
        ("x.m4b", ["-f", "mp4"]),
        ("x.mp2", []),
        ("two\nlines.m4a", []),
        ("wrongly named.mp3", ["-f", "adts", "-c:a", "aac"]),
        ("wrongly named.wav", ["-f", "mp4", "-c:a", "aac"]),
    ],
)
def test_lossy_kinds_sound_alike_by_path_and_as_bytes(wav, name, words):
    path = convert(wav, wav.parent / name, *words, "-b:a", "256k")
    seconds, found = read(path)
    _, expected = read(wav)
    assert seconds == pytest.approx(13, abs=0.1)
    assert len(found) == len(expected) == 2
    for wanted in FORMATS:
        assert found[0][wanted].shape == expected[0][wanted].shape
        # an encoder may put some samples in front: compare loudness and spectrum, not samples
        a, b = (np.abs(np.fft.rfft(w[0][wanted][0]))[:40_000].reshape(-1, 100).sum(1) for w in (found, expected))
        assert np.corrcoef(a, b)[0, 1] > 0.98
        assert np.linalg.norm(found[0][wanted]) == pytest.approx(np.linalg.norm(expected[0][wanted]), rel=0.1)
    for file in (io.BytesIO(path.read_bytes()), path.open("rb")):
        with file:
            again = read(file)
        assert again[0] == seconds
        np.testing.assert_array_equal(again[1][-1][STEREO], found[-1][STEREO])


@with_ffmpeg
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.m4a", ["-c:a", "alac"]),
        ("x.wv", []),
        ("x.mka", ["-c:a", "flac"]),
        ("x.tta", []),
        ("x.mov", ["-c:a", "pcm_s16be"]),
    ],
)
def test_lossless_kinds_are_the_same_to_the_last_bit(wav, name, words):
    for found, expected in zip(read(convert(wav, wav.parent / name, *words))[1], read(wav)[1], strict=True):
        for wanted in FORMATS:
            np.testing.assert_array_equal(found[wanted], expected[wanted])


@with_ffmpeg
@pytest.mark.parametrize("channels", [3, 6, 8])
def test_one_downmix_for_both_decoders(tmp_path, channels):
    (tmp_path / "x.wav").write_bytes(encoded(sound(2, 44_100, channels), 44_100))
    layout = {3: "3.0", 6: "5.1", 8: "7.1"}[channels]
    words = ["-channel_layout", layout] if channels == 3 else []
    flac = convert(tmp_path / "x.wav", tmp_path / "x.flac")
    matroska = convert(flac, tmp_path / "x.mka", *words, "-c:a", "copy")
    for a, b in zip(read(flac)[1], read(matroska)[1], strict=True):
        np.testing.assert_array_equal(a[STEREO], b[STEREO])


@with_ffmpeg
def test_a_bad_peak_chunk(wav):
    data = wav.read_bytes()
    place = data.index(b"data")
    odd = data[:place] + b"PEAK" + struct.pack("<I", 16) + bytes(16) + data[place:]
    with pytest.raises(soundfile.LibsndfileError, match="PEAK"):
        soundfile.info(io.BytesIO(odd))
    np.testing.assert_array_equal(read(io.BytesIO(odd))[1][0][STEREO], read(wav)[1][0][STEREO])


@with_ffmpeg
def test_the_times_of_a_bare_stream(tmp_path):
    """ADTS: a prober takes the length from the bit rate of its beginning."""
    samples = np.concatenate([sound(6, 44_100), np.zeros((44_100 * 20, 1), np.float32)])
    for name, content in (("first", samples), ("last", samples[::-1])):
        (tmp_path / "x.wav").write_bytes(encoded(content, 44_100))
        seconds, windows = read(convert(tmp_path / "x.wav", tmp_path / f"{name}.aac"))
        assert seconds == pytest.approx(26, abs=0.1)
        assert len(windows) == 3


@with_ffmpeg
def test_what_ffmpeg_complains_of_is_kept(tmp_path, wav):
    """A damaged packet is a line on its stderr, not a reason to drop the rest."""
    data = bytearray(convert(wav, tmp_path / "x.aac").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = bytes(range(256)) + bytes(44)
    (tmp_path / "damaged.aac").write_bytes(data)
    said = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", tmp_path / "damaged.aac", "-f", "null", "-"], capture_output=True, check=True
    )
    assert said.stderr
    seconds, windows = read(tmp_path / "damaged.aac")
    assert seconds == pytest.approx(13, abs=0.3)
    assert alike(windows[0][STEREO][:, :88_200], read(tmp_path / "x.aac")[1][0][STEREO][:, :88_200]) > 0.999


@with_ffmpeg
def test_where_libsndfile_gives_up_ffmpeg_goes_on(wav, tmp_path):
    flac = convert(wav, tmp_path / "x.flac").read_bytes()
    middle = len(flac) // 2
    damaged = flac[:middle] + bytes(np.random.default_rng(0).bytes(300)) + flac[middle + 300 :]
    seconds, windows = read(io.BytesIO(damaged))
    expected = read(io.BytesIO(flac))[1]
    assert seconds == pytest.approx(13, abs=0.25)
    np.testing.assert_array_equal(windows[0][STEREO][:, :44_100], expected[0][STEREO][:, :44_100])


class _GivesUp:
    """A decoder that fails after some blocks, in the place of libsndfile's."""

    def __init__(self, source, after):
        self._source, self._after = source, after
        self.rate, self.channels, self.promised = source.rate, source.channels, source.promised

    def blocks(self):
        for number, block in enumerate(self._source.blocks()):
            if number == self._after:
                raise soundfile.SoundFileRuntimeError("lost the thread")
            yield block


@with_ffmpeg
@pytest.mark.parametrize("after", [0, 1, 3])
def test_ffmpeg_goes_on_at_the_very_sample(wav, monkeypatch, after):
    expected = read(wav)
    real = decoding.SndfileSource

    class Broken(_GivesUp, real):
        def __init__(self, file, own):
            _GivesUp.__init__(self, real(file, own), after)

    monkeypatch.setattr(decoding, "SndfileSource", Broken)
    found = read(wav)
    assert found[0] == expected[0] == 13
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(a[STEREO], b[STEREO])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AudioError, match=r"x\.wav: damaged after [0-9.]+ s \(lost the thread; ffmpeg is not installed"):
        read(wav)


@with_ffmpeg
def test_broken_files_that_ffmpeg_reads(tmp_path, wav):
    whole = convert(wav, tmp_path / "x.m4a", "-movflags", "faststart").read_bytes()
    for name, content in (("cut.m4a", whole[: len(whole) // 2]), ("noise.m4a", np.random.default_rng(0).bytes(5000))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AudioError, match=name) as error:
            read(tmp_path / name)
        assert error.value.reason == "unreadable"
    (tmp_path / "s.wav").write_bytes(encoded(sound(0.2)))
    with pytest.raises(AudioError, match=r"expected 0\.5 or more"):
        read(convert(tmp_path / "s.wav", tmp_path / "short.m4a"))


@with_ffmpeg
def test_leaving_early_ends_ffmpeg(wav):
    path = convert(wav, wav.parent / "x.m4a")
    windows = track_windows(path, FORMATS)
    next(windows)
    windows.close()
    children = psutil.Process().children(recursive=True)
    assert not [child for child in children if f"file:{path}" in child.cmdline()]


@with_ffmpeg
def test_a_file_cannot_make_ffmpeg_open_another(wav, tmp_path):
    for name in ("list.m4a", "list.m3u8"):
        (tmp_path / name).write_text(PLAYLIST.format(wav))
        with pytest.raises(AudioError, match=name):
            read(tmp_path / name)
    (tmp_path / "concat.m4a").write_text(f"ffconcat version 1.0\nfile '{wav}'\n")
    with pytest.raises(AudioError, match="concat"):
        read(tmp_path / "concat.m4a")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (bytes(5000), "nothing but zeros"),
        (b"\n<!DOCTYPE html>\n<title>404</title>" + b"x" * 900, "an HTML page"),
        (b"<?xml version='1.0'?><html><body>" + bytes(9), "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        (b"%PDF-1.7\n" + bytes(300), "a PDF document"),
        (b"PK\x03\x04" + bytes(300), "a ZIP archive"),
        (b"dear diary\n" * 300, "a text"),
        ("Liebes Tagebuch, schön\n".encode() * 300, "a text"),
        (b"\x00\x05\x16\x07" + bytes(100), "an AppleDouble companion"),
    ],
)
@pytest.mark.parametrize("name", ["a.mp3", "a.wav", "a.m4a"])
def test_what_is_no_audio_is_called_what_it_is(tmp_path, content, reason, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=rf"{name}: not readable as audio \({reason}") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_without_ffmpeg_it_says_so(tmp_path, no_ffmpeg):
    (tmp_path / "x.m4a").write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(range(256)))
    with pytest.raises(AudioError, match=r"x\.m4a: not readable as audio \(.*; ffmpeg is not installed\)"):
        read(tmp_path / "x.m4a")


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("OGG", "OPUS"), ("AU", "ULAW"), ("CAF", "ALAC_16"), ("W64", "PCM_24"), ("WAV", "MS_ADPCM"), ("AIFF", "PCM_S8")],
)
def test_what_libsndfile_reads_under_any_name_without_ffmpeg(tmp_path, no_ffmpeg, container, subtype):
    path = tmp_path / "wrongly named.m4a"
    path.write_bytes(encoded(sound(12, 48_000, 2), 48_000, container, subtype))
    seconds, windows = read(path)
    assert (round(seconds, 2), len(windows)) == (12, 2)


@pytest.mark.parametrize("name", [b"caf\xe9.wav", b"x" * 200 + b".wav", "🎵 \n'\"%s.wav".encode(), b"-i.wav"])
def test_names_are_no_matter(tmp_path, monkeypatch, name):
    """libsndfile is given an open file, not a name that it may spell otherwise."""
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(name))
    path.write_bytes(encoded(sound(1)))
    assert read(path)[0] == 1


def test_samples_that_are_no_sound(tmp_path):
    huge = sound(2) * 1e30
    with pytest.raises(AudioError, match=r"samples up to [0-9.]+e\+2?9?3?0?, expected about -1 to 1") as caught:
        read(io.BytesIO(encoded(huge, subtype="FLOAT")))
    assert caught.value.reason == "not finite"
    assert read(io.BytesIO(encoded(sound(2) * 32_768, subtype="FLOAT")))[0] == 2  # whole numbers as floats


@with_ffmpeg
def test_sound_behind_zeros(wav):
    mp3 = convert(wav, wav.parent / "x.mp3").read_bytes()
    seconds, _ = read(io.BytesIO(bytes(10_000) + mp3))
    assert seconds == pytest.approx(13, abs=0.1)


@pytest.mark.parametrize("container", ["W64", "CAF", "AU", "WAV", "AIFF", "FLAC"])
def test_a_seek_that_cannot_be_is_no_traceback(container, capfd):
    """libsndfile asks for places before the beginning of what was written to a pipe or cut."""
    content = encoded(sound(2), container=container)
    for data in (content, content[:60], content[:40] + b"\xff" * 16 + content[56:]):
        try:
            read(io.BytesIO(data))
        except AudioError:
            continue
    assert "Traceback" not in capfd.readouterr().err


@with_ffmpeg
@pytest.mark.parametrize("kind", ["w64", "wav", "caf", "au", "aiff", "flac", "mp3", "ogg", "adts", "matroska"])
def test_a_file_from_a_pipe_is_one_by_path_and_as_bytes(wav, kind):
    path = wav.parent / "piped.x"
    words = ["ffmpeg", "-v", "error", "-i", wav, "-f", kind, "-"]
    with path.open("wb") as file:
        subprocess.run(words, stdout=file, stdin=subprocess.DEVNULL, check=True)
    seconds, found = read(path)
    again, windows = read(io.BytesIO(path.read_bytes()))
    assert seconds == again == pytest.approx(13, abs=0.1)
    for a, b in zip(found, windows, strict=True):
        np.testing.assert_array_equal(a[STEREO], b[STEREO])
