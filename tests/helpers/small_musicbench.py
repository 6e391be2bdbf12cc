"""Writes a MusicBench-shaped data set of a few synthetic clips, as a tar or as files, for the tests."""

import io
import json
import tarfile

import numpy as np
import soundfile

TONES = (220, 277, 330, 440, 554, 660)


def clip(number, seconds=10.0, rate=16_000, channels=1):
    """A chord with a rhythm that depends on `number`, (samples, channels) float32."""
    rng = np.random.default_rng(number)
    time = np.arange(int(seconds * rate)) / rate
    tone = sum(np.sin(2 * np.pi * TONES[(number + k) % 6] * (1 + k) * time) / (2 + k) for k in range(3))
    wave = tone * (0.3 + 0.2 * np.sin(2 * np.pi * (1 + number % 5) * time)) + 0.02 * rng.standard_normal(len(time))
    return np.repeat((wave / 2)[:, None], channels, 1).astype(np.float32)


def wav_bytes(samples, rate=16_000, subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def row(location, main="a main caption", alt="another caption"):
    return {"dataset": "MusicBench", "location": location, "main_caption": main, "alt_caption": alt}


class SmallMusicBench:
    """Metadata rows and audio by location; change them, then `write`."""

    def __init__(self, train_sources=10, copies=1, test=3):
        self.train, self.test_a, self.test_b, self.audio = [], [], [], {}
        for number in range(train_sources + test):
            source = f"source{number:05d}"
            self.audio[f"data/{source}.wav"] = wav_bytes(clip(number))
            if number >= train_sources:
                self.test_a.append(row(f"data/{source}.wav", f"test {number} main", f"test {number} alt"))
                self.test_b.append(row(f"data/{source}.wav", f"test {number} main in C", f"test {number} alt"))
                continue
            self.train.append(row(f"data/{source}.wav", f"clip {number} main", f"clip {number} alt"))
            for copy in range(1, copies + 1):
                location = f"data_aug2/{source}_{copy}.wav"
                self.audio[location] = wav_bytes(clip(number, 10 / (1 + copy / 20)))
                self.train.append(row(location, f"clip {number} faster", f"clip {number} quick"))

    def write(self, folder, tar=True):
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", self.train), ("test_A", self.test_a), ("test_B", self.test_b)):
            text = "".join(json.dumps(line) + "\n" for line in rows)
            (folder / f"MusicBench_{name}.json").write_text(text)
        if tar:
            with tarfile.open(folder / "MusicBench.tar.gz", "w:gz", compresslevel=1) as archive:
                for location, content in self.audio.items():
                    member = tarfile.TarInfo(f"datashare/{location}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        else:
            for location, content in self.audio.items():
                path = folder / "datashare" / location
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return folder
