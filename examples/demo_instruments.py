"""The demo band: how one note of each instrument, and one hit of each drum, is synthesised with numpy.

Every note is a pure function of its arguments (its noise too), so notes can be cached and a clip is the same in
any process. Notes are float32, about 1.0 RMS while they sound, and start at their first sample.
"""

from functools import cache, lru_cache, partial

import numpy as np

SAMPLE_RATE = 16_000  # Hz, what everything is rendered at
TABLE = 256  # samples in one period of a waveform table
FRAME = 64  # samples for which one row of an evolving waveform table holds
PHASES = np.random.default_rng(1).uniform(0, 2 * np.pi, TABLE // 2)  # random phases keep the peaks low
NOISE = np.random.default_rng(2).standard_normal(16 * SAMPLE_RATE).astype(np.float32)


def noise(seconds: float, low: float, high: float, offset: int = 0) -> np.ndarray:
    """White noise between `low` and `high` Hz, unit RMS, the same for the same arguments."""
    n = int(seconds * SAMPLE_RATE)
    start = offset % (len(NOISE) - n)
    spectrum = np.fft.rfft(NOISE[start : start + n])
    hertz = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    band = np.fft.irfft(spectrum / (1 + (low / np.maximum(hertz, 1)) ** 4) / (1 + (hertz / high) ** 4), n)
    return (band / np.sqrt(np.mean(band**2) + 1e-12)).astype(np.float32)


def envelope(n: int, attack: float, release: float) -> np.ndarray:
    """Straight rise over `attack` seconds, a hold, and a straight fall over the last `release` seconds."""
    t = np.arange(n, dtype=np.float32) / SAMPLE_RATE
    return np.minimum(1, np.minimum((t + 1e-4) / attack, (n / SAMPLE_RATE - t) / release))


def harmonic(
    freq: float,
    seconds: float,
    *,
    slope: float = 1.0,
    even: float = 1.0,
    formants: tuple = (),
    decay: float = 0.0,
    decay_rise: float = 0.0,
    attack: float = 0.005,
    release: float = 0.06,
    bloom: float = 0.0,
    vibrato: float = 0.0,
    tremolo: float = 0.0,
    scoop: float = 0.0,
    breath: float = 0.0,
    detune: tuple = (0.0,),
) -> np.ndarray:
    """A note of whole-number harmonics whose spectrum moves: plucked, bowed, blown and organ-like instruments.

    Harmonic h starts at h ** -slope (even ones times `even`), shaped by `formants` (Hz, width in Hz, gain), and
    dies at `decay + decay_rise * h` per second - the frequency-dependent loss of a Karplus-Strong string, in
    closed form. `bloom` (s): upper harmonics come in late, as on brass. `vibrato` and `scoop` (a start below the
    pitch) in cents; `tremolo` and `breath` (noise) are shares of the level; `detune` in cents, a player each.
    """
    n = int((seconds + release) * SAMPLE_RATE)
    tables = _wavetables(freq, n, slope, even, formants, decay, decay_rise, bloom)
    time = np.arange(n, dtype=np.float32) / SAMPLE_RATE
    cents = vibrato * np.minimum(1, time / 0.3) * np.sin(2 * np.pi * 5.5 * time) - scoop * np.exp(-time / 0.05)
    cycles = np.cumsum(freq / SAMPLE_RATE * np.exp2(cents / 1200, dtype=np.float64))
    players = (cycles * 2 ** (offset / 1200) + 0.37 * number for number, offset in enumerate(detune))
    out = sum(_played(tables, phases) for phases in players)
    out /= np.sqrt(len(detune))
    if breath:
        out += breath * noise(n / SAMPLE_RATE + 1e-6, freq, 5000, int(freq))[:n]
    if tremolo:
        out *= 1 - tremolo * (0.5 + 0.5 * np.sin(2 * np.pi * 6 * time))
    return out * envelope(n, attack, release)


def _wavetables(freq, n, slope, even, formants, decay, decay_rise, bloom) -> np.ndarray:
    """A cycle (TABLE samples and one more, to interpolate) for every FRAME of a note's n samples, one after another."""
    h = np.arange(1, max(2, min(48, int(0.46 * SAMPLE_RATE / freq)) + 1))
    level = h**-slope * np.where(h % 2 == 0, even, 1.0)
    if formants:
        level = level * (0.08 + sum(g * np.exp(-(((h * freq - hz) / width) ** 2)) for hz, width, g in formants))
    level /= np.sqrt(np.sum(level**2) / 2)
    t = np.arange(0, n, FRAME)[:, None] / SAMPLE_RATE
    rows = level * np.exp(-t * (decay + decay_rise * h))
    if bloom:
        rows = rows * (1 - 0.85 * np.exp(-t / bloom)) ** np.log2(h)
    spectrum = np.zeros((len(t), TABLE // 2 + 1), dtype=complex)
    spectrum[:, h] = rows * np.exp(1j * PHASES[h]) * (TABLE / 2)
    tables = np.fft.irfft(spectrum, TABLE).astype(np.float32)
    return np.concatenate([tables, tables[:, :1]], axis=1).ravel()


def _played(tables: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    """The note whose phase, in cycles, is `cycles` (n,) float64; each FRAME has a table of its own."""
    phase = cycles % 1 * TABLE
    index = phase.astype(np.int64)
    share = (phase - index).astype(np.float32)
    at = np.arange(len(cycles)) // FRAME * (TABLE + 1) + np.minimum(index, TABLE - 1)
    return tables[at] * (1 - share) + tables[at + 1] * share


def struck(freq: float, seconds: float, *, partials: tuple, release: float = 0.15, tremolo: float = 0.0):
    """Bars and bells: a few partials (ratio, level, decay per second) that need not be harmonics."""
    n = int((seconds + release) * SAMPLE_RATE)
    t = np.arange(n, dtype=np.float32) / SAMPLE_RATE
    heard = [(r, g, d) for r, g, d in partials if r * freq < 0.48 * SAMPLE_RATE]
    out = sum(g * np.exp(-d * t) * np.sin(np.float32(2 * np.pi * r * freq) * t) for r, g, d in heard)
    if tremolo:
        out = out * (1 - tremolo * (0.5 + 0.5 * np.sin(2 * np.pi * 5 * t)))
    return (1.6 * out * envelope(n, 0.002, release)).astype(np.float32)


def fm(freq: float, seconds: float, *, ratio: float, index: float, index_decay: float, decay: float = 0.0,
       attack: float = 0.004, release: float = 0.08) -> np.ndarray:  # fmt: skip
    """Two-operator frequency modulation (Chowning 1973): `index` falls by `index_decay` per second."""
    n = int((seconds + release) * SAMPLE_RATE)
    t = np.arange(n, dtype=np.float32) / SAMPLE_RATE
    depth = min(index, 0.3 * SAMPLE_RATE / (ratio * freq)) * np.exp(-index_decay * t)
    wave = np.sin(2 * np.pi * freq * t + depth * np.sin(2 * np.pi * ratio * freq * t))
    return (1.4 * wave * np.exp(-decay * t) * envelope(n, attack, release)).astype(np.float32)


VOICES = {
    # plucked and hammered strings
    "piano": partial(harmonic, slope=1.25, decay=1.3, decay_rise=0.35, release=0.12, detune=(-1.5, 1.5)),
    "harpsichord": partial(harmonic, slope=0.25, decay=2.0, decay_rise=0.12, release=0.05),
    "acoustic guitar": partial(harmonic, slope=0.8, decay=1.5, decay_rise=0.55, release=0.1),
    "nylon guitar": partial(harmonic, slope=1.5, decay=2.2, decay_rise=0.9, release=0.1),
    "distorted guitar": partial(harmonic, slope=0.7, decay=0.3, decay_rise=0.05, vibrato=12, release=0.05),
    "harp": partial(harmonic, slope=1.9, decay=1.2, decay_rise=0.8, release=0.5),
    "banjo": partial(harmonic, slope=0.15, decay=5.5, decay_rise=0.5, formants=((1100, 900, 1), (2800, 900, 0.8))),
    "sitar": partial(harmonic, slope=0.1, decay=1.1, decay_rise=0.06, scoop=160, vibrato=18,
                     formants=((1600, 700, 1), (3400, 1200, 0.9), (300, 300, 0.5))),
    # bowed
    "violin": partial(harmonic, slope=0.9, attack=0.07, release=0.09, vibrato=28, bloom=0.05, breath=0.02,
                      formants=((500, 300, 0.6), (1100, 500, 0.7), (3000, 900, 1))),
    "cello": partial(harmonic, slope=0.95, attack=0.09, release=0.12, vibrato=22, bloom=0.08, breath=0.03,
                     formants=((230, 150, 1), (600, 300, 0.7), (1400, 500, 0.35))),
    "strings": partial(harmonic, slope=1.1, attack=0.2, release=0.3, vibrato=8, detune=(-9, -2, 6, 11)),
    # blown
    "flute": partial(harmonic, slope=2.6, attack=0.06, release=0.07, vibrato=16, breath=0.22),
    "clarinet": partial(harmonic, slope=0.9, even=0.04, attack=0.03, release=0.05, bloom=0.03),
    "trumpet": partial(harmonic, slope=0.35, attack=0.025, release=0.05, bloom=0.09, vibrato=7,
                       formants=((1300, 900, 1), (2600, 900, 0.6))),
    "saxophone": partial(harmonic, slope=0.65, attack=0.04, release=0.06, vibrato=20, scoop=70, breath=0.13,
                         formants=((650, 350, 1), (1500, 400, 0.6), (2700, 500, 0.35))),
    "tuba": partial(harmonic, slope=1.3, attack=0.05, release=0.06, bloom=0.1),
    "whistle": partial(harmonic, slope=6.0, attack=0.05, release=0.06, vibrato=30, scoop=90, breath=0.05),
    "accordion": partial(harmonic, slope=0.45, attack=0.04, release=0.05, detune=(-14, 0, 14),
                         formants=((900, 800, 1), (2200, 900, 0.7))),
    "choir": partial(harmonic, slope=0.8, attack=0.16, release=0.25, vibrato=14, breath=0.05, detune=(-12, 0, 9),
                     formants=((700, 160, 1), (1120, 160, 0.8), (2600, 250, 0.25))),
    # keys and synthesizers
    "organ": partial(harmonic, slope=0.0, attack=0.015, release=0.06, detune=(0,), tremolo=0.25,
                     formants=((250, 250, 1), (900, 400, 0.45), (2100, 500, 0.2))),
    "electric piano": partial(fm, ratio=1.0, index=1.6, index_decay=3.5, decay=1.3),
    "synth lead": partial(harmonic, slope=1.0, attack=0.008, release=0.05, detune=(-10, 8), vibrato=10),
    "supersaw": partial(harmonic, slope=0.85, attack=0.01, release=0.08, detune=(-18, -7, 6, 17)),
    "synth pad": partial(harmonic, slope=1.7, attack=0.5, release=0.6, detune=(-8, 0, 7), tremolo=0.15),
    "chip": partial(harmonic, slope=1.0, even=0.0, attack=0.003, release=0.01),
    "clavinet": partial(harmonic, slope=0.3, even=0.6, decay=4.0, decay_rise=0.4, release=0.03),
    # bars and bells
    "marimba": partial(struck, partials=((1, 1, 7), (3.93, 0.35, 16), (9.2, 0.12, 40))),
    "vibraphone": partial(struck, partials=((1, 1, 1.3), (4, 0.25, 4), (10, 0.05, 12)), tremolo=0.7, release=0.4),
    "glockenspiel": partial(struck, partials=((1, 1, 3), (2.76, 0.5, 6), (5.4, 0.25, 11)), release=0.5),
    "bells": partial(struck, release=0.6, partials=(
        (0.5, 0.6, 0.8), (1, 1, 1.2), (1.19, 0.7, 1.5), (1.5, 0.4, 2), (2, 0.6, 2.2),
        (2.74, 0.4, 3.5), (4.1, 0.25, 6))),
    "steel drum": partial(fm, ratio=2.0, index=2.2, index_decay=9, decay=4.5, attack=0.006),
    # basses
    "upright bass": partial(harmonic, slope=1.6, decay=2.2, decay_rise=0.9, attack=0.012),
    "electric bass": partial(harmonic, slope=1.0, decay=1.0, decay_rise=0.45),
    "slap bass": partial(harmonic, slope=0.2, decay=2.5, decay_rise=0.5, release=0.03),
    "synth bass": partial(harmonic, slope=0.9, decay=0.5, decay_rise=0.3, attack=0.004, release=0.03),
    "sub bass": partial(harmonic, slope=4.0, decay=0.7, attack=0.01, release=0.08, scoop=-500),
}  # fmt: skip


@lru_cache(maxsize=768)
def note(voice: str, midi: int, hundredths: int) -> np.ndarray:
    """One note of `voice` at MIDI pitch `midi` held for `hundredths` of a second, plus its release."""
    return VOICES[voice](440.0 * 2 ** ((midi - 69) / 12), hundredths / 100)


def _burst(seconds: float, low: float, high: float, decay: float, offset: int = 0, attack: float = 0.001):
    sound = noise(seconds, low, high, offset)
    t = np.arange(len(sound), dtype=np.float32) / SAMPLE_RATE
    return sound * np.exp(-decay * t) * np.minimum(1, (t + 1e-4) / attack)


def _skin(seconds: float, start: float, end: float, glide: float, decay: float) -> np.ndarray:
    """A drum skin: a sine that falls from `start` to `end` Hz."""
    t = np.arange(int(seconds * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    cycles = np.cumsum(end + (start - end) * np.exp(-t * glide)) / SAMPLE_RATE
    return (1.4 * np.sin(2 * np.pi * cycles) * np.exp(-decay * t)).astype(np.float32)


DRUM_SOUNDS = {
    "kick": lambda: 2.2 * _skin(0.3, 180, 50, 40, 13),
    "deep kick": lambda: 2.4 * _skin(0.5, 140, 42, 25, 6),
    "snare": lambda: _burst(0.25, 700, 7000, 18) + 0.7 * _skin(0.25, 260, 180, 30, 20),
    "brush": lambda: 0.6 * _burst(0.2, 1500, 5500, 16, 77, attack=0.03),
    "clap": lambda: 1.1 * _burst(0.25, 900, 3500, 20, 500) + 0.8 * np.roll(_burst(0.25, 900, 3500, 60, 900), 200),
    "hat": lambda: 0.6 * _burst(0.06, 5500, 8000, 70, 1200),
    "open hat": lambda: 0.6 * _burst(0.3, 5000, 8000, 12, 1500),
    "ride": lambda: 0.45 * _burst(0.5, 4500, 7000, 7, 1800) + 0.2 * struck(3100, 0.35, partials=((1, 1, 9),)),
    "crash": lambda: 0.8 * _burst(1.2, 2500, 8000, 3.5, 2200),
    "rim": lambda: 1.2 * _skin(0.06, 1700, 1650, 10, 90) + 0.4 * _burst(0.06, 1000, 6000, 120),
    "shaker": lambda: 0.45 * _burst(0.09, 4500, 7500, 40, 2600, attack=0.02),
    "tambourine": lambda: 0.6 * _burst(0.22, 5000, 8000, 17, 3000),
    "conga": lambda: 1.4 * _skin(0.3, 240, 205, 40, 14) + 0.2 * _burst(0.3, 800, 3000, 60),
    "high conga": lambda: 1.3 * _skin(0.22, 370, 330, 40, 20) + 0.3 * _burst(0.22, 1000, 4000, 60),
    "tabla": lambda: 1.2 * _skin(0.3, 420, 410, 10, 12) + 0.3 * _skin(0.3, 1240, 1235, 10, 22),
    "baya": lambda: 1.6 * _skin(0.4, 80, 130, 9, 8),
    "bass drum": lambda: 2.3 * _skin(0.6, 75, 58, 15, 7) + 0.2 * _burst(0.6, 100, 800, 25),
    "field snare": lambda: 0.9 * _burst(0.14, 1500, 7500, 28, 3400),
    "chip kick": lambda: 0.9 * np.sign(_skin(0.12, 400, 60, 35, 12)) * np.linspace(1, 0, int(0.12 * SAMPLE_RATE)),
    "chip noise": lambda: np.repeat(_burst(0.16, 200, 7000, 22, 3800)[::4], 4),
}  # fmt: skip


@cache
def hit(drum: str) -> np.ndarray:
    """One full-strength hit of `drum`."""
    return DRUM_SOUNDS[drum]().astype(np.float32)
