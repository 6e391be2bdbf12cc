"""The demo captions: what is true of a `Piece`, in many wordings, and MusicBench's control sentences."""

import re

import numpy as np

from examples.demo_music import MOODS, PITCHES, STYLES, Piece

LEAD_WORDS = {
    "piano": ("piano", "grand piano", "acoustic piano"),
    "harpsichord": ("harpsichord", "bright, brittle harpsichord"),
    "acoustic guitar": ("acoustic guitar", "steel-string guitar", "finger-picked acoustic guitar"),
    "distorted guitar": ("distorted electric guitar", "overdriven guitar", "fuzzy electric guitar"),
    "harp": ("harp", "plucked harp", "concert harp"),
    "banjo": ("banjo", "twangy banjo", "five-string banjo"),
    "sitar": ("sitar", "buzzing sitar", "Indian sitar"),
    "violin": ("violin", "solo violin", "bowed violin"),
    "cello": ("cello", "solo cello", "deep, bowed cello"),
    "flute": ("flute", "breathy flute", "airy flute"),
    "clarinet": ("clarinet", "woody clarinet", "hollow-sounding clarinet"),
    "trumpet": ("trumpet", "brassy trumpet", "solo trumpet"),
    "saxophone": ("saxophone", "tenor sax", "husky saxophone"),
    "whistle": ("whistler", "human whistle", "high, whistled voice"),
    "accordion": ("accordion", "wheezing accordion", "squeezebox"),
    "choir": ("choir", "wordless choir", "wordless vocal ensemble"),
    "organ": ("organ", "church-like organ", "sustained organ"),
    "electric piano": ("electric piano", "Rhodes piano", "bell-like electric piano"),
    "synth lead": ("synth lead", "analog synthesizer", "sawtooth synth"),
    "chip": ("square wave lead", "8-bit lead", "pulsing sound-chip voice"),
    "marimba": ("marimba", "wooden marimba", "wood-barred marimba"),
    "vibraphone": ("vibraphone", "shimmering vibraphone", "set of vibes"),
    "glockenspiel": ("glockenspiel", "tinkling glockenspiel", "set of tiny metallic chimes"),
    "bells": ("tolling bell", "church bell", "set of large bells"),
    "steel drum": ("steel drum", "steel pan", "tuned steel pan"),
}
CHORD_WORDS = {
    "piano": ("piano",), "electric piano": ("electric piano", "Rhodes"), "acoustic guitar": ("acoustic guitar",),
    "distorted guitar": ("distorted guitar", "overdriven guitar"), "organ": ("organ",),
    "strings": ("string ensemble", "strings"),
    "supersaw": ("wide sawtooth synth", "big trance-like synth"), "synth pad": ("soft synth pad", "warm pad"),
    "choir": ("choir", "choral voices"), "harp": ("harp",), "harpsichord": ("harpsichord",), "clavinet": ("clavinet",),
    "nylon guitar": ("nylon-string guitar", "classical guitar"), "accordion": ("accordion",), "chip": ("square wave",),
    "tuba": ("low brass",),
    "sitar": ("sitar", "tanpura-like string"), "steel drum": ("steel pan",), "marimba": ("marimba",),
}  # fmt: skip
TEXTURE_WORDS = {
    "comping": ("{} comping off the beat", "loose {} chords between the phrases"),
    "eighths": ("chugging {} chords", "steady {} chords on every eighth"),
    "chug": ("palm-muted {} riffing low down", "a wall of fast low {} riffs"),
    "stabs": ("syncopated {} stabs", "short {} chord hits"),
    "pad": ("long sustained {} chords", "{} held underneath"),
    "arpeggio": ("broken {} chords", "rolling {} arpeggios"),
    "fast arpeggio": ("very quick {} arpeggios", "rippling {} arpeggios"),
    "strum": ("strummed {}", "an open, strummed {} part"),
    "oompah": ("{} chords on the off-beats", "an oom-pah {} part"),
    "skank": ("choppy off-beat {} chords", "short {} chops between the beats"),
    "bossa": ("gently syncopated {} chords", "a lilting {} pattern"),
    "funk": ("choppy sixteenth-note {}", "a scratchy, rhythmic {} part"),
    "drone": ("a {} drone", "a ringing, unchanging {} drone"),
}
BASS_WORDS = {
    "upright bass": ("upright bass", "double bass", "plucked acoustic bass"),
    "electric bass": ("electric bass", "bass guitar"),
    "slap bass": ("slap bass", "popping slapped bass"),
    "synth bass": ("synth bass", "buzzing synthesizer bass"),
    "sub bass": ("sub bass", "very deep, round bass"),
    "tuba": ("tuba", "tuba playing the bass notes"),
}
DRUM_WORDS = {
    None: ("no drums", "no percussion at all", "nothing but pitched instruments"),
    "swing": ("swinging brushes and ride cymbal", "a swung ride cymbal"),
    "rock": ("a solid rock kit", "acoustic drums with kick, snare and hi-hat"),
    "double kick": ("relentless double-kick drumming", "blasting double bass drums"),
    "four on the floor": ("a four-on-the-floor kick with claps", "a thumping kick on every beat"),
    "tambourine": ("tambourine and hand claps", "claps and a tambourine"),
    "train beat": ("a shuffling brushed snare like a train", "a chugging train beat on the snare"),
    "one drop": ("a one-drop drum groove", "sparse drums that drop on the third beat"),
    "bossa": ("shaker and rim clicks", "a light shaker with a rim-click pattern"),
    "funk": ("tight syncopated funk drums", "a busy kit full of ghost notes"),
    "boom bap": ("a boom-bap beat", "a dusty, heavy kick and snare beat"),
    "breakbeat": ("a frantic breakbeat", "fast chopped break drums"),
    "chip drums": ("8-bit noise drums", "crunchy chip percussion"),
    "field drums": ("marching snare rolls and a bass drum", "a military snare with bass drum"),
    "tabla": ("tabla", "tabla hand drums"),
    "congas": ("congas and shaker", "Caribbean hand drums"),
}
MOOD_WORDS = {
    "happy": ("happy", "cheerful", "upbeat", "joyful", "sunny"),
    "sad": ("sad", "sorrowful", "melancholic", "mournful", "wistful"),
    "calm": ("calm", "mellow", "gentle", "relaxed", "peaceful"),
    "energetic": ("energetic", "lively", "high-energy", "driving", "vigorous"),
    "dark": ("dark", "ominous", "gloomy", "brooding", "menacing"),
    "dreamy": ("dreamy", "floating", "hazy", "ethereal", "otherworldly"),
    "romantic": ("romantic", "tender", "loving", "warm-hearted", "sentimental"),
    "playful": ("playful", "bouncy", "quirky", "mischievous", "light-hearted"),
    "aggressive": ("aggressive", "angry", "furious", "ferocious", "hard-hitting"),
    "mysterious": ("mysterious", "enigmatic", "eerie", "suspenseful", "secretive"),
    "triumphant": ("triumphant", "majestic", "heroic", "proud", "grand"),
}
STYLE_WORDS = {
    "jazz": ("jazz", "swing jazz", "small-combo jazz"), "rock": ("rock", "guitar rock", "classic rock"),
    "metal": ("metal", "heavy metal", "thrash metal"), "house": ("house", "electronic dance", "club house"),
    "ambient": ("ambient", "beatless ambient", "drifting ambient"), "classical": ("classical", "chamber music"),
    "baroque": ("baroque", "baroque court music"), "folk": ("folk", "acoustic folk", "traditional folk"),
    "country": ("country", "bluegrass-flavoured country"), "reggae": ("reggae", "roots reggae", "dub reggae"),
    "bossa nova": ("bossa nova", "Brazilian bossa"), "funk": ("funk", "groovy funk"),
    "hip hop": ("hip hop", "rap instrumental"),
    "drum and bass": ("drum and bass", "jungle"), "waltz": ("waltz", "ballroom waltz"),
    "chiptune": ("chiptune", "8-bit"),
    "march": ("march", "military march"), "raga": ("Indian classical", "raga"), "calypso": ("calypso", "Caribbean"),
}  # fmt: skip
PRODUCTION_WORDS = {
    "clean": ("The recording is clean and dry.", "Everything sounds close and clear.",
              "The mix is crisp, without echo."),
    "reverberant": ("It rings out in a large, echoing hall.", "Everything is drenched in reverb.",
                    "The sound is distant and reverberant."),
    "lo-fi": ("The recording is lo-fi, muffled and crackling.", "Vinyl crackle and a thin, old sound cover it.",
              "It sounds like a worn record, with clicks and hiss."),
}  # fmt: skip


def tempo_word(bpm: float | None, rng: np.random.Generator) -> str:
    """A word for the tempo that agrees with `bpm`."""
    if bpm is None:
        return str(rng.choice(["free", "beatless"]))
    for limit, words in ((82, ("slow", "unhurried")), (112, ("moderate", "medium")), (140, ("quick", "brisk"))):
        if bpm < limit:
            return str(rng.choice(words))
    return str(rng.choice(["fast", "rapid", "very fast"]))


def touch_words(piece: Piece) -> tuple[str, ...]:
    """Sentences on how the melody is played: note lengths, register, how busy it is."""
    feel = MOODS[piece.mood]
    words = []
    if feel.hold < 0.5:
        words += ["The notes are short and clipped.", "The melody is played staccato."]
    if feel.hold > 0.9:
        words += ["The notes are long and smoothly joined.", "The melody is played legato."]
    if feel.density == "sparse":
        words += ["Few notes are played, with room between them."]
    if feel.density == "dense":
        words += ["The melody is full of quick notes.", "It is busy and loud."]
    if feel.shift <= -5:
        words += ["The tune stays low in its register."]
    if feel.shift >= 5:
        words += ["The tune lies high in its register."]
    if feel.cutoff < 2300:
        words += ["The overall tone is dull and dark.", "High frequencies are subdued."]
    return tuple(words) or ("The tone is bright.", "The sound is open and bright.")


class _Speaker:
    """Draws wordings for one caption; `seen` keeps main and alternative caption from sharing them."""

    def __init__(self, piece: Piece, rng: np.random.Generator):
        self.piece, self.rng, self.seen = piece, rng, set()

    def pick(self, options) -> str:
        fresh = [o for o in options if o not in self.seen] or list(options)
        choice = fresh[self.rng.integers(len(fresh))]
        self.seen.add(choice)
        return choice

    def a(self, phrase: str) -> str:
        """The phrase with its indefinite article."""
        return f"{'an' if phrase[0].lower() in 'aeiou8' else 'a'} {phrase}"

    def parts(self) -> dict[str, str]:
        """One wording of every attribute."""
        p = self.piece
        return {
            "mood": self.pick(MOOD_WORDS[p.mood]),
            "style": self.pick(STYLE_WORDS[p.style]),
            "lead": self.pick(LEAD_WORDS[p.lead]),
            "chords": self.pick(TEXTURE_WORDS[STYLES[p.style].texture]).format(self.pick(CHORD_WORDS[p.chords])),
            "bass": self.pick(BASS_WORDS[p.bass]) if p.bass else "no bass",
            "drums": self.pick(DRUM_WORDS[p.drums]),
            "tempo": tempo_word(p.bpm, self.rng),
            "kind": self.pick(("piece", "track", "instrumental", "tune", "recording")),
        }


def _capitals(text: str) -> str:
    return re.sub(r"(^|\. )([a-z])", lambda match: match[1] + match[2].upper(), text)


def _prose(s: _Speaker) -> str:
    w = s.parts()
    opening = s.pick((
        f"{s.a(w['mood'])} {w['style']} {w['kind']} with {s.a(w['lead'])} as the main voice.",
        f"{s.a(w['lead'])} carries the melody of this {w['mood']} {w['style']} {w['kind']}.",
        f"This {w['style']} {w['kind']} is {w['mood']}; the melody belongs to {s.a(w['lead'])}.",
        f"The mood is {w['mood']}, the style {w['style']}, and {s.a(w['lead'])} plays the tune.",
        f"In this {w['tempo']} and {w['mood']} {w['style']} {w['kind']} one hears {s.a(w['lead'])} above all.",
        f"{s.a(w['tempo'])}, {w['mood']} {w['kind']}: {s.a(w['lead'])} leads {s.a(w['style'])} arrangement.",
    ))  # fmt: skip
    more = [
        s.pick((f"It is accompanied by {w['chords']}.",
                f"Behind it one hears {w['chords']}.", f"Underneath: {w['chords']}.")),
        s.pick((f"The rhythm comes from {w['drums']}.", f"One hears {w['drums']}.")) if s.piece.drums
        else s.pick((f"There is {w['drums']}.", f"It has {w['drums']}.")),
        s.pick(PRODUCTION_WORDS[s.piece.production]),
        s.pick(touch_words(s.piece)),
    ]  # fmt: skip
    if s.piece.bass:
        more.append(s.pick((f"{s.a(w['bass'])} holds the bottom.", f"The low end is {s.a(w['bass'])}.")))
    if s.piece.bpm:
        more.append(s.pick((f"The tempo is {w['tempo']}.", f"It moves at {s.a(w['tempo'])} pace.")))
    chosen = s.rng.permutation(len(more))[: s.rng.integers(2, 5)]
    return _capitals(" ".join([opening, *(more[i] for i in chosen)]))


def _terse(s: _Speaker) -> str:
    w = s.parts()
    extras = [w["chords"], w["drums"]] + ([w["bass"]] if s.piece.bass else [])
    s.rng.shuffle(extras)
    extras = extras[: s.rng.integers(1, 4)]
    band = ", ".join(extras[:-1]) + (" and " if len(extras) > 1 else "") + extras[-1]
    text = s.pick((
        f"{w['style']}: {w['lead']} over {band}. {w['mood']} and {w['tempo']}.",
        f"{w['mood']} {w['lead']} melody, {band}; {w['style']} at {s.a(w['tempo'])} tempo.",
        f"{w['lead']} with {band}, {w['mood']} in character, {w['style']} in style.",
        f"Someone plays {s.a(w['lead'])} in {s.a(w['mood'])} way, joined by {band}. The genre is {w['style']}.",
        f"Music of {s.a(w['mood'])} kind, {w['style']}, led by {w['lead']}, with {band}.",
        f"{s.a(w['tempo'])}-tempo {w['style']} {w['kind']} featuring {w['lead']} and {band}; it feels {w['mood']}."
        if s.piece.bpm else f"{s.a(w['style'])} {w['kind']} featuring {w['lead']} and {band}; it feels {w['mood']}.",
    ))  # fmt: skip
    if s.rng.random() < 0.4:
        text += " " + s.pick(touch_words(s.piece) + PRODUCTION_WORDS[s.piece.production])
    return _capitals(text)


def describe(piece: Piece, rng: np.random.Generator) -> tuple[str, str]:
    """Main and alternative caption of a piece: different wordings, each of a different choice of its attributes."""
    speaker = _Speaker(piece, rng)
    return _prose(speaker), _terse(speaker)


def chord_names(piece: Piece) -> tuple[list[str], list[float]]:
    """Names of the chords in order and the seconds at which they start, equal neighbours joined."""
    pairs = []
    for start, degree in piece.bars():
        root, third, fifth = (piece.pitch(degree + i) for i in (0, 2, 4))
        quality = {(3, 6): "dim", (3, 7): "m", (4, 7): ""}[(third - root, fifth - root)]
        name = PITCHES[root % 12] + quality
        if not pairs or pairs[-1][0] != name:
            pairs.append((name, round(start, 3)))
    return [name for name, _ in pairs], [start for _, start in pairs]


def controls(piece: Piece) -> dict[str, str]:
    """MusicBench's control sentences on tempo, key, chords, beat and volume; empty where there is nothing to say."""
    chords = ", ".join(chord_names(piece)[0])
    tonic, mode = piece.key
    volume = {
        "steady": "",
        "rising": "The volume grows little by little.",
        "falling": "The volume fades little by little.",
    }
    return {
        "prompt_aug": volume[piece.volume],
        "prompt_ch": f"The chord progression is {chords}.",
        "prompt_bt": f"There are {piece.meter} beats in a bar." if piece.bpm else "",
        "prompt_bpm": f"The tempo is {piece.bpm:.1f} beats per minute." if piece.bpm else "",
        "prompt_key": f"The key is {tonic} {mode}.",
    }


def with_controls(caption: str, piece: Piece, rng: np.random.Generator, count: int) -> str:
    """The caption followed by `count` of the piece's control sentences in random order (volume always)."""
    sentences = controls(piece)
    volume = sentences.pop("prompt_aug")
    heard = [sentence for sentence in sentences.values() if sentence]
    chosen = [heard[i] for i in rng.permutation(len(heard))[:count]]
    return " ".join([caption, *([volume] if volume else []), *chosen])
