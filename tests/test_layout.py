"""The rooms: imports point downwards and never in a circle, nothing imports a script, README's tree is the folders'."""

from pathlib import Path

import pytest

from layout_rules import crowded_folders, cycle, folders_with_python, import_graph, room_of, tree_of, upward_imports

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


@pytest.fixture(scope="module")
def graph():
    return import_graph(ROOT)


def test_imports_point_downwards(graph):
    assert {"common", "store", "preparing", "embedding_models", "text_to_audio", "music_library"} <= set(graph)
    assert "text_to_audio.config" in graph["train"]  # the imports are found at all
    assert upward_imports(graph) == []


def test_there_is_no_circle(graph):
    assert cycle(graph) == []


def test_no_package_imports_a_script(graph):
    assert {"train", "search"} <= SCRIPTS
    examples = {name: imported for name, imported in graph.items() if room_of(name) or name.startswith("examples")}
    assert {name: imported & SCRIPTS for name, imported in examples.items() if imported & SCRIPTS} == {}


def test_no_folder_is_crowded():
    assert crowded_folders(ROOT) == []


def test_readmes_tree_is_that_of_the_folders():
    named = tree_of((ROOT / "README.md").read_text(encoding="utf-8"))
    outputs = {"data", "checkpoints", "logs"}
    assert len(named) == len(set(named))
    assert set(named) - outputs == folders_with_python(ROOT)


def tree(root, **files):
    """Write small modules; a name's double underscores are its folders."""
    for name, text in files.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


BAD = {
    "upwards": ({"common__files": "", "store__reading": "", "common__bad": "from store.reading import X"},
                "common.bad imports store.reading"),
    "inside a function": ({"preparing__clips": "", "store__a": "def f():\n    import preparing.clips"},
                          "store.a imports preparing.clips"),
    "between rooms": ({"text_to_audio__loss__bank": "", "text_to_audio__model__head":
                       "from text_to_audio.loss import bank"},
                      "text_to_audio.model.head imports text_to_audio.loss.bank"),
    "settings": ({"text_to_audio__config": "from text_to_audio.model.head import Head",
                  "text_to_audio__model__head": ""}, "text_to_audio.config imports text_to_audio.model.head"),
    "an audio encoder": ({"embedding_models__mert": "", "text_to_audio__training__run": "import embedding_models.mert"},
                         "text_to_audio.training.run imports embedding_models.mert"),
    "a script": ({"train": "", "music_library__a": "from train import main"}, "music_library.a imports train"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "fault"), BAD.values(), ids=BAD)
def test_a_bad_import_is_found(tmp_path, files, fault):
    assert upward_imports(import_graph(tree(tmp_path, **files))) == [fault]


def test_a_circle_is_found(tmp_path):
    files = {"common__a": "import common.b", "common__b": "def f():\n    from common.c import x",
             "common__c": "from common import a", "common__d": "import common.a"}  # fmt: skip
    assert sorted(cycle(import_graph(tree(tmp_path, **files)))) == ["common.a", "common.b", "common.c"]
    assert cycle(import_graph(tree(tmp_path, common__c="import json"))) == []


def test_a_package_s_own_file_is_part_of_a_circle(tmp_path):
    files = {"common____init__": "from common.a import x", "common__a": "from common import x"}
    (tmp_path / "common").mkdir()
    (tmp_path / "common/__init__.py").write_text(files.pop("common____init__"))
    assert sorted(cycle(import_graph(tree(tmp_path, **files)))) == ["common", "common.a"]


def test_a_crowded_folder_is_found(tmp_path):
    tree(tmp_path, **{f"benchmarks__b{i}": "" for i in range(16)}, **{f"store__s{i}": "" for i in range(15)})
    (tmp_path / "store/__init__.py").touch()
    assert crowded_folders(tmp_path) == ["benchmarks: 16 modules"]


def test_the_tree_is_read_line_by_line():
    readme = "## How it is laid out\n\n```\ntrain.py  search.py\ncommon/   errors\ntext_to_audio/   rooms\n" \
             "  model/   head\nexamples/     more\n```\n"  # fmt: skip
    assert tree_of(readme) == ["common", "text_to_audio", "text_to_audio/model", "examples"]
