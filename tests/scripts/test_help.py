"""What --help prints: examples that can be copied and are what the script accepts, and no empty defaults."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train
from music_library.milvus_index import INDEX_TYPES

ROOT = Path(train.__file__).parent
SCRIPTS = ("prepare_dataset", "train", "evaluate", "export", "index_library", "search")
MODULES = (
    "examples.make_demo_dataset", "examples.make_demo_library", "examples.make_tiny_models", "examples.page_picture",
    "examples.query_store",
    "text_to_audio.measuring.report_page", "text_to_audio.measuring.summary",
)  # fmt: skip


def examples(epilog):
    """The command lines in it, as words: without comments, where output goes, and what is set before them."""
    lines = re.sub(r"\\\n\s*", "", epilog.replace("example:", "").replace("examples:", "")).splitlines()
    for line in lines:
        line = re.sub(r"\s{3,}\(.*\)$|\s+&$|\s+> \S+", "", line)
        if found := re.search(r"(?:python|torchrun \S+) (?:-m )?(\S+?)(?:\.py)? (.*)", line):
            yield found[1], shlex.split(found[2])


@pytest.mark.parametrize("name", [*SCRIPTS, *MODULES])
def test_help(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = importlib.import_module(name).build_parser()
    shown = parser.format_help()
    assert parser.epilog in shown  # as it is written, so no example is broken
    assert not re.search(r"\(default:\s*(None)?\s*\)|\(None\)|\(\s*\)", shown)
    commands = list(examples(parser.epilog))
    assert commands
    for script, words in commands:
        assert script == name
        parser.parse_args(words)
    for action in parser._actions:
        assert action.help, f"{action.option_strings or action.dest} says nothing"


def test_choices_of_the_index_are_the_librarys():
    (action,) = [
        each for each in importlib.import_module("evaluate").build_parser()._actions if each.dest == "index_type"
    ]
    assert action.choices == tuple(INDEX_TYPES)


def call(*words, **more):
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, **more)


# `python -m NAME --help` for each, in one process, as torch and transformers take seconds to import.
EACH_HELP = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        print("left with", left.code, flush=True)
"""


def test_examples_start_as_their_help_says():
    names = [name for name in MODULES if name.startswith("examples")]
    done = call(sys.executable, "-c", EACH_HELP, *names, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("left with 0\n")
    assert [text.startswith("usage: ") for text in shown] == [*[True] * len(names), False], done.stdout


def test_train_all():
    done = call("bash", "train_all.sh", "--epochs", "3", "--help", env={**os.environ, "PYTHON": "false"})
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ./train_all.sh [--help] [--joint] [flags of train.py]\n")
    assert "latent muq mert" in done.stdout
    assert done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if "checkpoints/long" in line]
    train.build_parser().parse_args(["--audio-encoder", "muq", *shlex.split(line)[1:]])
