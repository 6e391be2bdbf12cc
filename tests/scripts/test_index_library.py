"""index_library.py as a user runs it, on tiny encoders and short synthetic tracks: what it makes of a folder."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

import index_library
from common.errors import UserError
from helpers.small_library import (
    checkpoints,  # noqa: F401
    index,  # noqa: F401
    indexed,
    plain,
    write_music,
    write_track,
)
from helpers.small_musicbench import clip
from music_library.index_space import IndexSpace, read_head
from music_library.milvus_index import FIELD, VectorDatabase
from music_library.music_folder import track_id
from music_library.searching import open_searcher
from music_library.vector_files import VectorFiles

QUOTED = 'it\'s "quoted"; DROP TABLE.wav'
ROOT = Path(index_library.__file__).parent


def test_holds_what_the_encoder_and_the_projection_give(index, checkpoints, tiny_models):
    from helpers.small_library import spec

    write_music(Path("music"), 4)
    write_track(Path("music/long.wav"), 9, 27.0)
    assert "5 to be embedded" in index("music", "--moments")
    head, _, recorded = read_head(checkpoints / "muq.pt")
    space = IndexSpace("muq", head, recorded["recipe"], recorded["id"])
    encoder = spec(tiny_models).load()
    for name, row in indexed().items():
        expected = encoder.embed_file(Path("music") / name)
        assert np.abs(plain()[name] - expected).max() < 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(row[FIELD], space.audio(plain()[name][None])[0], atol=1e-6)
    with VectorFiles("data/library.vectors", "muq") as files:
        track = files.find(path=str(Path("music/long.wav").absolute()))
        windows = list(files.windows_of(track.id))
        assert [window.start for window in windows] == pytest.approx([0, 10, 17])
        mean = files.windows[[window.row for window in windows]].astype(np.float32).mean(0)
        assert np.abs(mean - plain()["long.wav"]).max() < 2e-3 * np.abs(mean).max()
        assert track.duration == pytest.approx(27)
    with VectorDatabase("data/library.db") as database:
        starts = sorted(row["start"] for row in database.rows("muq_moments", ["start", "track"]) if
                        row["track"] == track.id)  # fmt: skip
    assert starts == pytest.approx([0, 10, 17])


def test_is_incremental(index):
    music = write_music(Path("music"), 5)
    index(music)
    before = indexed()
    assert len(before) == 5
    assert "5 unchanged, 0 touched, 0 moved or copied, 0 to be embedded" in index(music)
    os.utime(music / "track 0.wav", (1, 1))
    write_track(music / "track 1.flac", 77)  # other content
    (music / "track 2.ogg").rename(music / "renamed.ogg")
    (music / "track 3.mp3").unlink()
    log = index(music)
    assert "1 unchanged, 1 touched, 1 moved or copied, 1 to be embedded" in log
    after = indexed()
    assert set(after) == {*before, "renamed.ogg"}  # what has vanished stays until --prune
    assert after["track 1.flac"]["title"] == "Title 77"
    assert after["track 1.flac"][FIELD] != before["track 1.flac"][FIELD]
    assert after["renamed.ogg"][FIELD] == before["track 2.ogg"][FIELD]
    assert "pruned 2" in index(music, "--prune")
    assert set(indexed()) == {"track 0.wav", "track 1.flac", "renamed.ogg", "track 4.wav"}
    write_track(music / "track 1.flac", 5)
    (music / "track 1.flac").write_bytes((music / "track 1.flac").read_bytes()[:2000])
    assert "left out" in index(music)
    assert "track 1.flac" not in indexed()  # not with the vector of what it was


def test_a_track_is_one_track_however_it_is_spelt(index, checkpoints):
    music = write_music(Path("real"), 4)
    Path("link").symlink_to(music.absolute())
    (music / "again.wav").symlink_to(music.absolute() / "track 0.wav")
    index("link", "--moments")
    expected = {path: row[FIELD] for path, row in indexed().items()}
    assert len(expected) == 4
    for spelling in ("real", "link", "real/../link", music.absolute() / ".." / "real"):
        assert "4 unchanged, 0 touched, 0 moved or copied, 0 to be embedded" in index(spelling, "--prune")
        assert {path: row[FIELD] for path, row in indexed().items()} == expected
    searcher = open_searcher(checkpoints / "muq.pt", device="cpu")
    numbers = {
        searcher.track_of(each) for each in ("link/track 1.flac", "real/../link/track 1.flac", music / "track 1.flac")
    }
    assert len(numbers) == 1 and None not in numbers  # noqa: PT018
    searcher.close()


def test_an_index_made_behind_a_link_ends_with_each_track_once(index, checkpoints):
    """As indexes were before links were resolved: under the paths as they were spelt, some twice."""
    music = write_music(Path("real"), 4)
    write_track(music / "long.wav", 9, 27.0)
    Path("link").symlink_to(music.absolute())
    index(music, "--moments")
    expected, moments = plain(), stored_moments()
    with VectorFiles("data/library.vectors", "muq") as files:
        for track in list(files.tracks()):
            spelt = Path("link").absolute() / Path(track.path).name
            if spelt.name == "track 2.ogg":  # indexed under both paths
                (row,) = files.write("vectors", files.vectors[[track.row]])
                windows = [(each.start, *files.write("windows", files.windows[[each.row]]))
                           for each in files.windows_of(track.id)]  # fmt: skip
                files.put(replace(track, id=track_id(spelt), path=str(spelt), row=row), windows)
            else:
                files.rename(track.id, track_id(spelt), str(spelt))
    index("--reindex")
    with VectorDatabase("data/library.db") as database:
        assert database.count("muq") == 6
    searcher = open_searcher(checkpoints / "muq.pt", device="cpu")
    assert searcher.track_of("link/track 1.flac") is not None  # found before it is brought up to date, too
    searcher.close()
    log = index("link", "--prune")
    assert "5 unchanged, 0 touched, 0 moved or copied, 0 to be embedded" in log
    assert {row["path"] for row in indexed().values()} == {str(path.resolve()) for path in music.iterdir()}
    for name, vector in plain().items():
        np.testing.assert_array_equal(vector, expected[name])
    assert stored_moments() == moments
    assert "5 rows put in, 6 taken out" not in index("link", "--prune")


def stored_moments():
    """Start and path of each window that Milvus holds."""
    with VectorFiles("data/library.vectors", "muq") as files, VectorDatabase("data/library.db") as database:
        paths = {track.id: track.path for track in files.tracks()}
        rows = list(database.rows("muq_moments", ["start", "track"]))
    return sorted((paths[row["track"]], row["start"]) for row in rows)


def test_prune_reaches_what_links_lead_to(index):
    music = write_music(Path("music"), 1)
    elsewhere = write_music(Path("elsewhere/deep"), 3).absolute()
    (music / "linked").symlink_to(elsewhere.parent)
    index(music)
    with VectorFiles("data/library.vectors", "muq") as files:
        assert len(files) == 4
    (elsewhere / "track 2.ogg").unlink()
    assert "pruned 1" in index(music, "--prune")


def test_companions_bins_and_kinds(index, monkeypatch):
    music = write_music(Path("music"), 2)
    (music / "._track 0.wav").write_bytes(b"\x00\x05\x16\x07" + bytes(400))
    (music / "@eaDir").mkdir()
    write_track(music / "@eaDir/track 0.wav", 7)
    for name in ("a.m4b", "b.m4b", "c.wv", "d.mid"):
        (music / name).write_bytes(b"something")
    monkeypatch.setattr("music_library.music_folder.has_ffmpeg", lambda: False)
    log = index(music)
    assert set(indexed()) == {"track 0.wav", "track 1.flac"}
    assert "left out 3 files of a kind that ffmpeg reads, which is not installed: 2 .m4b, 1 .wv" in log
    assert "left out 1 files of a kind that is not read: 1 .mid" in log
    assert "files left out: 4;" in log


def test_an_unmounted_folder_prunes_nothing(index):
    music = write_music(Path("music"), 2)
    index(music)
    shutil.rmtree(music)
    music.mkdir()
    with pytest.raises(UserError, match="expected audio files, found none"):
        index(music, "--prune")
    assert len(indexed()) == 2
    with pytest.raises(UserError, match="gone: expected a folder of music, found nothing"):
        index("gone")


def test_a_hostile_folder(index):
    music = write_music(Path("music"), 2)
    write_track(music / "whole.mp3", 3, 20.0)
    (music / "cut.flac").write_bytes((music / "track 1.flac").read_bytes()[:3000])
    (music / "text.mp3").write_text("dear diary\n" * 300)
    (music / "empty.ogg").touch()
    soundfile.write(music / "nan.wav", np.full(40_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    soundfile.write(music / "short.wav", np.zeros(2000), 16_000)
    (music / "apple.m4a").write_bytes(b"\0" * 500)
    for number, name in enumerate((QUOTED, "emoji 🎸🔥.wav", "two\nlines.wav", "%s {x}.wav")):
        write_track(music / name, 20 + number)
    (music / "loop").symlink_to(music.absolute())
    (music / "self.wav").symlink_to(music.absolute() / "self.wav")
    log = index(music)
    good = {"track 0.wav", "track 1.flac", "whole.mp3", QUOTED, "emoji 🎸🔥.wav"}
    assert set(indexed()) == good | {"two\nlines.wav", "%s {x}.wav"}
    for name in ("cut.flac", "text.mp3", "empty.ogg", "nan.wav", "short.wav", ".m4a", "self.wav"):
        assert any("left out" in line and name in line for line in log.splitlines()), name
    assert "files left out: 7;" in log


def test_an_unreadable_file_and_folder(index, monkeypatch):
    music = write_music(Path("music"), 3)
    (music / "shut").mkdir()
    write_track(music / "shut/inner.wav", 8)
    index(music)
    real, shut = os.scandir, str((music / "shut").absolute())

    def scandir(path):  # the tests may run as root, whom no permission stops
        if str(path) == shut:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr("music_library.updating.content_hash", refuse_track_1)
    os.utime(music / "track 1.flac", (5, 5))
    log = index(music, "--prune")
    assert "shut: Permission denied" in log
    assert "track 1.flac: Permission denied" in log
    assert len(indexed()) == 4  # nobody knows whether they are gone


def refuse_track_1(path):
    from music_library.music_folder import content_hash

    if path.name == "track 1.flac":
        raise PermissionError(13, "Permission denied", str(path))
    return content_hash(path)


@pytest.mark.slow
def test_several_encoder_processes_give_what_one_gives(index):
    music = write_music(Path("music"), 5)
    write_track(music / "long.wav", 9, 45.0)
    (music / "broken.mp3").write_text("no")
    index(music)
    expected = plain()
    shutil.rmtree("data")
    log = index(music, "--encoder-processes", 2, "--moments")
    assert plain().keys() == expected.keys() == indexed().keys()
    for name, vector in plain().items():
        assert np.abs(vector - expected[name]).max() <= 2e-3 * np.abs(expected[name]).max()
    assert "broken.mp3" in log
    with VectorFiles("data/library.vectors", "muq") as files:
        counts = [len(list(files.windows_of(track.id))) for track in files.tracks()]
    assert sorted(counts) == [1, 1, 1, 1, 1, 5]


def test_memory_stays_flat_on_a_long_file(tmp_path, tiny_models):
    """Eight minutes at a low rate against 40 s; whole, it would take 46 MB as float32 at 24 kHz."""
    for name, seconds in (("short", 40), ("long", 480)):
        with soundfile.SoundFile(tmp_path / f"{name}.wav", "w", 8000, 1) as file:
            for part in range(seconds // 20):
                file.write(clip(part, 20, 8000))
    code = (
        "import resource, sys; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "from helpers.small_library import spec\n"
        "from embedding_models.tracks import embed_track\n"
        f"encoder = spec(Path({str(tiny_models)!r})).load()\n"
        "for name in ('short', 'long'):\n"
        f"    _, parts = embed_track(encoder, Path({str(tmp_path)!r}) / (name + '.wav'), 4)\n"
        "    print(sum(map(len, parts)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    (short, before), (long, after) = (map(int, line.split()) for line in answer.stdout.splitlines())
    assert (short, long) == (4, 48)
    assert after - before < 25_000  # KB
