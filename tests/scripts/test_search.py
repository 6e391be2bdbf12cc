"""search.py and the Searcher, on a small library indexed with tiny encoders."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import index_library
import search
from common.errors import UserError
from helpers.small_library import base_text_model, write_checkpoint, write_music, write_track
from music_library.playlists import clock
from music_library.searching import open_searcher, replaced_prefix, track_name, track_number, without
from music_library.vector_files import VectorFiles

SPACES = {"muq": "library.db", "mert": "library.db"}  # mert is indexed in the narrow form


@pytest.fixture(scope="module")
def library(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        base = base_text_model(folder / "base")
        write_music(folder / "music", 12)
        write_track(folder / "music/long one.wav", 30, 35.0)
        write_track(folder / "music/two\nlines.wav", 31)
        flags = ["--device", "cpu", "--muq-backbone", str(tiny_models / "muq_large")]
        for name, extra in (("muq", ["--moments"]), ("mert", ["--narrow"])):
            write_checkpoint(folder / f"checkpoints/{name}_best_r1.pt", tiny_models, base, name)
            index_library.main(["music", "--audio-encoder", name, *flags, *extra])
        write_checkpoint(folder / "checkpoints/other.pt", tiny_models, base, seed=5)
        write_checkpoint(folder / "checkpoints/latent.pt", tiny_models, base, "latent")
    return folder


@pytest.fixture(autouse=True)
def there(library, monkeypatch):
    monkeypatch.chdir(library)


@pytest.fixture(params=["muq", "mert"])
def searcher(request):
    opened = open_searcher(f"checkpoints/{request.param}_best_r1.pt", device="cpu")
    yield opened
    opened.close()


def standardised(searcher):
    """Every track's path with its unit vector in full width."""
    with VectorFiles("data/library.vectors", searcher.space.name) as files:
        tracks = list(files.tracks())
        return [each.path for each in tracks], searcher.space.standardised(files.vectors[[t.row for t in tracks]])


def test_finds_what_exact_search_finds(searcher):
    vectors = searcher.embed(["calm piano", "happy fast drum song", "a guitar"])
    assert vectors.shape == (3, searcher.config.audio_dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    paths, audio = standardised(searcher)
    for vector, hits in zip(vectors, searcher.find(vectors, 5), strict=True):
        scores = audio @ vector
        assert [hit.path for hit in hits] == [paths[i] for i in np.argsort(-scores)[:5]]
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], atol=1e-5)
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
        assert {hit.moment for hit in hits} == {None}
    assert searcher.count() == len(paths) == 14
    assert searcher.find(vectors[:0], 5) == []
    assert len(searcher.find(vectors[:1], 100)[0]) == 14


def test_like_ranks_as_the_full_width_does(searcher):
    paths, audio = standardised(searcher)
    for number in (0, 7):
        track = searcher.track_of(paths[number])
        scores = audio @ audio[number]
        expected = [i for i in np.argsort(-scores) if i != number][:4]
        hits = searcher.like(track, 4)
        assert [hit.path for hit in hits] == [paths[i] for i in expected]
        np.testing.assert_allclose([hit.score for hit in hits], scores[expected], atol=2e-3)
    with pytest.raises(UserError, match="no track"):
        searcher.like("0" * 16, 4)


def test_only_indexed_files_have_a_path(searcher):
    (hits,) = searcher.find(searcher.embed(["a song"]), 14)
    assert {searcher.path_of(hit.track) for hit in hits} == set(Path("music").absolute().iterdir())
    for foreign in ("../../etc/passwd", "", "0" * 16, "f" * 16, "1" * 40, "' or 1=1", hits[0].track.upper() + " "):
        assert searcher.path_of(foreign) is None
    assert track_number(track_name(12345)) == 12345


def test_not_lowers_what_matches_it(searcher):
    query, unwanted = searcher.embed(["calm piano song", "happy drum"])
    paths, audio = standardised(searcher)
    ranks, means = [], []
    for weight in (0.0, 0.5, 1.0):
        (vector,) = without(query[None], 3 * unwanted, weight)  # its length does not count
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        means.append(float(vector @ unwanted))
        (hits,) = searcher.find(vector[None], 14)
        order = [hit.path for hit in hits]
        closest = [paths[i] for i in np.argsort(-(audio @ unwanted))[:4]]
        ranks.append(np.mean([order.index(path) for path in closest]))
    assert means[0] > means[1] > means[2]
    assert ranks[0] <= ranks[1] <= ranks[2]
    assert ranks[2] > ranks[0]
    with pytest.raises(UserError, match="nothing is left of the query"):
        without(query[None], query, 1.0)


def test_moments(searcher):
    vectors = searcher.embed(["calm piano", "drum"])
    if searcher.space.name == "mert":
        with pytest.raises(UserError, match=r"without moments; run `python index_library\.py MUSIC_DIR --moments`"):
            searcher.find(vectors, 3, moments=True)
        return
    with VectorFiles("data/library.vectors", "muq") as files:
        windows = list(files.windows_of())
        audio = searcher.space.standardised(files.windows[[window.row for window in windows]])
    for vector, hits in zip(vectors, searcher.find(vectors, 14, moments=True), strict=True):
        scores = audio @ vector
        assert len({hit.track for hit in hits}) == len(hits) == 14
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        for hit in hits:
            own = [i for i, window in enumerate(windows) if track_name(window.track) == hit.track]
            best = max(own, key=lambda i: scores[i])
            assert hit.score == pytest.approx(scores[best], abs=1e-5)
            assert hit.moment == windows[best].start


def test_moments_of_many_queries_are_one_search(searcher, monkeypatch):
    if not searcher.has_moments:
        return
    vectors, asked = searcher.embed(["calm piano", "drum", "fast guitar"]), []
    database_search = searcher._database.search

    def noted(name, queries, *rest):
        asked.append(len(queries))
        return database_search(name, queries, *rest)

    monkeypatch.setattr(searcher._database, "search", noted)
    together = searcher.find(vectors, 2, moments=True)
    assert asked[0] == 3
    alone = [searcher.find(vector[None], 2, moments=True)[0] for vector in vectors]
    assert [[hit.track for hit in hits] for hits in together] == [[hit.track for hit in hits] for hits in alone]


def run(*words):
    return search.main([*map(str, words), "--device", "cpu"])


def test_table_and_json(capsys):
    (hits,) = run("calm piano", "--k", 14)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '"calm piano"'
    assert lines[1].split() == ["rank", "score", "title", "artist", "path"]
    assert len([line for line in lines if line]) == 16  # a line break in a name does not tear the table
    tagged = next(hit for hit in hits if hit.path.endswith("track 5.flac"))
    (line,) = (line for line in lines if line.endswith("track 5.flac"))
    assert line.split()[:2] == [str(tagged.rank), f"{tagged.score:.3f}"]
    assert "Title 5" in line
    assert "Artist 2" in line
    run("calm piano", "drum", "--k", 2, "--json", "--moments")
    first, second = json.loads(capsys.readouterr().out)
    assert (first["query"], second["query"]) == ("calm piano", "drum")
    assert set(first["results"][0]) == {
        "rank", "score", "track", "path", "title", "artist", "album", "duration", "moment",
    }  # fmt: skip
    assert clock(3725) == "1:02:05"


def test_a_byte_order_mark_is_no_part_of_the_first_query(tmp_path, monkeypatch):
    (tmp_path / "queries.txt").write_bytes("\ufeffcalm piano\r\ndrum\r\n".encode())
    assert search.read_queries(str(tmp_path / "queries.txt")) == ["calm piano", "drum"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffcalm piano\n"))
    assert search.read_queries("-") == ["calm piano"]
    (tmp_path / "queries.txt").write_bytes(b"\xef\xbb\xbf\n")
    with pytest.raises(UserError, match="found none"):
        search.read_queries(str(tmp_path / "queries.txt"))


def test_a_batch_from_a_file_or_stdin_equals_one_by_one(capsys, monkeypatch, tmp_path):
    queries = ["calm piano", "drum", "happy song with guitar"]
    (tmp_path / "queries.txt").write_text("\n\n".join(queries) + "\n")
    together = run("--queries", tmp_path / "queries.txt", "--k", 3)
    assert capsys.readouterr().out.count("rank") == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(queries)))
    assert [[hit.path for hit in hits] for hits in run("--queries", "-", "--k", 3)] == [
        [hit.path for hit in hits] for hits in together
    ]
    for query, hits in zip(queries, together, strict=True):
        (single,) = run(query, "--k", 3)
        assert [hit.track for hit in single] == [hit.track for hit in hits]
        np.testing.assert_allclose([hit.score for hit in single], [hit.score for hit in hits], atol=1e-5)


def test_playlist_and_mapped_paths(capsys, library, tmp_path):
    target = tmp_path / "out.m3u8"
    (hits,) = run("calm", "--k", 14, "--playlist", target, "--map-path", f"{library}/music=/mnt/music")
    lines = target.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#EXTM3U"
    playable = [hit for hit in hits if "\n" not in hit.path]
    assert lines[2::2] == [hit.path for hit in playable]
    assert all(path.startswith("/mnt/music/") for path in lines[2::2])
    assert lines[1] == f"#EXTINF:{round(playable[0].duration)}," + " - ".join(
        filter(None, (playable[0].artist, playable[0].title))
    )
    assert "line break" in capsys.readouterr().err
    assert replaced_prefix("/a/bc/x", ("/a/b", "/z")) == "/a/bc/x"
    assert replaced_prefix("/a/b/x", ("/a/b", "/z")) == "/z/x"
    assert list(tmp_path.iterdir()) == [target]


def test_like_by_path_by_mapped_path_and_by_id(library):
    (by_path,) = run("--like", "music/track 2.ogg", "--k", 3)
    assert len(by_path) == 3
    assert "track 2.ogg" not in {Path(hit.path).name for hit in by_path}
    (mapped,) = run("--like", "/mnt/track 2.ogg", "--k", 3, "--map-path", f"{library}/music=/mnt")
    assert [hit.track for hit in mapped] == [hit.track for hit in by_path]
    searcher = open_searcher("checkpoints/muq_best_r1.pt", device="cpu")
    track = searcher.track_of("music/track 2.ogg")
    searcher.close()
    liked, _ = run("calm", "--like", track, "--k", 3)
    assert [hit.track for hit in liked] == [hit.track for hit in by_path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a query"),
        (["  "], "found an empty one"),
        (["x", "--k", "0"], "--k: expected 1 to 16,384, found 0"),
        (["x", "--k", "1000000000"], "--k: expected 1 to 16,384"),
        (["x", "--map-path", "abc"], "expected FROM=TO"),
        (["x", "--not", "y", "--not-weight", "nan"], "--not-weight"),
        (["--queries", "gone.txt"], "gone.txt: expected a text file"),
        (["--like", "music/gone.wav"], "--like: no track"),
        (["x", "--checkpoint", "gone.pt"], "gone.pt: no such file"),
        (["x", "--milvus-uri", "gone.db"], "gone.db: no such library"),
        (["x", "--milvus-uri", "http://127.0.0.1:9"], "could not open the database"),
        (["x", "--checkpoint", "checkpoints/other.pt"], "mend it with `python index_library.py --reindex --checkpoint"),
        (["x", "--checkpoint", "checkpoints/latent.pt"], "index it with `python index_library.py MUSIC_DIR"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message):
    with pytest.raises(UserError) as error:
        run(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_training_imports_neither_milvus_nor_encoders():
    """Plans, the model card and searching ask the registry of encoders, which loads none of them."""
    code = (
        "import sys, train, evaluate, text_to_audio.model.inference\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('pymilvus', 'mutagen')])\n"
        "import export, search\n"
        "print(*sorted(name for name in sys.modules if name.startswith('embedding_models')))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(search.__file__).parent, capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines() == ["[]", "embedding_models embedding_models.registry"]
