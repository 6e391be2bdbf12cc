"""The demo music: pieces drawn at random from styles and moods, written out as notes and mixed to a waveform.

A `Piece` is everything that is true of a recording; `demo_captions.py` puts it into words, `render` into sound.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from examples.demo_instruments import SAMPLE_RATE, hit, noise, note

SECONDS = 10.0  # length of a MusicBench clip
PITCHES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PROGRESSIONS = {  # scale degrees, a bar each
    "major": ((0, 4, 5, 3), (0, 3, 4, 4), (0, 5, 1, 4), (0, 3, 0, 4)),
    "minor": ((0, 5, 2, 6), (0, 3, 4, 0), (0, 6, 5, 4), (0, 0, 3, 6)),
}

LEADS = {  # the middle of each lead instrument's register, as a MIDI pitch
    "piano": 72, "harpsichord": 70, "acoustic guitar": 64, "distorted guitar": 64, "harp": 72, "banjo": 67,
    "sitar": 62, "violin": 77, "cello": 50, "flute": 80, "clarinet": 65, "trumpet": 69, "saxophone": 60,
    "whistle": 84, "accordion": 71, "choir": 67, "organ": 70, "electric piano": 69, "synth lead": 72, "chip": 78,
    "marimba": 66, "vibraphone": 72, "glockenspiel": 91, "bells": 64, "steel drum": 73,
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """What a style asks of its band: tempo range (None: no beat), and the parts one may draw from."""

    bpm: tuple[int, int] | None
    leads: tuple[str, ...]
    chords: tuple[str, ...]
    texture: str
    basses: tuple[str | None, ...]
    bass_line: str
    drums: tuple[str | None, ...]
    moods: tuple[str, ...]
    meter: int = 4
    swing: bool = False


STYLES = {
    "jazz": Style((90, 170), ("saxophone", "trumpet", "piano", "vibraphone", "clarinet"),
        ("piano", "electric piano"), "comping", ("upright bass",), "walking", ("swing",),
        ("happy", "calm", "romantic", "playful", "sad"), swing=True),
    "rock": Style((105, 150), ("distorted guitar", "organ", "saxophone"),
        ("distorted guitar", "acoustic guitar", "organ"), "eighths", ("electric bass",), "eighths", ("rock",),
        ("energetic", "happy", "aggressive", "triumphant", "sad")),
    "metal": Style((135, 180), ("distorted guitar",),
        ("distorted guitar",), "chug", ("electric bass",), "eighths", ("double kick",),
        ("aggressive", "dark", "energetic")),
    "house": Style((118, 130), ("synth lead", "piano", "organ", "saxophone"),
        ("supersaw", "synth pad", "piano"), "stabs", ("synth bass", "sub bass"), "offbeat", ("four on the floor",),
        ("energetic", "happy", "dreamy", "mysterious")),
    "ambient": Style(None, ("choir", "bells", "synth lead", "flute", "vibraphone"),
        ("synth pad", "strings", "choir"), "pad", ("sub bass", None), "long", (None,),
        ("calm", "dreamy", "dark", "mysterious", "sad")),
    "classical": Style((70, 130), ("violin", "cello", "flute", "clarinet", "piano", "harp"),
        ("strings", "piano", "harp"), "arpeggio", (None,), "long", (None,),
        ("calm", "sad", "romantic", "playful", "triumphant", "dark")),
    "baroque": Style((80, 125), ("harpsichord", "violin", "organ", "flute"),
        ("harpsichord", "organ"), "arpeggio", (None,), "roots", (None,),
        ("happy", "sad", "triumphant", "playful")),
    "folk": Style((80, 125), ("acoustic guitar", "violin", "accordion", "whistle", "banjo"),
        ("acoustic guitar",), "strum", ("upright bass", None), "roots", ("tambourine", None),
        ("happy", "calm", "sad", "playful", "romantic")),
    "country": Style((105, 140), ("banjo", "violin", "acoustic guitar"),
        ("acoustic guitar",), "oompah", ("upright bass",), "oompah", ("train beat",),
        ("happy", "playful", "energetic", "sad")),
    "reggae": Style((70, 92), ("organ", "trumpet", "steel drum", "electric piano"),
        ("organ", "clavinet", "electric piano"), "skank", ("sub bass", "electric bass"), "reggae", ("one drop",),
        ("happy", "calm", "sad", "mysterious")),
    "bossa nova": Style((100, 135), ("flute", "saxophone", "piano", "vibraphone"),
        ("nylon guitar",), "bossa", ("upright bass",), "bossa", ("bossa",),
        ("calm", "romantic", "happy", "sad")),
    "funk": Style((95, 118), ("electric piano", "trumpet", "saxophone", "organ"),
        ("clavinet", "electric piano"), "funk", ("slap bass",), "funk", ("funk",),
        ("energetic", "happy", "playful")),
    "hip hop": Style((76, 96), ("electric piano", "vibraphone", "flute", "piano"),
        ("electric piano", "piano", "strings"), "stabs", ("sub bass", "upright bass"), "roots", ("boom bap",),
        ("calm", "dark", "sad", "mysterious", "dreamy")),
    "drum and bass": Style((165, 178), ("synth lead", "choir", "bells"),
        ("synth pad", "supersaw", "strings"), "pad", ("synth bass", "sub bass"), "long", ("breakbeat",),
        ("energetic", "dark", "dreamy", "aggressive")),
    "waltz": Style((120, 170), ("accordion", "violin", "clarinet", "piano"),
        ("accordion", "strings", "piano"), "oompah", ("tuba", "upright bass"), "oompah", (None,),
        ("romantic", "happy", "playful", "sad"), meter=3),
    "chiptune": Style((120, 165), ("chip",),
        ("chip",), "fast arpeggio", ("synth bass",), "eighths", ("chip drums", None),
        ("playful", "energetic", "happy", "triumphant", "dark")),
    "march": Style((100, 124), ("trumpet", "whistle", "clarinet", "flute"),
        ("strings", "tuba"), "oompah", ("tuba",), "oompah", ("field drums",),
        ("triumphant", "happy", "playful", "dark")),
    "raga": Style((70, 120), ("sitar", "flute", "violin"),
        ("sitar",), "drone", (None,), "long", ("tabla",),
        ("calm", "mysterious", "dreamy", "sad", "energetic")),
    "calypso": Style((100, 130), ("steel drum", "marimba", "trumpet"),
        ("steel drum", "marimba", "nylon guitar"), "skank", ("electric bass",), "oompah", ("congas",),
        ("happy", "playful", "energetic", "romantic")),
}  # fmt: skip


@dataclass(frozen=True)
class Mood:
    """What a mood does to the music, whatever the style."""

    major: float  # how often the mode is major
    tempo: float  # place within the style's tempo range, 0 slowest
    shift: int  # semitones that the melody moves
    hold: float  # share of each melody note's time that it sounds: under 0.5 staccato, over 0.9 legato
    cutoff: float  # Hz, low-pass on the whole mix
    level: float  # peak of the finished clip
    density: str  # how busy the melody is


MOODS = {
    "happy": Mood(1.0, 0.7, 2, 0.75, 8000, 0.70, "medium"),
    "sad": Mood(0.0, 0.1, -3, 1.0, 2200, 0.40, "sparse"),
    "calm": Mood(0.9, 0.1, 0, 1.0, 1800, 0.25, "sparse"),
    "energetic": Mood(0.6, 1.0, 2, 0.7, 8000, 0.95, "dense"),
    "dark": Mood(0.0, 0.3, -12, 0.95, 1300, 0.60, "sparse"),
    "dreamy": Mood(0.8, 0.3, 7, 1.0, 3500, 0.45, "sparse"),
    "romantic": Mood(0.9, 0.2, 0, 1.0, 3000, 0.45, "medium"),
    "playful": Mood(1.0, 0.8, 10, 0.35, 8000, 0.60, "medium"),
    "aggressive": Mood(0.0, 0.9, -5, 0.6, 8000, 0.98, "dense"),
    "mysterious": Mood(0.0, 0.4, -2, 0.5, 2600, 0.40, "sparse"),
    "triumphant": Mood(1.0, 0.6, 5, 0.95, 8000, 0.90, "medium"),
}
RHYTHMS = {  # beats; a bar is filled from these
    "sparse": (2.0, 1.5, 1.0, 2.0),
    "medium": (1.0, 0.5, 0.5, 1.5, 1.0),
    "dense": (0.5, 0.5, 0.25, 0.25, 0.5, 1.0),
}

DRUMS = {  # sixteenth notes: X strong, x normal, . rest; a pattern shorter than the bar repeats
    "swing": {"ride": "X...x.x.", "brush": "....X...", "kick": "x......."},
    "rock": {"kick": "X.....x.X.......", "snare": "....X...", "hat": "X.x.", "crash": "X" + "." * 63},
    "double kick": {"kick": "XX", "snare": "....X...", "crash": "X......."},
    "four on the floor": {"kick": "X...", "open hat": "..X.", "clap": "....X...", "shaker": "x"},
    "tambourine": {"tambourine": "..x...X.", "clap": "....X..."},
    "train beat": {"brush": "XxxxXxXx", "kick": "X.......", "hat": "....x..."},
    "one drop": {"deep kick": "........X.......", "rim": "........X.......", "hat": "X.x."},
    "bossa": {"rim": "X..X..X...X..X..", "shaker": "Xxxx", "kick": "x..xX..x"},
    "funk": {"kick": "X..X......X..x..", "snare": "....X..x.x..X..x", "hat": "Xxxx", "open hat": "..............X."},
    "boom bap": {"deep kick": "X......x..X.....", "snare": "....X...", "hat": "X.x."},
    "breakbeat": {"kick": "X.X.......XX....", "snare": "....X..x.x..X..x", "ride": "X.x."},
    "chip drums": {"chip kick": "X.......", "chip noise": "..x.X.x."},
    "field drums": {"bass drum": "X.......", "field snare": "X..xX.xxX..xXxxx"},
    "tabla": {"baya": "X.....X.", "tabla": "X.xxX.x.X.x.Xxx."},
    "congas": {"conga": "X.....xxX.....x.", "high conga": "..xX....", "shaker": "X.x."},
}
TEXTURES = {  # sixteenths at which the chords sound, as above
    "comping": "..X....x......X.", "eighths": "X.x.", "chug": "Xx", "stabs": "X..X..X.........", "strum": "X..xX.xx",
    "skank": "..X.", "bossa": "X..X..X...X..X..", "funk": "X..x.xX..x.X..x.", "oompah": "..X.",
}  # fmt: skip
BASS_LINES = {
    "walking": "X...", "eighths": "X.", "offbeat": "..X.", "long": "X" + "." * 15, "roots": "X.......",
    "oompah": "X.......",
    "reggae": "X..x..X.......x.", "bossa": "X.....XX", "funk": "X..X..x.X.x..X.x",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """All that is true of one recording. `bpm` is None where there is no beat; `transpose` is in semitones."""

    seed: int
    style: str
    mood: str
    lead: str
    chords: str
    bass: str | None
    drums: str | None
    production: str  # "clean", "reverberant" or "lo-fi"
    bpm: float | None
    tonic: int
    mode: str
    progression: tuple[int, ...]
    transpose: int = 0
    volume: str = "steady"  # or "rising", "falling"
    seconds: float = SECONDS

    @property
    def key(self) -> tuple[str, str]:
        """Name of the tonic as it sounds, and the mode."""
        return PITCHES[(self.tonic + self.transpose) % 12], self.mode

    @property
    def meter(self) -> int:
        """Beats in a bar."""
        return STYLES[self.style].meter

    @property
    def beat_seconds(self) -> float:
        """Length of a beat; music without a beat moves once a second."""
        return 60 / self.bpm if self.bpm else 1.0

    def bars(self) -> list[tuple[float, int]]:
        """(start in seconds, scale degree of the chord) of every bar."""
        length = self.meter * self.beat_seconds
        return [(i * length, self.progression[i % 4]) for i in range(int(np.ceil(self.seconds / length - 1e-9)))]

    def pitch(self, degree: int, octave: int = 0) -> int:
        """MIDI pitch of a degree of the scale (0 the tonic; may be negative or over 6); octave 0 is C4 to B4."""
        return 60 + 12 * (octave + degree // 7) + self.tonic + self.transpose + SCALES[self.mode][degree % 7]


def draw_piece(rng: np.random.Generator) -> Piece:
    """A random piece: a style, a mood the style allows, and a band that half the time breaks with custom."""
    name = str(rng.choice(list(STYLES)))
    style = STYLES[name]
    mood = str(rng.choice(style.moods))
    feel = MOODS[mood]
    bpm = None
    if style.bpm:
        place = np.clip(feel.tempo + rng.uniform(-0.2, 0.2), 0, 1)
        bpm = float(round(style.bpm[0] + place * (style.bpm[1] - style.bpm[0])))
    mode = "major" if rng.random() < feel.major else "minor"
    progressions = PROGRESSIONS[mode]
    return Piece(
        seed=int(rng.integers(2**31)),
        style=name,
        mood=mood,
        lead=str(rng.choice(style.leads if rng.random() < 0.5 else list(LEADS))),
        chords=str(rng.choice(style.chords)),
        bass=style.basses[rng.integers(len(style.basses))],
        drums=style.drums[rng.integers(len(style.drums))],
        production=str(rng.choice(["clean", "reverberant", "lo-fi"], p=[0.6, 0.25, 0.15])),
        bpm=bpm,
        tonic=int(rng.integers(-5, 7)),
        mode=mode,
        progression=progressions[rng.integers(len(progressions))],
    )


def _steps(pattern: str, piece: Piece):
    """(start in seconds, strength) of every mark of a pattern of sixteenths, over the whole piece."""
    swing = STYLES[piece.style].swing
    length = piece.meter * 4
    for start, _ in piece.bars():
        # a pattern longer than a bar (a crash every four bars) goes on over the bar line
        first = round(start / piece.beat_seconds * 4) if len(pattern) > length else 0
        for step in range(length):
            mark = pattern[(first + step) % len(pattern)]
            if mark != ".":
                late = 1 / 6 if swing and step % 4 == 2 else 0.0
                yield start + (step / 4 + late) * piece.beat_seconds, 1.0 if mark == "X" else 0.55


def _melody(piece: Piece):
    """Notes (voice, pitch, start, seconds, strength) of the lead: a two-bar motif that follows the chords."""
    rng = np.random.default_rng(piece.seed)
    feel = MOODS[piece.mood]
    centre = round((LEADS.get(piece.lead, 67) + feel.shift - 60) * 7 / 12)
    motif = []  # (beat within two bars, length in beats, walk)
    beat, walk = 0.0, 0
    while beat < 2 * piece.meter:
        length = min(float(rng.choice(RHYTHMS[feel.density])), 2 * piece.meter - beat)
        walk = int(np.clip(walk + rng.choice([-2, -1, -1, 0, 1, 1, 2]), -4, 4))
        motif.append((beat, length, walk))
        beat += length
    bars = piece.bars()
    for index, (start, chord) in enumerate(bars):
        for beat, length, walk in motif:
            if beat // piece.meter != index % 2:
                continue
            degree = centre + walk + (index // 2 % 2 if index % 2 else 0)
            while beat % 1 == 0 and (degree - chord) % 7 not in (0, 2, 4):
                degree -= 1  # a chord tone on the beat
            at = start + beat % piece.meter * piece.beat_seconds
            seconds = max(0.08, length * piece.beat_seconds * feel.hold)
            yield piece.lead, piece.pitch(degree), at, seconds, 1.0 if beat % 1 == 0 else 0.8


def _harmony(piece: Piece):
    """Notes of the accompanying instrument, in the style's texture."""
    texture = STYLES[piece.style].texture
    beat = piece.beat_seconds
    for start, chord in piece.bars():
        triad = [0, 4, 7] if texture == "drone" else [chord, chord + 2, chord + 4]
        triad = [d - 7 if d > 6 and texture != "drone" else d for d in triad]
        octave = -1 if texture in ("drone", "chug") else 0
        pitches = [piece.pitch(d, octave) for d in triad]
        if texture == "pad":
            yield from ((piece.chords, p, start, piece.meter * beat, 0.7) for p in pitches)
        elif texture == "drone":
            for i, p in enumerate([pitches[1], pitches[2], pitches[2], pitches[0]]):
                yield piece.chords, p - 12 * (i == 3), start + i * beat, 2 * beat, 0.7
        elif texture.endswith("arpeggio"):
            per_beat = 4 if texture == "fast arpeggio" else 2
            for i in range(piece.meter * per_beat):
                yield piece.chords, pitches[(0, 1, 2, 1)[i % 4]], start + i * beat / per_beat, beat / per_beat, 0.8
    if texture in TEXTURES:
        yield from _strokes(piece, texture)


def _strokes(piece: Piece, texture: str):
    """Whole chords on the texture's rhythm: strummed, chugged, stabbed."""
    bars = piece.bars()
    bar_seconds = piece.meter * piece.beat_seconds
    pattern = "....X...X..." if piece.meter == 3 and texture == "oompah" else TEXTURES[texture]
    held = {"chug": 0.2, "skank": 0.3, "funk": 0.22, "oompah": 0.4, "strum": 1.2, "stabs": 0.6}.get(texture, 0.5)
    for at, strength in _steps(pattern, piece):
        chord = bars[int(at / bar_seconds + 1e-6)][1]
        degrees = (chord, chord + 4, chord + 7) if texture == "chug" else (chord, chord + 2, chord + 4, chord + 7)
        for i, degree in enumerate(degrees):
            pitch = piece.pitch(degree, -2 if texture == "chug" else -1)
            late = 0.012 * i if texture == "strum" else 0.0
            yield piece.chords, pitch, at + late, held * piece.beat_seconds, 0.6 * strength


def _bass(piece: Piece):
    """Notes of the bass, below everything else."""
    line = STYLES[piece.style].bass_line
    bars = piece.bars()
    beat = piece.beat_seconds
    bar_seconds = piece.meter * beat
    pattern = "X..........." if piece.meter == 3 else BASS_LINES[line]
    held = {"walking": 0.9, "eighths": 0.45, "offbeat": 0.4, "long": piece.meter * 0.95, "roots": 1.6}.get(line, 0.7)
    for count, (at, strength) in enumerate(_steps(pattern, piece)):
        chord = bars[int(at / bar_seconds + 1e-6)][1]
        degree = chord
        if line == "walking":
            degree = chord + (0, 2, 4, 5)[count % 4]
        elif line == "oompah" and piece.meter == 4:
            degree = chord + (0, -3)[count % 2]
        yield piece.bass, piece.pitch(degree, -2), at, held * beat, strength


def _play(notes, n: int) -> np.ndarray:
    """One part of the mix: (n,) samples at unit RMS while it plays."""
    part = np.zeros(n, dtype=np.float32)
    for voice, pitch, at, seconds, strength in notes:
        start = int(at * SAMPLE_RATE)
        sound = note(voice, pitch, max(1, round(seconds * 100)))[: max(0, n - start)]
        part[start : start + len(sound)] += strength * sound
    return part / np.sqrt(np.mean(part[part != 0] ** 2) + 1e-9)


def _drums(piece: Piece, n: int) -> np.ndarray:
    part = np.zeros(n, dtype=np.float32)
    for drum, pattern in DRUMS[piece.drums].items():
        for at, strength in _steps(pattern, piece):
            start = int(at * SAMPLE_RATE)
            sound = hit(drum)[: max(0, n - start)]
            part[start : start + len(sound)] += strength * sound
    return part


@lru_cache(maxsize=8)
def _reverb(padded: int) -> np.ndarray:
    """Spectrum of a hall: 1.6 s of exponentially falling noise."""
    tail = noise(1.6, 200, 4500, 4242) * np.exp(-3.5 * np.arange(int(1.6 * SAMPLE_RATE)) / SAMPLE_RATE)
    return np.fft.rfft(tail / np.sqrt(np.sum(tail**2)), padded)


def _finish(mix: np.ndarray, piece: Piece) -> np.ndarray:
    """Tone, room, crackle, volume and level of the finished clip, (channels, samples) in and out."""
    feel, n = MOODS[piece.mood], mix.shape[-1]
    padded = 1 << (n + 2 * SAMPLE_RATE).bit_length()
    spectrum = np.fft.rfft(mix, padded)
    hertz = np.fft.rfftfreq(padded, 1 / SAMPLE_RATE)
    spectrum = spectrum / (1 + (hertz / feel.cutoff) ** 2)
    if piece.production == "reverberant":
        spectrum = spectrum * (0.6 + 1.1 * _reverb(padded))
    if piece.production == "lo-fi":
        spectrum = spectrum / (1 + (250 / np.maximum(hertz, 1)) ** 4) / (1 + (hertz / 2600) ** 6)
    out = np.fft.irfft(spectrum, padded)[:, :n]
    out /= np.abs(out).max() + 1e-9
    if piece.production == "lo-fi":
        rng = np.random.default_rng(piece.seed + 1)
        clicks = np.zeros(n)
        clicks[rng.integers(0, n, int(25 * piece.seconds))] = rng.uniform(-0.5, 0.5, int(25 * piece.seconds))
        out = 0.85 * out + 0.25 * clicks + 0.012 * rng.standard_normal(n)
    if piece.volume != "steady":
        ramp = np.linspace(0.15, 1.0, n)
        out = out * (ramp if piece.volume == "rising" else ramp[::-1])
    return (feel.level * out / np.abs(out).max()).astype(np.float32)


def render(piece: Piece, channels: int = 1) -> np.ndarray:
    """(channels, samples) float32 at 16 kHz; in stereo the melody sits left of the middle, the chords right."""
    n = int(piece.seconds * SAMPLE_RATE)
    parts = [(1.0, -0.3, _play(_melody(piece), n)), (0.5, 0.4, _play(_harmony(piece), n))]
    parts = [(g, p, np.tanh(3 * x) if v == "distorted guitar" else x)
             for (g, p, x), v in zip(parts, (piece.lead, piece.chords), strict=True)]  # fmt: skip
    if piece.bass:
        parts.append((0.7, 0.0, _play(_bass(piece), n)))
    if piece.drums:
        parts.append((1.1, 0.0, _drums(piece, n)))
    sides = (0.0,) if channels == 1 else (-1.0, 1.0)
    return _finish(np.stack([sum(g * (1 + side * p) * x for g, p, x in parts) for side in sides]), piece)
