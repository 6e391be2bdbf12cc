import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from common.errors import UserError
from examples import make_demo_library
from examples.demo_music import STYLES, draw_piece
from examples.make_demo_dataset import plan, wav_bytes
from music_library.music_folder import MusicFolder, read_tags


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "music"
    assert make_demo_library.main(["--out", str(out), "--test", "10", "--more", "2", "--workers", "2"]) == 0
    return out


def test_the_folder_holds_the_test_recordings_bit_for_bit_and_more(library):
    held_out = plan(3, 10, 0, 2)[1]
    files = sorted(library.rglob("*.flac"), key=lambda path: path.name)
    assert len(files) == len(list(MusicFolder(library))) == 12
    for path, clip in zip(files, held_out, strict=False):
        expected, rate = soundfile.read(io.BytesIO(wav_bytes(clip)), dtype="int16")
        found, found_rate = soundfile.read(path, dtype="int16")
        assert found_rate == rate
        assert np.array_equal(found, expected)
        assert path.parent.name == clip.piece.style


def test_tags_say_what_is_heard(library):
    path = next(library.rglob("002 *.flac"))
    tags = read_tags(path)
    assert tags.title == path.stem[4:] == "Happy calypso with steel drum"
    assert tags.artist == "steel drum, nylon-string guitar, electric bass, congas and shaker"
    assert tags.duration == 10


def test_every_piece_has_a_title_and_players():
    rng = np.random.default_rng(0)
    for piece in (draw_piece(rng) for _ in range(200)):
        assert make_demo_library.title(piece).startswith(f"{piece.mood.capitalize()} {piece.style} with ")
        players = make_demo_library.artist(piece).split(", ")
        assert len(set(players)) == len(players) >= 1
    same = replace(piece, lead="organ", chords="organ", bass=None, drums=None)
    assert make_demo_library.artist(same) == "organ"


def test_what_is_added_is_in_no_data_set():
    train, held_out = plan(160, 64, 0, 1)
    known = {clip.piece.seed for clip in (*train, *held_out)}
    more = make_demo_library.songs(64, 136, 0)[64:]
    assert not known & {song.clip.piece.seed for song in more}
    assert len({song.path for song in more}) == 136
    assert {song.path.parent.name for song in more} <= set(STYLES)


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--more: expected 0 or more, found -1"):
        make_demo_library.main(["--out", str(tmp_path), "--more", "-1"])
    with pytest.raises(UserError, match="expected a recording at least"):
        make_demo_library.main(["--out", str(tmp_path), "--more", "0", "--test", "0"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder that can be written"):
        make_demo_library.main(["--out", str(tmp_path / "file"), "--test", "1", "--more", "0"])
