"""The flags that index_library.py and search.py share are the same in both."""

import index_library
import search

SHARED = ("checkpoint", "milvus_uri", "milvus_token", "vectors_dir", "device")


def actions(script):
    return {action.dest: action for action in script.build_parser()._actions}


def test_both_scripts_have_them():
    here, there = actions(index_library), actions(search)
    for name in SHARED:
        assert here[name].option_strings == there[name].option_strings == ["--" + name.replace("_", "-")]
        if name != "checkpoint":  # search.py takes the seed's where none is named
            assert (here[name].default, here[name].help) == (there[name].default, there[name].help)
    assert search.build_parser().parse_args(["x"]).checkpoint == "checkpoints/muq_best_r1.pt"
    assert index_library.build_parser().parse_args([]).checkpoint is None
