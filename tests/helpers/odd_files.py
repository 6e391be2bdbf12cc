"""Audio files as they are found: headers that cannot be true, joined streams, tags of another format."""

import io
import shutil
import struct
import subprocess

import numpy as np
import pytest
import soundfile
import soxr

with_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")


def sound(seconds, rate=22_050, channels=1, seed=0):
    """Slow noise (frames, channels) float32: nothing above 4 kHz, so that every codec keeps it."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(round(seconds * 8000), channels)).astype(np.float32) * 0.1
    return soxr.resample(coarse, 8000, rate)[: round(seconds * rate)]


def encoded(samples, rate=22_050, container="WAV", subtype=None, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype, **options)
    return file.getvalue()


def with_size(data, size, name=b"data", order="<"):
    """A WAV or AIFF file whose sound chunk claims another size."""
    place = data.index(name) + 4
    return data[:place] + struct.pack(f"{order}I", size) + data[place + 4 :]


def size_of(data, name=b"data", order="<"):
    place = data.index(name) + 4
    return struct.unpack(f"{order}I", data[place : place + 4])[0]


def flac_with_count(data, frames):
    return data[:21] + bytes([data[21] & 0xF0 | frames >> 32]) + (frames & 0xFFFFFFFF).to_bytes(4) + data[26:]


def xing_place(data):
    return max(data.find(b"Xing", 0, 4000), data.find(b"Info", 0, 4000))


def mp3_with_count(data, factor):
    place = xing_place(data) + 8
    frames = int.from_bytes(data[place : place + 4])
    return data[:place] + round(frames * factor).to_bytes(4) + data[place + 4 :]


def mp3_without_xing(data):
    """The frames of an MP3 file without the first, which holds no sound but their number."""
    second = data.index(data[:2], 4)
    while data[second : second + 2] != data[:2] or second < xing_place(data):
        second = data.index(data[:2], second + 1)
    return data[second:]


def id3v2(size=3000):
    """An ID3v2 tag with a picture of random bytes, in which anything may look like a frame."""
    body = np.random.default_rng(1).bytes(size)
    frame = b"APIC" + size.to_bytes(4) + b"\0\0" + body
    length = len(frame)
    return b"ID3\x03\0\0" + bytes(length >> shift & 127 for shift in (21, 14, 7, 0)) + frame


def convert(source, target, *words):
    """Let ffmpeg write a file."""
    command = ["ffmpeg", "-v", "error", "-y", "-i", f"file:{source}", *words, f"file:{target}"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return target


def alike(a, b):
    """The cosine of two sounds (channels, samples), over the samples that both have."""
    length = min(a.shape[-1], b.shape[-1])
    a, b = a[..., :length].ravel(), b[..., :length].ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
