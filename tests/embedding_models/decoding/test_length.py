"""A file's length is what was decoded, whatever its header counts."""

import io
import struct

import numpy as np
import pytest
import soundfile

from embedding_models.audio import AudioError, AudioFormat, track_windows
from helpers.odd_files import (
    alike,
    encoded,
    flac_with_count,
    id3v2,
    mp3_with_count,
    mp3_without_xing,
    size_of,
    sound,
    with_size,
)

RATE = 22_050
MONO = AudioFormat(RATE, 1)
A, B = sound(4, seed=1), sound(4, seed=2)
WAV, AIFF, FLAC = encoded(A), encoded(A, container="AIFF"), encoded(A, container="FLAC")
MP3, MP3_B = (encoded(each, container="MP3") for each in (A, B))
OGG, OGG_B = (encoded(each, container="OGG") for each in (A, B))
OPUS, OPUS_B = (encoded(sound(4, 48_000, seed=s), 48_000, "OGG", "OPUS") for s in (1, 2))


def read(data):
    """Seconds and the sound (1, samples) of a file's content; under ten seconds it is one window."""
    track = track_windows(io.BytesIO(data), [MONO])
    (window,) = list(track)
    return track.seconds, window[MONO]


def rf64(data_size):
    """A WAV of more than 4 GiB, as far as its header says."""
    sizes = struct.pack("<QQQI", 0, data_size, 0, 0)
    body = WAV[12 : WAV.index(b"data")] + b"data\xff\xff\xff\xff" + WAV[WAV.index(b"data") + 8 :]
    return b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<I", len(sizes)) + sizes + body


LENGTH = size_of(WAV)
SSND = size_of(AIFF, b"SSND", ">")
PADDED = WAV + b"LIST" + struct.pack("<I", 6000) + b"INFOICMT" + struct.pack("<I", 5988) + b"comment " * 748 + b"1234"

SAME_AS_WAV = {
    "a program that writes to a pipe (sox)": with_size(WAV, 0x7FFFF000),
    "a pipe (another one)": with_size(WAV, 0x7FFFFFFF),
    "a pipe, 2 GiB": with_size(WAV, 0x80000000),
    "a pipe (ffmpeg)": with_size(WAV, 0xFFFFFFFF),
    "a recorder that was killed": with_size(WAV, 0),
    "a recorder that was killed, RIFF size too": with_size(b"RIFF\0\0\0\0" + WAV[8:], 0),
    "a size from before the end": with_size(WAV, LENGTH // 2),
    "a millisecond less than the header says": with_size(WAV, LENGTH + 44),
    "a fifth of a second less": with_size(WAV, LENGTH + RATE * 2 // 5),
    "a comment behind the sound": PADDED,
    "an ID3 tag behind the sound": WAV + id3v2(6000),
    "RF64": rf64(LENGTH),
    "RF64 that was killed": rf64(0),
    "RF64 of a pipe": rf64((1 << 64) - 1),
    "AIFF that was killed": with_size(AIFF, 0, b"SSND", ">"),
    "AIFF with a size from before the end": with_size(AIFF, SSND // 2, b"SSND", ">"),
    "AIFF to a pipe": with_size(AIFF, 0x7FFFFFFF, b"SSND", ">"),
    "FLAC to a pipe": flac_with_count(FLAC, 0),
    "FLAC with a count from before the end": flac_with_count(FLAC, 10_000),
    "FLAC behind an ID3 tag": id3v2() + flac_with_count(FLAC, 10_000),
    "AU to a pipe": (lambda au: au[:8] + b"\xff\xff\xff\xff" + au[12:])(encoded(A, container="AU")),
}


@pytest.mark.parametrize("name", SAME_AS_WAV)
def test_the_same_sound_under_headers_that_cannot_be_true(name):
    seconds, found = read(SAME_AS_WAV[name])
    _, expected = read(FLAC if "FLAC" in name else WAV)  # it is rounded otherwise
    assert seconds == pytest.approx(4, abs=0.01 if "ID3" in name else 0.001)
    length = min(found.shape[1], expected.shape[1])
    np.testing.assert_array_equal(found[:, :length], expected[:, :length])


JOINED_MP3 = {
    "two files": (MP3 + MP3_B, 8),
    "three, one without a count": (MP3 + mp3_without_xing(MP3_B) + MP3_B, 12),
    "with tags between": (id3v2() + MP3 + id3v2() + MP3_B + b"TAG" + bytes(125), 8),
    "without any count": (mp3_without_xing(MP3) + mp3_without_xing(MP3_B), 8),
    "foreign bytes between": (MP3 + np.random.default_rng(0).bytes(5000) + MP3_B, 8),
}


@pytest.mark.parametrize("name", JOINED_MP3)
def test_joined_mp3_is_decoded_whole(name):
    data, expected = JOINED_MP3[name]
    track = track_windows(io.BytesIO(data), [MONO])
    windows = [window[MONO] for window in track]
    assert track.seconds == pytest.approx(expected, abs=0.2)
    if expected == 8:
        for found, whole in ((windows[0][:, : 3 * RATE], A), (windows[0][:, -3 * RATE :], B)):
            assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(whole) * 0.75**0.5, rel=0.1)


def test_joined_files_with_counts_are_their_sounds_one_after_another():
    for first, second in ((MP3, MP3_B), (OGG, OGG_B)):
        seconds, both = read(first + second)
        assert seconds == 8
        np.testing.assert_array_equal(both, np.concatenate([read(first)[1], read(second)[1]], axis=1))
    track = track_windows(io.BytesIO(OPUS + OPUS_B + OPUS), [MONO])
    assert len(list(track)) == 2
    assert track.seconds == pytest.approx(12, abs=0.01)


@pytest.mark.parametrize("tag", [b"", id3v2(60_000)], ids=("no tag", "ID3v2"))
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_without_a_count_is_as_long_as_with_one(tag, mode):
    loud_then_quiet = np.concatenate([sound(3) * 3, sound(5) * 0.001])
    whole = encoded(loud_then_quiet, container="MP3", bitrate_mode=mode, compression_level=0.5)
    seconds, found = read(tag + mp3_without_xing(whole))
    expected_seconds, expected = read(tag + whole)
    assert expected_seconds == 8
    assert seconds == pytest.approx(8, abs=0.11)  # what an encoder puts around the sound cannot be told without it
    shift = np.argmax(np.correlate(found[0, : 4 * RATE], expected[0, : 2 * RATE], "valid"))
    assert alike(found[:, shift:], expected) > 0.999


@pytest.mark.parametrize("factor", [0.5, 0.01])
def test_an_mp3_whose_count_is_too_small(factor):
    assert read(mp3_with_count(MP3, factor))[0] == pytest.approx(4, abs=0.06)


def test_mp3_with_foreign_bytes_inside():
    middle = len(MP3) // 2
    seconds, found = read(MP3[:middle] + np.random.default_rng(0).bytes(2000) + MP3[middle:])
    assert seconds == pytest.approx(4, abs=0.1)
    np.testing.assert_array_equal(found[:, :RATE], read(MP3)[1][:, :RATE])


@pytest.mark.parametrize(
    "data",
    [
        with_size(WAV, LENGTH + RATE * 4 // 5),
        WAV[: -RATE * 4 // 5],
        AIFF[:-RATE],
        rf64(LENGTH * 2),
        flac_with_count(FLAC, 5 * RATE),
        FLAC[: len(FLAC) * 2 // 3],
        mp3_with_count(MP3, 1.2),
        MP3[: len(MP3) * 2 // 3],
    ],
    # not made of the bytes: pytest puts an id into the environment, where a long one keeps ffprobe from starting
    ids=("WAV size", "WAV cut", "AIFF cut", "RF64 cut", "FLAC count", "FLAC cut", "MP3 count", "MP3 cut"),
)
def test_what_a_trustworthy_header_misses_is_truncated(data):
    with pytest.raises(AudioError, match=r"truncated or damaged, [0-9.]+ of [0-9.]+ s could be decoded"):
        read(data)


def test_ordinary_files_are_read_as_before():
    """Bit for bit what libsndfile gives of the file as it is."""
    for data in (WAV, AIFF, FLAC, MP3, OGG, id3v2() + MP3, PADDED):
        samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        # soundfile seeks before it reads, which moves an MP3's last bits
        np.testing.assert_allclose(read(data)[1], samples.T, rtol=0, atol=1e-7 if MP3 in data else 0)
