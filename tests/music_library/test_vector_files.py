"""The plain vectors kept beside an index, and the walk over a folder."""

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import soundfile

from common.errors import UserError
from music_library import music_folder
from music_library.music_folder import MusicFolder, Tags, content_hash, read_tags, track_id
from music_library.vector_files import Track, VectorFiles, vectors_folder

DATA = Path(__file__).parents[1] / "data/cases"
OLD = Path(__file__).parents[1] / "data/written_by_1a63506/library.vectors"
ABOUT = {"space": "muq", "dim": 4, "recipe": "r1", "encoder": "some/model", "revision": None}


def track(number, row, **changes):
    values = {"id": number, "path": f"/m/{number}.wav", "size": 1, "mtime_ns": 2, "hash": b"h", "title": "t"}
    return Track(**{**values, "artist": "a", "album": "b", "duration": 3.5, "row": row, **changes})


def add(files, number, windows=0):
    (row,) = files.write("vectors", np.full((1, 4), number))
    rows = files.write("windows", np.full((windows, 4), number + 0.5))
    files.put(track(number, row), [(10.0 * i, each) for i, each in enumerate(rows)])


def test_rows_come_back_with_their_track(tmp_path):
    with VectorFiles(tmp_path, "muq", ABOUT) as files:
        for number in (3, 1, 2):
            add(files, number, windows=number)
    with VectorFiles(tmp_path, "muq") as files:
        assert [each.id for each in files.tracks()] == [3, 1, 2]
        assert files.vectors.dtype == np.float16
        for each in files.tracks():
            assert (files.vectors[each.row] == each.id).all()
            starts = [(window.start, files.windows[window.row][0]) for window in files.windows_of(each.id)]
            assert starts == [(10.0 * i, each.id + 0.5) for i in range(each.id)]


def test_free_rows_are_used_by_a_later_run_and_named_rows_never(tmp_path):
    with VectorFiles(tmp_path, "muq", ABOUT) as files:
        for number in range(5):
            add(files, number, windows=2)
        files.remove([1, 3])
        files.write("vectors", np.full((1, 4), 99))  # killed before it was named
    size = (tmp_path / "muq/vectors.f16").stat().st_size
    with VectorFiles(tmp_path, "muq", ABOUT) as files:
        versions = {each.version for each in files.tracks()}
        for number in (7, 8, 9):
            add(files, number, windows=1)
        assert (tmp_path / "muq/vectors.f16").stat().st_size == size
        assert all((files.vectors[each.row] == each.id).all() for each in files.tracks())
        assert all((files.windows[w.row] == w.track + 0.5).all() for w in files.windows_of())
        assert min(each.version for each in files.tracks() if each.id >= 7) > max(versions)


def misspell(catalogue):
    """Flip a bit of a path in the table and in the index, which SQLite reads back as it is."""
    content = catalogue.read_bytes()
    assert content.count(b"/m/2.wav") == 2
    catalogue.write_bytes(content.replace(b"/m/2.wav", b"/m/2.waw"))


def test_a_misspelt_catalogue_is_one_line_for_readers_and_writers(tmp_path):
    catalogue = tmp_path / "muq/catalogue.sqlite"
    with VectorFiles(tmp_path, "muq", ABOUT) as files:
        for number in (1, 2):
            add(files, number)
    misspell(catalogue)
    for about in (None, ABOUT):
        with pytest.raises(UserError, match=r"catalogue\.sqlite: expected a catalogue .*its checksum differs"):
            VectorFiles(tmp_path, "muq", about)


def test_a_reader_beside_a_writer_and_a_killed_writer_leave_no_false_alarm(tmp_path):
    writer = VectorFiles(tmp_path, "muq", ABOUT)
    add(writer, 1)
    with VectorFiles(tmp_path, "muq") as reader:
        assert len(reader) == 1
    shutil.copytree(tmp_path / "muq", tmp_path / "killed/muq")  # as a writer that is killed here leaves it
    writer.close()
    with VectorFiles(tmp_path / "killed", "muq", ABOUT) as again:
        add(again, 2)
    catalogue = tmp_path / "killed/muq/catalogue.sqlite"
    with VectorFiles(tmp_path / "killed", "muq") as reader:
        assert [each.id for each in reader.tracks()] == [1, 2]
    misspell(catalogue)
    with pytest.raises(UserError, match="its checksum differs"):
        VectorFiles(tmp_path / "killed", "muq")


def test_a_writer_that_meets_damage_notes_no_checksum(tmp_path, monkeypatch):
    with VectorFiles(tmp_path, "muq", ABOUT) as files:
        add(files, 1)
    damage = sqlite3.DatabaseError("database disk image is malformed")

    def failing_change():
        with VectorFiles(tmp_path, "muq", ABOUT) as files:
            add(files, 2)
            raise damage

    with pytest.raises(sqlite3.DatabaseError):
        failing_change()
    with closing(sqlite3.connect(tmp_path / "muq/catalogue.sqlite")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (0,)


def test_an_old_catalogue_has_no_checksum_until_it_is_written_to(tmp_path):
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    with VectorFiles(tmp_path, "muq") as files:
        before, about = list(files.tracks()), files.about
    VectorFiles(tmp_path, "muq", about).close()
    with VectorFiles(tmp_path, "muq") as files:
        assert list(files.tracks()) == before
    catalogue = tmp_path / "muq/catalogue.sqlite"
    catalogue.write_bytes(catalogue.read_bytes().replace(b"track 1", b"track 7"))
    with pytest.raises(UserError, match="its checksum differs"):
        VectorFiles(tmp_path, "muq")


def test_an_old_catalogue_that_sqlite_finds_fault_with_is_given_no_checksum(tmp_path):
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    with VectorFiles(tmp_path, "muq") as files:
        about = files.about
    catalogue = tmp_path / "muq/catalogue.sqlite"
    content = catalogue.read_bytes()
    at = content.index(b"track 1")
    catalogue.write_bytes(content[:at] + b"track 7" + content[at + 7 :])  # in one of the table and its index
    with pytest.raises(UserError, match=r"catalogue\.sqlite: expected a catalogue of index_library\.py"):
        VectorFiles(tmp_path, "muq", about)


def test_vectors_of_something_else_are_refused(tmp_path):
    VectorFiles(tmp_path, "muq", ABOUT).close()
    with pytest.raises(UserError, match="holds vectors of recipe 'r1', expected 'r2'"):
        VectorFiles(tmp_path, "muq", {**ABOUT, "recipe": "r2"})
    with pytest.raises(UserError, match="no plain vectors there"):
        VectorFiles(tmp_path, "mert")
    with VectorFiles(tmp_path, "muq", ABOUT) as files, pytest.raises(ValueError, match="does not fit float16"):
        files.write("vectors", np.full((1, 4), 1e6))
    assert str(vectors_folder("data/library.db")) == "data/library.vectors"


def test_the_walk_ends_in_loops_and_tells_what_it_leaves_out(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("b.MP3", "a/c.flac", 'quote\'s "x".wav', "new\nline.ogg", "🎵.opus", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "self.wav").symlink_to(tmp_path / "self.wav")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.wav")
    with open(os.fsencode(tmp_path) + b"/latin\xe9.wav", "wb"):
        pass
    found = dict(MusicFolder(tmp_path))
    names = {path.name for path, reason in found.items() if reason is None}
    assert names == {"b.MP3", "c.flac", 'quote\'s "x".wav', "new\nline.ogg", "🎵.opus"}
    assert {path.name for path, reason in found.items() if reason} == {
        "self.wav", "gone.wav", "pipe.wav", os.fsdecode(b"latin\xe9.wav"),
    }  # fmt: skip
    assert len(list(MusicFolder(tmp_path))) == len(found)


def test_identity_and_tags(tmp_path):
    from helpers.small_library import write_track

    path = write_track(tmp_path / "x.flac", 4)
    tags = read_tags(path)
    assert (tags.title, tags.artist, round(tags.duration)) == ("Title 4", "Artist 1", 3)
    wav = write_track(tmp_path / "y.wav", 5)
    assert (read_tags(wav).title, read_tags(wav).album) == ("Title 5", "Album")
    path.write_bytes(b"not music")
    assert read_tags(path).title == "x"
    assert track_id(path) == track_id(path) != track_id(wav)
    assert 0 <= track_id(path) < 1 << 63
    assert content_hash(path) != content_hash(wav)


def test_each_file_has_one_path_and_bins_are_passed_over(tmp_path):
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    music = tmp_path / "music"
    music.symlink_to(tmp_path / "real")
    for name in ("a.mp3", "deep/b.flac", "deep/._b.flac", "..c.ogg"):
        (tmp_path / "real" / name).write_bytes(b"x")
    (tmp_path / "elsewhere/d.wav").write_bytes(b"x")
    (tmp_path / "real/twice.mp3").symlink_to(tmp_path / "real/a.mp3")
    (tmp_path / "real/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real/one.wav").symlink_to(tmp_path / "elsewhere/d.wav")
    passed_over = (
        "$RECYCLE.BIN", ".Trash-1000", ".Trashes", "@eaDir", "#recycle", "@Recycle", ".stversions", "RECYCLER",
        "System Volume Information", ".AppleDouble", "__MACOSX", "lost+found", ".git", "#snapshot", ".Spotlight-V100",
    )  # fmt: skip
    for name in (*passed_over, "System", "recycled sounds", ".hidden", "Trash"):
        (tmp_path / "real/deep" / name).mkdir()
        (tmp_path / "real/deep" / name / f"in {name}.mp3").write_bytes(b"x")
    for spelling in (music, tmp_path / "real", tmp_path / "real/deep/.." / "." / "deep/..", music / "deep/.."):
        walk = MusicFolder(spelling)
        found = dict(walk)
        assert not any(found.values())
        names = [path.relative_to(tmp_path.resolve()).as_posix() for path in found]
        inside = [f"real/deep/{name}/in {name}.mp3" for name in ("System", "recycled sounds", ".hidden", "Trash")]
        expected = ["real/a.mp3", "real/deep/b.flac", "real/..c.ogg", "elsewhere/d.wav", *inside]
        assert sorted(names) == sorted(expected)
        assert walk.roots == [(tmp_path / "real").resolve(), (tmp_path / "elsewhere").resolve()]


def test_kinds_that_cannot_be_read_here(tmp_path, monkeypatch):
    for name in ("a.m4b", "b.WV", "c.ape", "d.mka", "e.wma", "f.au", "g.w64", "h.aifc", "i.mp2", "j.mid", "k.aax"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(music_folder, "has_ffmpeg", lambda: False)
    found = {path.suffix.lower(): reason for path, reason in MusicFolder(tmp_path)}
    assert {kind for kind, reason in found.items() if reason is None} == {".au", ".w64", ".aifc", ".mp2"}
    assert {kind for kind, reason in found.items() if reason == music_folder.NOT_READ} == {".mid", ".aax"}
    monkeypatch.setattr(music_folder, "has_ffmpeg", lambda: True)
    assert sum(reason is None for _, reason in MusicFolder(tmp_path)) == 9


def test_tags_of_wav_aiff_and_asf(tmp_path):
    from mutagen.aiff import AIFF
    from mutagen.id3 import TALB, TIT2, TPE1
    from mutagen.wave import WAVE

    for suffix, kind in ((".wav", WAVE), (".aiff", AIFF)):
        path = tmp_path / f"x{suffix}"
        soundfile.write(path, np.zeros(8000), 8000)
        assert read_tags(path).title == "x"
        file = kind(path)
        file.add_tags()
        for frame, text in ((TIT2, "Ein  Lied"), (TPE1, "Jemand"), (TALB, "Die Platte")):
            file.tags.add(frame(encoding=3, text=text))
        file.save()
        assert read_tags(path) == Tags("Ein Lied", "Jemand", "Die Platte", 1.0)
    tags = read_tags(DATA / "asf.wma")
    assert (tags.title, tags.artist, tags.album) == ("Wma Title", "Wma Artist", "Wma Album")


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
@pytest.mark.parametrize("kind", ["w64", "caf", "au", "aiff", "wav", "mp3"])
def test_tags_of_a_file_from_a_pipe_say_nothing_on_the_terminal(tmp_path, capfd, kind):
    """Its sizes are unknown: libsndfile seeks where nothing can be, and its MP3 decoder prints a warning."""
    soundfile.write(tmp_path / "x.wav", np.zeros(8000), 8000)
    with open(tmp_path / f"piped.{kind}", "wb") as file:
        words = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "x.wav"), "-f", kind, "-"]
        subprocess.run(words, stdout=file, stdin=subprocess.DEVNULL, check=True)
    assert read_tags(tmp_path / f"piped.{kind}").title == "piped"
    said = capfd.readouterr()
    assert said.err == said.out == ""


def test_a_renamed_track_keeps_its_rows(tmp_path):
    with VectorFiles(tmp_path, "muq", ABOUT) as files:
        for number in (1, 2):
            add(files, number, windows=2)
        before = {window.row: window.version for window in files.windows_of(1)}
        files.rename(1, 11, "/n/1.wav")
        renamed = files.find(id=11)
        assert (renamed.path, files.find(id=1), renamed.row) == ("/n/1.wav", None, 0)
        after = {window.row: window.version for window in files.windows_of(11)}
        assert before.keys() == after.keys()
        assert all(after[row] > before[row] for row in after)
        assert renamed.version == max(after.values())
