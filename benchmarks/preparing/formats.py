"""Does the format matter? One sound in every format that can be written, embedded as in a folder and as in a table."""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr
from mutagen.apev2 import APEv2
from mutagen.id3 import ID3, TIT2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
from common.errors import UserError, run_script
from embedding_models.audio import AudioError
from embedding_models.base import AudioEmbeddingModel
from embedding_models.decoding.ffmpeg import has_ffmpeg
from embedding_models.decoding.mpeg import mpeg_streams
from embedding_models.decoding.sound import Sound
from embedding_models.decoding.views import ByteReader
from embedding_models.pipeline import StageSeconds, embed_clips
from embedding_models.registry import ENCODERS, add_encoder_flags, find_encoder, spec_from_flags
from embedding_models.track_workers import End, embed_one
from music_library.index_space import IndexSpace, read_head

SNDFILE = {  # name -> container and sample format of libsndfile
    "wav 8.wav": ("WAV", "PCM_U8"),
    "wav 16.wav": ("WAV", "PCM_16"),
    "wav 24.wav": ("WAV", "PCM_24"),
    "wav 32.wav": ("WAV", "PCM_32"),
    "wav float.wav": ("WAV", "FLOAT"),
    "wav double.wav": ("WAV", "DOUBLE"),
    "wav MS ADPCM.wav": ("WAV", "MS_ADPCM"),
    "wav IMA ADPCM.wav": ("WAV", "IMA_ADPCM"),
    "wav A-law.wav": ("WAV", "ALAW"),
    "wav mu-law.wav": ("WAV", "ULAW"),
    "RF64.wav": ("RF64", "PCM_16"),
    "W64.w64": ("W64", "PCM_16"),
    "aiff.aiff": ("AIFF", "PCM_16"),
    "aifc float.aifc": ("AIFF", "FLOAT"),
    "au.au": ("AU", "PCM_16"),
    "caf.caf": ("CAF", "PCM_16"),
    "flac.flac": ("FLAC", "PCM_16"),
    "flac 24.flac": ("FLAC", "PCM_24"),
    "ogg.ogg": ("OGG", "VORBIS"),
    "mp3 (libsndfile).mp3": ("MP3", "MPEG_LAYER_III"),
}
FFMPEG = {  # name -> words of ffmpeg
    "aifc sowt.aifc": ["-f", "aiff", "-c:a", "pcm_s16be"],
    "opus.opus": ["-c:a", "libopus", "-b:a", "192k"],
    "mp3 CBR.mp3": ["-b:a", "192k", "-id3v2_version", "0"],
    "mp3 CBR no Xing.mp3": ["-b:a", "192k", "-write_xing", "0", "-id3v2_version", "0"],
    "mp3 VBR.mp3": ["-q:a", "2", "-id3v2_version", "0"],
    "mp3 VBR no Xing.mp3": ["-q:a", "2", "-write_xing", "0", "-id3v2_version", "0"],
    "mp3 ID3v1.mp3": ["-b:a", "192k", "-write_id3v1", "1", "-id3v2_version", "0", "-metadata", "title=x"],
    "mp2.mp2": ["-b:a", "160k"],
    "m4a AAC.m4a": ["-c:a", "aac", "-b:a", "256k"],
    "m4b AAC.m4b": ["-c:a", "aac", "-b:a", "256k", "-f", "mp4"],
    "m4a ALAC.m4a": ["-c:a", "alac"],
    "aac.aac": ["-c:a", "aac", "-b:a", "256k"],
    "wma.wma": ["-c:a", "wmav2", "-b:a", "192k"],
    "mka FLAC.mka": ["-c:a", "flac"],
    "mka Opus.mka": ["-c:a", "libopus", "-b:a", "192k"],
    "webm.webm": ["-c:a", "libopus", "-b:a", "192k"],
    "wv.wv": ["-c:a", "wavpack"],
    "tta.tta": ["-c:a", "tta"],
    "ac3.ac3": ["-c:a", "ac3", "-b:a", "384k"],
}
LOSSLESS = ("wav 16", "wav 24", "wav 32", "float", "double", "RF64", "W64", "aif", "au.", "caf", "flac", "FLAC",
            "ALAC", "wv", "tta")  # fmt: skip


def write_formats(samples: np.ndarray, rate: int, folder: Path) -> list[Path]:
    """Write a sound, (frames, channels) float32, in every format; returns the files."""
    for name, (container, subtype) in SNDFILE.items():
        soundfile.write(folder / name, samples, rate, format=container, subtype=subtype)
    for name, words in FFMPEG.items():
        command = ["ffmpeg", "-v", "error", "-nostdin", "-i", folder / "wav 16.wav", *words, f"file:{folder / name}"]
        made = subprocess.run(command, capture_output=True, check=False)
        if made.returncode:
            print(f"{name}: not written ({made.stderr.decode(errors='replace').strip().splitlines()[-1:]})")
            (folder / name).unlink(missing_ok=True)
    print("ape: not written (ffmpeg has no encoder for it)")
    plain = folder / "mp3 CBR.mp3"
    if plain.exists():
        add_variants(plain)
    return sorted(folder.iterdir())


def add_variants(plain: Path) -> None:
    """The same MP3 file with an ID3v2 tag, an APE tag, and twice in a row without its count."""
    for name, tag in (("mp3 ID3v2.mp3", ID3()), ("mp3 APE tag.mp3", APEv2())):
        path = plain.with_name(name)
        path.write_bytes(plain.read_bytes())
        if isinstance(tag, ID3):
            tag.add(TIT2(encoding=3, text="a title"))
        else:
            tag["Title"] = "a title"
        tag.save(path)
    with plain.open("rb") as file:
        (stream,) = mpeg_streams(ByteReader(file))
        (start, stop) = stream.runs[0]
        file.seek(start)
        plain.with_name("mp3 only frames.mp3").write_bytes(file.read(stop - start))


def as_folder(encoder: AudioEmbeddingModel, path: Path) -> np.ndarray | str:
    """The vector that index_library.py would keep, or why there is none."""
    *_, last = embed_one(encoder, 0, path, 8, False)
    return last.mean if isinstance(last, End) else last.reason


def as_table(encoder: AudioEmbeddingModel, clip: Path | bytes) -> np.ndarray | str:
    """The vector that prepare_dataset.py would store for a path or an archive's member, or why there is none."""
    ((_, found),) = [each for batch in embed_clips([(0, clip)], [encoder], 8, 1, StageSeconds()) for each in batch]
    return str(found) if isinstance(found, AudioError) else found[encoder.name]


@contextmanager
def no_programs() -> Iterator[None]:
    """Nothing on the PATH, so no ffmpeg."""
    before = os.environ["PATH"]
    os.environ["PATH"] = os.devnull
    try:
        yield
    finally:
        os.environ["PATH"] = before


def two_sounds(source: Path) -> list[tuple[np.ndarray, int]]:
    """The first recording of an archive and the first of another source, (frames, channels) float32 and the rate."""
    names: list[str] = []
    sounds = []
    with tarfile.open(source) as archive:
        for member in archive:
            stem = Path(member.name).stem
            if not member.isreg() or (names and stem[:11] == names[0][:11]):  # a copy of the first
                continue
            file = archive.extractfile(member)
            assert file is not None  # it is regular
            names.append(stem)
            sounds.append(soundfile.read(io.BytesIO(file.read()), dtype="float32", always_2d=True))
            if len(sounds) == 2:
                return sounds
    raise UserError(f"{source}: expected recordings of two sources, found those of {len(sounds)}")


def signal_to_noise(path: Path, plain: Path) -> float:
    """How far the sound of a file is above what a format does to it, in dB, at the shift that fits best."""
    found, wanted = (decoded(each) for each in (path, plain))
    length = 1 << int(np.ceil(np.log2(len(found) + len(wanted))))
    spectrum = np.fft.rfft(found, length) * np.fft.rfft(wanted, length).conj()
    shift = int(np.argmax(np.fft.irfft(spectrum, length)))
    shift -= length if shift > length // 2 else 0
    found, wanted = found[max(0, shift) :], wanted[max(0, -shift) :]
    count = min(len(found), len(wanted))
    noise = found[:count] - wanted[:count]
    return 10 * float(np.log10(np.square(wanted[:count]).sum() / max(np.square(noise).sum(), 1e-12)))


def decoded(path: Path) -> np.ndarray:
    """The sound of a file, mono at 16 kHz, float64; what lies above is left out, as most encoders do."""
    sound = Sound(path)
    with sound.opened() as blocks:
        samples = np.concatenate([block.mean(axis=1) for block in blocks])
    return soxr.resample(samples.astype(np.float64), sound.rate, 16_000)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python -m benchmarks.preparing.formats --checkpoint checkpoints/musicnn_best_r1.pt "
        "--archive musicbench/MusicBench.tar.gz\n"
        "kbit/s: the file's size by its length; dB: signal to noise below 8 kHz; the other columns: cosine with "
        "wav 16 in the audio space",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint of train.py, in whose audio space vectors are compared")
    add("--archive", type=Path, default=Path("demo/musicbench/MusicBench.tar.gz"), help="recordings (%(default)s)")
    add_encoder_flags(parser, "the one the checkpoint names")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write, embed, compare and print."""
    args = build_parser().parse_args(argv)
    if not has_ffmpeg():
        raise UserError("expected ffmpeg and ffprobe, which write the formats; found them not installed")
    head, config, recorded = read_head(args.checkpoint)
    entry = find_encoder(config.audio_encoder)
    encoder = spec_from_flags(args, ENCODERS[entry.name], "cpu", "float32", recorded["id"], None).load()
    space = IndexSpace(entry.name, head, recorded["recipe"], recorded["id"])
    (samples, rate), (other, other_rate) = two_sounds(args.archive)
    # an encoder may shift the sound a little: ten seconds and some, so that two windows are compared
    samples = np.concatenate([samples, samples[: 3 * rate]])

    def cosine(found: np.ndarray | str, to: np.ndarray) -> str:
        if isinstance(found, str):
            return "no"
        return f"{float(space.audio(found[None])[0] @ space.audio(to[None])[0]):.4f}"

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_formats(samples, rate, folder)
        reference = as_folder(encoder, folder / "wav 16.wav")
        soundfile.write(folder / "other.wav", other, other_rate, subtype="PCM_16")
        print(f"another sound: {cosine(as_folder(encoder, folder / 'other.wav'), reference)}")
        columns = f"{'kbit/s':>7} {'dB':>6} {'folder':>7} {'table':>7} {'bytes':>7} {'without ffmpeg':>15}"
        print(f"{'format':24} {'':8} {columns}")
        for path in files:
            found = [as_folder(encoder, path), as_table(encoder, path), as_table(encoder, path.read_bytes())]
            with no_programs():
                alone = as_folder(encoder, path)
            kind = "lossless" if any(word in path.name for word in LOSSLESS) else "lossy"
            cells = " ".join(f"{cosine(each, reference):>7}" for each in found)
            size = f"{path.stat().st_size * 8 * rate / len(samples) / 1000:7.0f}"
            clean = f"{min(signal_to_noise(path, folder / 'wav 16.wav'), 99):6.1f}"
            print(f"{path.stem:24} {kind:8} {size} {clean} {cells} {cosine(alone, reference):>15}")


if __name__ == "__main__":
    run_script(main)
