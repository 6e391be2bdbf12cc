"""A folder in which each sound lies twice, in a sane and in an odd container: index_library.py hears no difference."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

import index_library
from helpers.odd_files import (
    convert,
    encoded,
    flac_with_count,
    id3v2,
    mp3_without_xing,
    sound,
    with_ffmpeg,
    with_size,
)
from helpers.small_library import base_text_model, write_checkpoint
from music_library.vector_files import VectorFiles

RATE = 22_050


def with_peak(wav):
    """A WAV file with a PEAK chunk that libsndfile refuses."""
    place = wav.index(b"data")
    return wav[:place] + b"PEAK" + struct.pack("<I", 16) + bytes(16) + wav[place:]


def pairs(folder):
    """Sane and odd files of one sound each, as (name, name, least cosine in float16)."""
    made: list[tuple[str, str, float]] = []

    def pair(name, suffix, sane, odd, least=0.9999):
        for kind, content in (("sane", sane), ("odd", odd)):
            (folder / f"{name} {kind}{suffix}").write_bytes(content)
        made.append((f"{name} sane{suffix}", f"{name} odd{suffix}", least))

    for number, (name, size) in enumerate((("pipe", 0x7FFFF000), ("killed", 0), ("a millisecond", None))):
        wav = encoded(sound(3, seed=number))
        pair(name, ".wav", wav, with_size(wav, 3 * 2 * RATE + 44 if size is None else size))
    flac = encoded(sound(3, seed=4), container="FLAC")
    pair("streamed", ".flac", flac, flac_with_count(flac, 0))
    for number, mode in enumerate(("CONSTANT", "VARIABLE")):
        samples = np.concatenate([sound(6, seed=5 + number), sound(12, seed=7 + number) * 0.01])
        mp3 = encoded(samples, container="MP3", bitrate_mode=mode, compression_level=0.5)
        tag = id3v2(60_000)
        pair(f"without a count, {mode}", ".mp3", tag + mp3, tag + mp3_without_xing(mp3), 0.999)
    for number, container in enumerate(("MP3", "OGG")):
        a, b = (encoded(sound(4, seed=10 + 2 * number + each), container=container) for each in (0, 1))
        both = np.concatenate([soundfile.read(io.BytesIO(each), dtype="float32")[0] for each in (a, b)])
        (folder / f"joined {container} sane.wav").write_bytes(encoded(both, subtype="FLOAT"))
        (folder / f"joined {container} odd.{container.lower()}").write_bytes(a + b)
        made.append((f"joined {container} sane.wav", f"joined {container} odd.{container.lower()}", 0.9999))
    peak = encoded(sound(3, channels=2, seed=20))
    pair("peak", ".wav", peak, with_peak(peak))
    surround = folder / "surround sane.flac"
    surround.write_bytes(encoded(sound(3, 44_100, 6, seed=21), 44_100, "FLAC"))
    convert(surround, folder / "surround odd.m4a", "-c:a", "alac")
    made.append((surround.name, "surround odd.m4a", 0.9999))
    return made


@with_ffmpeg
def test_vectors_of_pairs_in_one_folder(tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("music").mkdir()
    made = pairs(Path("music"))
    write_checkpoint("muq.pt", tiny_models, base_text_model(tmp_path / "base"))
    backbone = ["--muq-backbone", str(tiny_models / "muq_large")]
    index_library.main(["music", "--checkpoint", "muq.pt", "--device", "cpu", *backbone])
    with VectorFiles("data/library.vectors", "muq") as files:
        tracks = {Path(track.path).name: (track.duration, np.array(files.vectors[track.row], np.float64))
                  for track in files.tracks()}  # fmt: skip
    assert len(tracks) == 2 * len(made)
    centre = np.mean([vector for _, vector in tracks.values()], axis=0)
    others = [vector for _, vector in tracks.values()]

    def cosine(a, b):
        a, b = a - centre, b - centre
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    for sane, odd, least in made:
        (seconds, vector), (odd_seconds, odd_vector) = tracks[sane], tracks[odd]
        assert odd_seconds == pytest.approx(seconds, abs=0.11), odd
        assert cosine(vector, odd_vector) >= least, odd
        assert np.median([cosine(vector, each) for each in others]) < 0.5, odd  # which are told apart
