"""index_library.py and Milvus: index types, another projection, other collections, who holds it, a server."""

import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from helpers.small_library import (
    checkpoints,  # noqa: F401
    index,  # noqa: F401
    indexed,
    plain,
    write_music,
    write_track,
)
from music_library import milvus_index
from music_library.index_space import IndexSpace, read_head
from music_library.milvus_index import FIELD, IndexChoice, VectorDatabase
from music_library.searching import open_searcher


def test_another_projection_is_refused_and_mended_without_audio(index, checkpoints):
    music = write_music(Path("music"), 3)
    index(music, "--moments")
    old = indexed()
    with pytest.raises(
        UserError, match=r"indexed with another projection.*index_library.py --reindex --checkpoint \S+oth"
    ):
        index(music, checkpoint="other.pt")
    shutil.rmtree(music)
    index("--reindex", checkpoint="other.pt")
    new = indexed()
    head, _, recorded = read_head(checkpoints / "other.pt")
    space = IndexSpace("muq", head, recorded["recipe"], recorded["id"])
    for name, row in new.items():
        assert row[FIELD] != old[name][FIELD]
        np.testing.assert_allclose(row[FIELD], space.audio(plain()[name][None])[0], atol=1e-6)
    with VectorDatabase("data/library.db") as database:
        assert database.count("muq_moments") == 3
    with pytest.raises(UserError, match="recipe"):
        index("--reindex", checkpoint="foreign.pt")


def test_other_errors_in_one_line(index, checkpoints, tmp_path):
    music = write_music(Path("music"), 1)
    with pytest.raises(UserError, match="expected vectors of the recipe"):
        index(music, checkpoint="foreign.pt")
    with pytest.raises(UserError, match="expected vectors 192 wide"):
        index(music, "--muq-model", wider(tmp_path))
    with pytest.raises(UserError, match="expected MUSIC_DIR, --reindex or --from-collection"):
        index()
    with pytest.raises(UserError, match=r"library\.sqlite: expected a folder whose name ends in \.db"):
        index(music, "--milvus-uri", "library.sqlite")
    Path("file.db").write_text("x")
    with pytest.raises(UserError, match="found a file"):
        index(music, "--milvus-uri", "file.db")


def wider(parent):
    """A MuQ-MuLan of another width, in a new folder."""
    from examples.make_tiny_models import MULAN_CONFIG, write_muq

    config = {**MULAN_CONFIG, "mulan": {**MULAN_CONFIG["mulan"], "dim_latent": 48}}
    folder = parent / "wider"
    folder.mkdir()
    write_muq(folder, mulan_config=config)
    return folder / "muq_mulan"


def test_who_holds_a_lite_folder(index):
    music = write_music(Path("music"), 1)
    index(music)
    code = "import sys, fcntl; f = open('data/library.db/LOCK'); fcntl.flock(f, 2); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"held by process {holder.pid} \(.*serves one process at a time"):
            index(music)
        holder.communicate("\n")
    index(music)


def test_many_queries_of_a_flat_index_need_no_more_memory_than_one(tmp_path):
    rng = np.random.default_rng(0)
    tracks = rng.standard_normal((2000, 256)).astype(np.float32)
    tracks /= np.linalg.norm(tracks, axis=1, keepdims=True)
    fields = {"version": 0, "path": "", "title": "", "artist": "", "album": "", "duration": 1.0}
    with VectorDatabase(str(tmp_path / "flat.db"), create=True) as database:
        database.create("muq", 256, IndexChoice("FLAT"), {})
        database.upsert("muq", [{"id": number, FIELD: row, **fields} for number, row in enumerate(tracks)])
        database.build("muq", IndexChoice("FLAT"))
        tracemalloc.start()  # Milvus Lite is in this process
        found = database.search("muq", tracks[:64], 3, [])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert [hits[0].id for hits in found] == list(range(64))
    assert peak < 40e6  # 64 x 2,000 x 256 differences would be 131 MB


@pytest.mark.parametrize("kind", ["FLAT", "IVF_FLAT", "HNSW"])
def test_index_types_are_really_built(index, kind):
    music = write_music(Path("music"), 3)
    assert f"3 tracks in 'muq', {kind}, 192 dimensions" in index(music, "--index-type", kind)
    assert list(Path("data/library.db").rglob(f"*.{kind.lower()}.idx"))
    assert kind in index(music)  # the type it has is kept


def test_an_index_type_that_milvus_does_not_build_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(milvus_index.INDEX_TYPES, "SCANN", ({}, {}))
    with VectorDatabase(str(tmp_path / "x.db"), create=True) as database:
        database.create("muq", 4, IndexChoice("SCANN"), {"space": "muq"})
        texts = dict.fromkeys(("path", "title", "artist", "album"), "x")
        row = {"id": 1, FIELD: np.ones(4, np.float32) / 2, "version": 1, "duration": 1.0, **texts}
        database.upsert("muq", [row])
        with pytest.raises(UserError, match="SCANN"):
            database.build("muq", IndexChoice("SCANN"), seconds=1)
    with pytest.raises(UserError, match="expected one of auto, HNSW"):
        IndexChoice("hnsw2")


def test_a_collection_of_plain_vectors_is_brought_over(index, tmp_path):
    music = write_music(Path("music"), 4)
    index(music)
    expected, vectors = indexed(), plain()
    with VectorDatabase("data/old.db", create=True) as old:
        old.create("tracks", 192, IndexChoice("FLAT"), {})
        old._client.delete("text_audio_spaces", ids=["tracks"])  # as another program made it
        rows = [
            {"id": i, "path": str(music.absolute() / name), "version": 0, "title": name, "artist": "", "album": "",
             "duration": 1.0, FIELD: vector.astype(np.float32)}
            for i, (name, vector) in enumerate(vectors.items())
        ]  # fmt: skip
        old.upsert("tracks", rows)
    shutil.rmtree("data/library.db")
    shutil.rmtree("data/library.vectors")
    log = index("--from-collection", "tracks", "--from-uri", "data/old.db")
    assert "4 tracks of 'tracks'" in log
    for name, row in indexed().items():
        np.testing.assert_allclose(row[FIELD], expected[name][FIELD], atol=1e-6)
    assert "4 unchanged" in index(music)  # nothing is decoded again
    with pytest.raises(UserError, match="expected vectors 768 wide"):
        index("--from-collection", "tracks", "--from-uri", "data/old.db", checkpoint="mert.pt")
    with pytest.raises(UserError, match="holds standardised vectors"):
        index("--from-collection", "muq", "--from-uri", "data/library.db")


def test_a_server_several_may_use(index, checkpoints, tmp_path):
    """The path of a server's address, on the standalone server that comes with Milvus Lite."""
    import socket
    import time

    music = write_music(Path("music"), 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri, words = f"http://127.0.0.1:{port}", ["server", "--data-dir", "served", "--port", str(port)]
    with subprocess.Popen([sys.executable, "-m", "milvus_lite.cmdline", *words], stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            index(music, "--moments", "--milvus-uri", uri)
            searcher = open_searcher(checkpoints / "muq.pt", uri, device="cpu")
            write_track(music / "later.wav", 40)
            index(music, "--milvus-uri", uri)  # while somebody searches
            (hits,) = searcher.find(searcher.embed(["calm piano"]), 10)
            assert len(hits) == searcher.count() == 5
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
            assert len(searcher.find(searcher.embed(["drum"]), 10, moments=True)[0]) == 5
            searcher.close()
            assert not Path("data/library.db").exists()
        finally:
            server.terminate()
