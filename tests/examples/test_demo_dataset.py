import gzip
import io
import json
import re
import tarfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile

from common.errors import UserError
from examples import demo_captions, demo_instruments, demo_music, make_demo_dataset
from examples.demo_captions import chord_names, describe, tempo_word
from examples.demo_instruments import SAMPLE_RATE
from examples.demo_music import MOODS, PITCHES, SCALES, STYLES, Piece, draw_piece, render

ABSENT_WORDS = ("lullaby", "soothing", "haunted", "arcade", "nightclub", "spooky", "soldiers", "headbanging", "parade")


def piece(**changes) -> Piece:
    base = Piece(
        seed=5, style="rock", mood="energetic", lead="trumpet", chords="organ", bass="electric bass", drums="rock",
        production="clean", bpm=120.0, tonic=0, mode="major", progression=(0, 3, 0, 4),
    )  # fmt: skip
    return replace(base, **changes)


@cache
def drawn(count: int, seed: int = 3) -> tuple[Piece, ...]:
    rng = np.random.default_rng(seed)
    return tuple(draw_piece(rng) for _ in range(count))


def onset_strength_at(sound: np.ndarray, bpm: float) -> float:
    """Autocorrelation of the onset envelope at a beat's distance, as a share of its value at distance 0."""
    hop = 160
    onsets = librosa.onset.onset_strength(y=sound, sr=SAMPLE_RATE, hop_length=hop)
    onsets = onsets - onsets.mean()
    lag = 60 / bpm * SAMPLE_RATE / hop
    around = [int(lag) - 1, int(lag), int(lag) + 1, int(lag) + 2]
    return max(float(np.dot(onsets[:-k], onsets[k:])) for k in around) / float(np.dot(onsets, onsets))


def centroid(sound: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(sound)) ** 2
    return float((power * np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE)).sum() / power.sum())


@pytest.mark.parametrize("bpm", [84.0, 120.0, 155.0])
def test_the_tempo_is_heard(bpm):
    sound = render(piece(bpm=bpm))[0]
    right = onset_strength_at(sound, bpm)
    wrong = [onset_strength_at(sound, bpm * factor) for factor in (0.83, 0.9, 1.1, 1.2)]
    assert right > 0.3
    assert right > 1.2 * max(wrong)


def test_the_key_is_heard():
    shares, right = [], 0
    pieces = [p for p in drawn(60) if p.bpm and p.lead not in ("bells", "distorted guitar")][:24]
    for p in pieces:
        sound = render(replace(p, drums=None, production="clean"))[0]
        chroma = librosa.feature.chroma_cqt(y=sound, sr=SAMPLE_RATE).mean(axis=1)
        tonic = PITCHES.index(p.key[0])
        shares.append(chroma[[(tonic + s) % 12 for s in SCALES[p.mode]]].sum() / chroma.sum())
        fits = [chroma[[(t + s) % 12 for s in SCALES[p.mode]]].sum() for t in range(12)]
        # a key's nearest relatives share all but one note with it
        right += (int(np.argmax(fits)) - tonic) % 12 in (0, 5, 7)
    assert np.mean(shares) > 0.72  # 7 of 12 would be 0.58
    assert right >= 0.8 * len(pieces)


def test_every_note_is_in_the_key():
    for p in drawn(60):
        tonic = PITCHES.index(p.key[0])
        allowed = {(tonic + step) % 12 for step in SCALES[p.mode]}
        notes = [*demo_music._melody(p), *demo_music._harmony(p), *(demo_music._bass(p) if p.bass else ())]
        assert {pitch % 12 for _, pitch, *_ in notes} <= allowed


@pytest.mark.parametrize("style", sorted(name for name, style in STYLES.items() if style.drums != (None,)))
def test_drums_are_heard(style):
    kit = next(d for d in STYLES[style].drums if d)
    p = next(p for p in drawn(600) if p.style == style and p.bpm)
    p = replace(p, production="clean", mood="happy", drums=kit)
    p = replace(p, lead="flute")  # a lead without hard onsets of its own
    shares = []
    for drums in (kit, None):
        spectrum = np.abs(librosa.stft(render(replace(p, drums=drums))[0], n_fft=1024, hop_length=256))
        percussive = librosa.decompose.hpss(spectrum)[1]
        shares.append((percussive**2).sum() / (spectrum**2).sum())
    assert shares[0] > 1.2 * shares[1]


def test_moods_change_brightness_level_register_and_note_length():
    by_mood = {mood: [render(piece(mood=mood, seed=s))[0] for s in range(3)] for mood in MOODS}
    bright = {mood: np.mean([centroid(x) for x in sounds]) for mood, sounds in by_mood.items()}
    loud = {mood: np.mean([x.std() for x in sounds]) for mood, sounds in by_mood.items()}
    assert min(bright["happy"], bright["energetic"]) > 1.3 * max(bright["calm"], bright["dark"])
    assert loud["energetic"] > 2 * loud["calm"]
    notes = {mood: list(demo_music._melody(piece(mood=mood))) for mood in MOODS}
    pitch = {mood: np.mean([n[1] for n in played]) for mood, played in notes.items()}
    assert pitch["playful"] > pitch["happy"] > pitch["dark"]
    assert len(notes["energetic"]) > 1.5 * len(notes["calm"])


def test_production_is_heard():
    plain, old = (render(piece(production=p))[0] for p in ("clean", "lo-fi"))
    spectrum = [np.abs(np.fft.rfft(x)) ** 2 for x in (plain, old)]
    low = slice(0, 120 * 10)  # the clip's bins are 0.1 Hz wide
    share = [s[low].sum() / s.sum() for s in spectrum]
    assert share[1] < 0.3 * share[0]  # the old record has no deep bass
    gaps = []  # the level between short off-beat chords, as a share of the mean
    for production in ("clean", "reverberant"):
        p = piece(style="reggae", drums=None, bass=None, bpm=72.0, mood="playful", production=production)
        level = librosa.feature.rms(y=render(p)[0], frame_length=512, hop_length=256)[0]
        gaps.append(np.percentile(level, 10) / level.mean())
    assert gaps[0] < 0.05
    assert gaps[1] > 0.15  # the hall fills them


def test_lead_instruments_differ():
    """A note's timbre (MFCC over time) is nearest to the same instrument's two semitones lower."""

    def timbre(voice, pitch):
        sound = demo_instruments.note(voice, pitch, 60)[:9600]
        return librosa.feature.mfcc(y=sound / sound.std(), sr=SAMPLE_RATE, n_mfcc=13, n_mels=40, hop_length=480).ravel()

    voices = list(demo_music.LEADS)
    known = np.stack([timbre(v, 67) for v in voices])
    again = np.stack([timbre(v, 69) for v in voices])
    nearest = [int(np.argmin(((known - x) ** 2).mean(axis=1))) for x in again]
    assert np.mean([n == i for i, n in enumerate(nearest)]) >= 0.9


def test_copies_change_what_their_number_says():
    p = piece()
    slow, fast = make_demo_dataset.copy_of(p, 1), make_demo_dataset.copy_of(p, 4)
    assert (slow.bpm, fast.bpm) == (96.0, 144.0)
    assert render(fast).shape[1] < render(p).shape[1] == render(slow).shape[1] == 160_000
    for copy in (slow, fast):
        sound = render(copy)[0]
        assert onset_strength_at(sound, copy.bpm) > 2 * onset_strength_at(sound, p.bpm)
    up = make_demo_dataset.copy_of(p, 9)
    assert up.key == ("D", "major")
    assert [n[1] for n in demo_music._melody(up)] == [n[1] + 2 for n in demo_music._melody(p)]
    chroma = [librosa.feature.chroma_cqt(y=render(replace(x, drums=None))[0], sr=SAMPLE_RATE).mean(1) for x in (p, up)]
    turns = [np.corrcoef(np.roll(chroma[0], k), chroma[1])[0, 1] for k in range(12)]
    assert int(np.argmax(turns)) == 2


@pytest.mark.parametrize(("seed", "ratio"), [(1, 1), (2, -1)])
def test_the_volume_copy_grows_or_fades(seed, ratio):
    copy = make_demo_dataset.copy_of(piece(seed=seed), 11)
    sound = render(copy)[0]
    third = len(sound) // 3
    change = np.log(sound[-third:].std() / sound[:third].std())
    assert ratio * change > np.log(1.8)
    words = demo_captions.controls(copy)["prompt_aug"]
    assert ("grows" in words) == (ratio == 1)


def test_copies_refused():
    with pytest.raises(ValueError, match="no tempo"):
        make_demo_dataset.copy_of(piece(bpm=None), 2)
    with pytest.raises(ValueError, match="1 to 11"):
        make_demo_dataset.copy_of(piece(), 12)


def test_tempo_words_agree_with_the_tempo():
    rng = np.random.default_rng(0)
    assert {tempo_word(70, rng) for _ in range(30)} == {"slow", "unhurried"}
    assert {tempo_word(150, rng) for _ in range(50)} == {"fast", "rapid", "very fast"}
    assert {tempo_word(None, rng) for _ in range(30)} == {"free", "beatless"}


def test_captions_are_true_varied_and_leave_words_for_queries():
    rng = np.random.default_rng(0)
    seen = set()
    for p in drawn(400):
        main, alt = describe(p, rng)
        seen |= {main, alt}
        for text in (main, alt):
            low = text.lower()
            assert any(w.lower() in low for w in demo_captions.LEAD_WORDS[p.lead]), text
            assert any(w.lower() in low for w in demo_captions.STYLE_WORDS[p.style]), text
            assert any(w in low for w in demo_captions.MOOD_WORDS[p.mood]), text
            assert not any(word in low for word in ABSENT_WORDS), text
            assert not re.search(
                r"\ba (?!one)[aeiou8]|\ban [^aeiou8]|  |\. [a-z]|None", text.replace("Indian", "indian")
            ), text
            if p.drums is None:
                assert not any(w.lower() in low for d, ws in demo_captions.DRUM_WORDS.items() if d for w in ws), text
        assert main != alt
    assert len(seen) > 790


def test_every_attribute_that_can_be_drawn_has_words():
    for style in STYLES.values():
        assert set(style.leads) <= set(demo_captions.LEAD_WORDS) == set(demo_music.LEADS)
        assert set(style.chords) <= set(demo_captions.CHORD_WORDS)
        assert {*style.chords, *style.leads} <= set(demo_instruments.VOICES)
        assert set(style.basses) - {None} <= set(demo_captions.BASS_WORDS)
        assert set(style.drums) <= set(demo_captions.DRUM_WORDS)
        assert set(style.moods) <= set(MOODS) == set(demo_captions.MOOD_WORDS)


def test_chord_names():
    assert chord_names(piece(progression=(0, 3, 4, 0), bpm=120.0, seconds=8.0)) == (
        ["C", "F", "G", "C"],
        [0.0, 2.0, 4.0, 6.0],
    )
    assert chord_names(piece(mode="minor", tonic=-3, progression=(0, 0, 5, 5), seconds=8.0))[0] == ["Am", "F"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "set"
    assert make_demo_dataset.main(["--out", str(out), "--sources", "11", "--test", "4", "--workers", "2"]) == 0
    return out


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_layout_is_musicbench(small):
    assert sorted(p.name for p in small.iterdir()) == sorted(make_demo_dataset.NAMES)
    train, test_a, test_b = (read_rows(small / name) for name in make_demo_dataset.NAMES[:3])
    # the columns of MusicBench, in its order
    names = "dataset location main_caption alt_caption prompt_aug prompt_ch prompt_bt prompt_bpm prompt_key beats bpm"
    columns = [*names.split(), "chords", "chords_time", "key", "keyprob", "is_audioset_eval_mcaps"]
    assert all(list(line) == columns for line in train + test_a + test_b)
    with tarfile.open(small / "MusicBench.tar.gz") as tar:
        sizes = {m.name: m.size for m in tar}
        clip = soundfile.read(io.BytesIO(tar.extractfile("datashare/" + test_a[0]["location"]).read()))
        odd = [soundfile.info(io.BytesIO(tar.extractfile(n).read())) for n in sizes]
    assert clip[0].shape == (160_000,)
    assert clip[1] == 16_000
    assert {i.samplerate for i in odd} == {16_000, 22_050}
    assert {f"datashare/{line['location']}" for line in train + test_a} == set(sizes)
    assert len(sizes) == 11 * 2 + 4
    assert len(train) == 11 * 2 + 1  # one recording has a second row
    for name in sizes:
        assert re.fullmatch(r"datashare/(data/[\w-]{11}|data_aug2/[\w-]{11}_([1-9]|1[01]))\.wav", name)
    sources = [{Path(line["location"]).stem[:11] for line in rows} for rows in (train, test_a)]
    assert not sources[0] & sources[1]
    assert [line["location"] for line in test_a] == [line["location"] for line in test_b]
    for a, b in zip(test_a, test_b, strict=True):
        assert b["main_caption"].startswith(a["main_caption"])
        assert a["prompt_key"] in b["main_caption"]


def test_bytes_depend_on_the_seed_alone(small, tmp_path):
    arguments = ["--sources", "11", "--test", "4"]
    make_demo_dataset.main(["--out", str(tmp_path / "one"), *arguments, "--workers", "1"])
    make_demo_dataset.main(["--out", str(tmp_path / "other"), *arguments, "--workers", "1", "--seed", "1"])
    for name in make_demo_dataset.NAMES:
        assert (tmp_path / "one" / name).read_bytes() == (small / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (small / name).read_bytes()
    with gzip.open(small / "MusicBench.tar.gz") as packed:
        assert packed.read(1)
        assert packed.mtime == 0


def test_more_sources_leave_the_test_recordings_alone():
    few, many = (make_demo_dataset.plan(sources, 20, 0, 1)[1] for sources in (3, 30))
    assert few == many


def test_captions_tell_the_test_recordings_apart():
    _, held_out = make_demo_dataset.plan(1, 64, 0, 0)
    facts = [(c.piece.style, c.piece.lead, c.piece.mood) for c in held_out]
    assert len(set(facts)) >= 62
    assert len({c.location for c in held_out}) == 64


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--copies: expected 0 to 7, found 8"):
        make_demo_dataset.main(["--out", str(tmp_path), "--copies", "8"])
    with pytest.raises(UserError, match=r"--test: expected 1 or more, found 0"):
        make_demo_dataset.main(["--out", str(tmp_path), "--test", "0"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder that can be written"):
        make_demo_dataset.main(["--out", str(tmp_path / "file"), "--sources", "1", "--test", "1"])
