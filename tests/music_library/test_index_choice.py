"""Which index a library has: auto by its size, what an index there is keeps, and IVF_FLAT that probes too little."""

import logging

import numpy as np
import pytest

import index_library
from common.errors import UserError
from music_library import evaluation, milvus_index
from music_library.evaluation import ENOUGH, NEIGHBOURS, probing, sampled
from music_library.index_space import IndexSpace
from music_library.milvus_index import EXACT_ELEMENTS, IndexChoice, VectorDatabase, kind_of_parameters
from music_library.updating import sync
from music_library.vector_files import Track, VectorFiles, kept_vectors, vectors_folder
from text_to_audio.model.head import ProjectionHead

DIM = 16
ABOUT = {"space": "muq", "dim": DIM, "recipe": "r", "encoder": "e", "revision": None}


class Library:
    """Plain vectors in a folder and the index beside them, brought up to date by the product's own `sync`."""

    def __init__(self, folder):
        self.uri = str(folder / "library.db")
        self.files = VectorFiles(vectors_folder(self.uri), "muq", ABOUT)
        self.space = IndexSpace("muq", ProjectionHead(8, 4, DIM), "r", "e")

    def add(self, count, windows=0):
        rng, first = np.random.default_rng(len(self.files)), len(self.files)
        for number, row in enumerate(self.files.write("vectors", rng.standard_normal((count, DIM))), first):
            parts = self.files.write("windows", rng.standard_normal((windows, DIM))) if windows else []
            track = Track(number, f"/music/{number}.flac", 1, 1, b"", "", "", "", 1.0, row)
            self.files.put(track, [(10.0 * i, part) for i, part in enumerate(parts)])

    def sync(self, kind, moments=False, reindex=False, **parameters):
        """Types of the collections, and the rows that were put in."""
        choice = IndexChoice(kind, **parameters)
        with VectorDatabase(self.uri, create=True) as database:
            found = sync(self.files, database, self.space, choice, moments, reindex, lambda rows: None)
            assert database.count("muq") == len(self.files)
            types = {name: database._kind(name) for name in found.kinds}
        assert types == {name: kind for name, (kind, _) in found.kinds.items()}
        return found


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.setattr(milvus_index, "EXACT_ELEMENTS", 20 * DIM)
    made = Library(tmp_path)
    yield made
    made.files.close()


def test_auto_goes_by_rows_and_width():
    choice = IndexChoice("auto", search={"radius": 1})
    assert choice.resolved(EXACT_ELEMENTS // 1536, 1536).kind == "FLAT"
    assert choice.resolved(EXACT_ELEMENTS // 1536 + 1, 1536).kind == "HNSW"
    assert choice.resolved(EXACT_ELEMENTS // 1536 + 1, 576).kind == "FLAT"
    assert choice.resolved(3, 1536, there="HNSW").kind == "HNSW"
    assert choice.resolved(3, 1536).search == {"radius": 1}
    assert IndexChoice("IVF_FLAT").resolved(3, 4) == IndexChoice("IVF_FLAT")


def test_a_library_that_outgrows_exact_search(library):
    library.add(12)
    assert library.sync("auto").kinds == {"muq": ("FLAT", None)}
    library.add(12)
    found = library.sync("auto")
    assert found.kinds == {"muq": ("HNSW", "FLAT")}
    assert found.put == 24
    library.files.remove(range(10))
    found = library.sync("auto")  # smaller again: as it is, nothing is made anew
    assert (found.kinds, found.put, found.removed) == ({"muq": ("HNSW", None)}, 0, 10)
    assert library.sync("auto", reindex=True).kinds == {"muq": ("FLAT", None)}


def test_tracks_and_moments_are_settled_each(library):
    library.add(5, windows=6)
    found = library.sync("auto", moments=True)
    assert found.kinds == {"muq": ("FLAT", None), "muq_moments": ("HNSW", None)}


def test_an_index_that_was_asked_for_stays_and_auto_can_be_asked_for(library):
    library.add(12)
    library.sync("FLAT")
    library.add(12)
    assert library.sync("FLAT").kinds == {"muq": ("FLAT", None)}  # what index_library.py takes from the index's note
    found = library.sync("auto")
    assert (found.kinds["muq"][0], found.put) == ("HNSW", 24)
    with VectorDatabase(library.uri) as database:
        noted = database.identity("muq")
    assert (noted["index_type"], noted["index_choice"]) == ("HNSW", "auto")
    assert "vectors" not in noted  # beside a local folder, wherever that is moved


def test_a_change_of_mind_is_noted_without_making_anything_anew(library):
    library.add(12)
    library.sync("FLAT")
    assert library.sync("auto").put == 0
    library.add(12)
    assert library.sync("auto").kinds == {"muq": ("HNSW", "FLAT")}


def settled(library, *words):
    arguments = index_library.build_parser().parse_args(["--milvus-uri", library.uri, *words])
    about = {"recipe": "r", "encoder": "e"}
    _, choice = index_library.open_space(arguments, "muq", library.space.projection, about, library.files.folder)
    return choice.kind


def test_what_the_script_takes_where_no_type_is_named(library):
    assert settled(library) == "auto"
    assert settled(library, "--search-params", '{"ef": 900}') == "HNSW"
    library.add(3)
    library.sync("IVF_FLAT")
    assert settled(library) == "IVF_FLAT"
    assert settled(library, "--index-type", "auto") == "auto"
    with VectorDatabase(library.uri) as database:  # as indexes before had it
        noted = database.identity("muq")
        del noted["index_choice"]
        database.note("muq", noted)
    assert settled(library) == "IVF_FLAT"
    library.sync("auto")
    assert settled(library) == "auto"


def test_parameters_name_their_type():
    assert kind_of_parameters(None, None) is None
    assert kind_of_parameters({"M": 64}, {"ef": 1024}) == "HNSW"
    assert kind_of_parameters(None, {"nprobe": 64}) == "IVF_FLAT"
    with pytest.raises(UserError, match="expected those of one index type, found ef, nprobe"):
        kind_of_parameters({"ef": 1}, {"nprobe": 1})


def test_ivf_flat_says_how_many_lists_it_takes(library, caplog, monkeypatch):
    monkeypatch.setattr(evaluation, "_SAMPLED", 40)
    library.add(300)
    library.sync("IVF_FLAT", build={"nlist": 32}, search={"nprobe": 2})
    with VectorDatabase(library.uri) as database:
        database.load("muq")
        ids, vectors = sampled(library.files, windows=False)
        found = probing(database, "muq", library.space.audio(vectors), ids)
        with caplog.at_level(logging.WARNING):
            index_library.tell_of_lists(database, "muq", library.space, library.files, logging.getLogger("index"))
        shares = {n: share(database, library, ids, n) for n in (2, found.needed // 2, found.needed)}
    assert (found.nprobe, found.lists, len(ids)) == (2, 32, 40)
    assert found.share == pytest.approx(shares[2])
    assert shares[found.needed] >= ENOUGH > shares[found.needed // 2]
    again = f'--index-params {{"nlist": 32}} --search-params {{"nprobe": {found.needed}}}'
    assert again in caplog.text.replace("'", "")
    assert f"nprobe {found.needed} of 32 lists" in caplog.text


def share(database, library, ids, nprobe):
    """The share of the exact neighbours by numpy, of the tracks `ids`."""
    every = library.space.audio(library.files.vectors)
    scores = every[ids] @ every.T
    scores[np.arange(len(ids)), ids] = -2
    exact = np.argsort(-scores, axis=1)[:, :NEIGHBOURS]
    answers = database.search("muq", every[ids], NEIGHBOURS + 1, [], {"nprobe": nprobe})
    found = [{hit.id for hit in hits} - {own} for hits, own in zip(answers, ids, strict=True)]
    return np.mean([len(a & set(b.tolist())) / NEIGHBOURS for a, b in zip(found, exact, strict=True)])


def test_ivf_flat_that_probes_enough_says_nothing(library, caplog):
    library.add(50, windows=2)
    library.sync("IVF_FLAT", moments=True, build={"nlist": 4}, search={"nprobe": 4})
    with VectorDatabase(library.uri) as database, caplog.at_level(logging.WARNING):
        for name in ("muq", "muq_moments"):
            database.load(name)
            index_library.tell_of_lists(database, name, library.space, library.files, logging.getLogger("index"))
    assert [each for each in caplog.records if each.name == "index"] == []


def test_each_library_on_a_server_has_vectors_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [
        str(vectors_folder(uri))
        for uri in ("http://h:19530", "http://h:19530/jazz", "http://h:19531", "https://me:word@h.example/a/b")
    ]
    assert folders == [
        "data/h_19530.vectors", "data/h_19530_jazz.vectors", "data/h_19531.vectors", "data/h.example_a_b.vectors"
    ]  # fmt: skip
    assert str(kept_vectors("http://h:19530", None)) == folders[0]
    assert str(kept_vectors("data/library.db", {})) == "data/library.vectors"


def test_vectors_of_a_server_are_found_where_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    older, noted = {"space": "muq"}, {"space": "muq", "vectors": "elsewhere"}
    for identity in (older, noted):  # indexed on another machine
        assert str(kept_vectors("http://h:1", identity)) == "data/h_1.vectors"
    (tmp_path / "data/library.vectors").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    assert str(kept_vectors("http://h:1", older)) == "data/library.vectors"
    assert str(kept_vectors("http://127.0.0.1:1", noted)) == "elsewhere"  # the same server by another name
    assert str(kept_vectors("http://h:1", None)) == "data/h_1.vectors"  # a new library


def test_the_parameters_of_building_reach_milvus(library):
    library.add(50)
    library.sync("IVF_FLAT", build={"nlist": 7})
    with VectorDatabase(library.uri) as database:
        assert database.lists("muq") == 7
        database.load("muq")
        (some,) = database.search("muq", library.space.audio(library.files.vectors[:1]), 50, [], {"nprobe": 1})
        (every,) = database.search("muq", library.space.audio(library.files.vectors[:1]), 50, [], {"nprobe": 7})
    assert len(some) < len(every) == 50  # one list of seven does not hold them all
