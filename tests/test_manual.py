"""The commands and the Python of README.md and TRAINING_README.md, as they stand there, from an empty folder.

They run in the order of the manual, then of the README (a first look at the same), in one process, on tiny models.
What stands for what is in STANDS_FOR and FLAGS; what cannot run here is in NOT_RUN, with the reason, and its flags are
parsed all the same. A command that is in none of these fails the test: it has to be put into one of them.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from milvus_lite.server_manager import server_manager_instance

import train
from embedding_models.registry import Encoder, HubWeights
from helpers.small_library import write_music
from helpers.small_musicbench import SmallMusicBench, clip, wav_bytes
from helpers.tiny_text_models import make_qwen3
from music_library.milvus_index import FIELD, IndexChoice, VectorDatabase

ROOT = Path(train.__file__).parent
DOCUMENTS = ("TRAINING_README.md", "README.md")
SCRIPTS = ("prepare_dataset", "train", "evaluate", "export", "index_library", "search")
MODULES = ("text_to_audio.measuring.report_page", "text_to_audio.measuring.summary", "examples.query_store")

# In commands and in Python, before they run. HOME is the folder that they run in, so ~/Music is its Music.
STANDS_FOR = {
    "http://localhost:19530": "data/server.db",  # a folder of Milvus Lite for a server
    "sentence-transformers/all-MiniLM-L6-v2": "models/text",
    '"cuda"': '"cpu"',
    "--device cuda": "--device cpu",
    "--epochs 20": "--epochs 1",
    "--epochs 30": "--epochs 1",
    "MuQEmbeddingModel(": 'MuQEmbeddingModel("models/muq_mulan", backbone="models/muq_large", ',
    "music/track.flac": "Music/track 0.wav",
    "demo/checkpoints/musicnn_best_r1.pt": "checkpoints/muq_best_r1.pt",
}
MUQ = "--muq-backbone models/muq_large"
ENCODERS = f"--muq-model models/muq_mulan {MUQ} --mert-model models/mert --latent-model models/music2latent"
# What every command of a script is given besides, unless it says so itself: small models, and a small data set.
FLAGS = {
    "prepare_dataset": f"--dataset musicbench --device cpu --num-workers 1 {ENCODERS}",
    "train": "--text-model models/text --device cpu --epochs 1 --warmup-steps 1 --num-workers 0",
    "evaluate": "--device cpu",
    "index_library": f"--device cpu --muq-model models/muq_mulan {MUQ}",
    "search": "--device cpu",
}
NOT_RUN = {
    "make": "installs packages; test_makefile.py has its targets",
    "python3.11 -m venv": "the environment is there",
    "source": "the environment is active",
    "pip": "installs packages",
    "torchrun": "needs several GPUs; test_processes.py runs two processes on the CPU",
    "tail -f": "does not end",
    "tensorboard": "does not end",
    "milvus-lite server": "does not end; test_library_in_milvus.py starts one",
    "python search.py --serve": "does not end; test_search_serve.py starts one",
    "milvus_collection = Collection": "pymilvus's ORM speaks to servers, and there is none here",
}
PLAIN = ("cat", "chmod", "realpath", "head", "ls", "mkdir")  # run as they are

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a document; place: "README.md:12", its first line."""

    place: str
    language: str
    text: str

    def __str__(self):
        return f"{self.place}: {self.language}"


@dataclass(frozen=True)
class Command:
    """The words of a command line, without the settings before them, a comment, and the & at the end."""

    place: str
    words: list[str]
    settings: dict[str, str] = field(default_factory=dict)

    def __str__(self):
        return f"{self.place}: {shlex.join(self.words)}"


def snippets(name):
    """The fenced blocks of a document in their order; an indented one is moved to the margin."""
    text = (ROOT / name).read_text()
    for match in FENCE.finditer(text):
        lines = match[2].splitlines()
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        first = text[: match.start()].count("\n") + 2
        yield Snippet(f"{name}:{first}", match[1], "\n".join(line[indent:] for line in lines))


def commands(snippet):
    """The commands of a shell block, continued lines joined, after the substitutions."""
    for line in re.sub(r"\\\n\s*", "", snippet.text).splitlines():
        words = shlex.split(substituted(line), comments=True)
        settings = {}
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            name, _, settings[name] = words.pop(0).partition("=")
        if words:
            yield Command(snippet.place, words[:-1] if words[-1] == "&" else words, settings)


def inline_commands(name):
    """What in running text reads `python X.py ...`, `X.py ...` or `./X.sh ...`, with at least one word more."""
    text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), (ROOT / name).read_text())
    for match in INLINE.finditer(text):
        if re.match(r"(?:python )?(?:\./)?[\w/]+\.(?:py|sh)\s+\S", match[1]):
            words = shlex.split(match[1])
            words = words if words[0] == "python" or words[0].endswith(".sh") else ["python", *words]
            yield Command(f"{name}:{text[: match.start()].count(chr(10)) + 1}", words)


def substituted(text):
    for written, meant in STANDS_FOR.items():
        text = text.replace(written, meant)
    return text


def reason_not_run(text):
    """Why a command or a Python block is not run, or None."""
    found = (why for start, why in NOT_RUN.items() if re.search(rf"^{re.escape(start)}\b", text, re.MULTILINE))
    return next(found, None)


def script_of(command):
    """The module whose `main` the command is, and its arguments; (None, ...) for what is no script of ours."""
    words = command.words
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[0].endswith("train_all.sh"):
        return "train", ["--audio-encoder", "muq", *(word for word in words[1:] if word != "--joint")]
    if words[0] != "python" or words[1] == "-c":
        return None, words
    name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    name = name.replace("/", ".")
    assert name in (*SCRIPTS, *MODULES), "a script that this test does not know"
    return name, [os.path.expanduser(word) for word in rest]


def parsed(command):
    """The command's arguments, once its script's own parser has taken them."""
    name, words = script_of(command)
    if name is not None:
        try:
            importlib.import_module(name).build_parser().parse_args(words)
        except SystemExit:
            raise AssertionError("its script does not take these flags") from None
    return name, words


def with_flags(name, words):
    """The words, with those of FLAGS that they do not give themselves."""
    given = {word.partition("=")[0] for word in words}
    extra = shlex.split(FLAGS.get(name, ""))
    pairs = zip(extra[::2], extra[1::2], strict=True)
    return [*words, *(word for flag, value in pairs if flag not in given for word in (flag, value))]


class Reader:
    """Who sits in an empty folder and types what the manual says."""

    def __init__(self, folder):
        self.folder, self.names = folder, {"Encoder": Encoder, "HubWeights": HubWeights}
        self.ran, self.passed_over, self.faults = [], [], []

    def read(self, snippet):
        """Do what a block says; what fails is noted, so that one run shows all there is to mend."""
        if snippet.language == "bash":
            for command in commands(snippet):
                self.attempt(command, lambda command=command: self.type(command))
        elif snippet.language == "python":
            self.attempt(snippet, lambda: self.python(snippet))

    def attempt(self, what, do):
        try:
            do()
        except (Exception, SystemExit) as error:
            self.faults.append(f"{what}: {type(error).__name__}: {error}")

    def type(self, command):
        """Run a command as its script's `main`, or as it is."""
        name, words = parsed(command)
        if reason_not_run(shlex.join(command.words)):
            self.passed_over.append(command)
            return
        if "--split-id" in words and words[words.index("--split-id") + 1] == "0":
            shutil.rmtree("data/musicbench_embeddings")  # the manual's other way to make it
        self.ran.append(command)
        if command.words[0].endswith("train_all.sh"):
            self.train_all(command.words[1:])
        elif name:
            self.main(name, words)
        elif words[:2] == ["python", "-c"]:
            exec(words[2], {})
        else:
            assert words[0] in PLAIN, "neither run nor listed in NOT_RUN with a reason"
            subprocess.run([os.path.expanduser(word) for word in words], check=True, timeout=60)

    def main(self, name, words):
        result = importlib.import_module(name).main(with_flags(name, words))
        assert not isinstance(result, int) or result == 0

    def train_all(self, words):
        """Run the script with an interpreter that notes how it is called, then those calls."""
        called = subprocess.run(
            ["./train_all.sh", *words], env={**os.environ, "PYTHON": str(self.folder / "noting")}, check=True,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        calls = [line.split("\t")[1:-1] for line in called.stdout.splitlines() if line.startswith("called\t")]
        assert [Path(first).stem for first, *_ in calls][-1] == "-m"
        for first, *rest in calls:
            name, rest = (rest[0], rest[1:]) if first == "-m" else (Path(first).stem, rest)
            self.main(name, rest)

    def python(self, snippet):
        """Run a block with the names of the blocks before it; what it opened is closed."""
        text = substituted(snippet.text)
        compiled = compile(text, snippet.place, "exec")
        if reason_not_run(text):
            self.passed_over.append(snippet)
            return
        self.ran.append(snippet)
        try:
            exec(compiled, self.names)
        finally:
            for name in ("searcher", "client"):
                if name in self.names:
                    self.names.pop(name).close()
            server_manager_instance.release_all()  # or the process would hold the Lite folder until it ends


def write_table(path):
    """A table of ten recordings as the manual describes it."""
    lines = []
    for number in range(10):
        name = f"songs/{number}.wav"
        (path.parent / "songs").mkdir(exist_ok=True)
        (path.parent / name).write_bytes(wav_bytes(clip(number, 1.0)))
        lines.append(json.dumps({"audio": name, "captions": [f"song {number}", f"a calm song {number}"]}))
    path.write_text("\n".join(lines) + "\n")


def write_collection(uri):
    """A collection of plain vectors as another program made it, for --from-collection."""
    rng, rows = np.random.default_rng(0), []
    for number in range(3):
        tags = {"title": f"Song {number}", "artist": "", "album": "", "duration": 1.0}
        vector = rng.standard_normal(192).astype(np.float32)
        rows.append({"id": number, "path": f"/srv/{number}.flac", "version": 0, **tags, FIELD: vector})
    with VectorDatabase(uri, create=True) as database:
        database.create("tracks", 192, IndexChoice("FLAT"), {})
        database._client.delete("text_audio_spaces", ids=["tracks"])
        database.upsert("tracks", rows)


@pytest.fixture
def reader(tmp_path, tiny_models, monkeypatch):
    """The folder: a clone's shell script, tiny models, a small data set, some music."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(ROOT / "train_all.sh", tmp_path)
    (tmp_path / "noting").write_text('#!/bin/sh\nprintf "called\\t"; printf "%s\\t" "$@"; echo\n')
    (tmp_path / "noting").chmod(0o755)
    (tmp_path / "models").mkdir()
    for name in ("muq_mulan", "muq_large", "mert", "music2latent"):
        (tmp_path / "models" / name).symlink_to(tiny_models / name)
    make_qwen3(tmp_path / "models" / "text")
    recordings = SmallMusicBench(train_sources=6, copies=0, test=2)
    recordings.audio = {path: wav_bytes(clip(number, 1.0)) for number, path in enumerate(recordings.audio)}
    recordings.write(tmp_path / "musicbench")
    write_music(tmp_path / "Music", 3, seconds=1.0)
    write_table(tmp_path / "my_music.jsonl")
    write_collection("data/server.db")
    return Reader(tmp_path)


@pytest.mark.slow
def test_every_command_and_snippet_runs_in_order(reader):
    for name in DOCUMENTS:
        for snippet in snippets(name):
            reader.read(snippet)
    assert not reader.faults, "\n" + "\n".join(reader.faults)
    ran = {script_of(each)[0] for each in reader.ran if isinstance(each, Command)}
    assert ran >= set(SCRIPTS)
    for name in ("checkpoints/muq_report.html", "exported/muq/README.md", "data/library.db"):
        assert Path(name).exists()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_in_running_text_are_the_scripts(name):
    found = list(inline_commands(name))
    assert found
    for command in found:
        script, words = script_of(command)
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        parser = importlib.import_module(script).build_parser()
        assert flags <= {flag for action in parser._actions for flag in action.option_strings}, str(command)


def test_what_is_not_run_is_still_in_the_documents():
    blocks = [snippet for name in DOCUMENTS for snippet in snippets(name)]
    texts = [substituted(each.text) for each in blocks if each.language == "python"]
    texts += [shlex.join(c.words) for each in blocks if each.language == "bash" for c in commands(each)]
    for start in NOT_RUN:
        assert any(re.search(rf"^{re.escape(start)}\b", text, re.MULTILINE) for text in texts), start


def test_a_wrong_manual_is_noticed(tmp_path):
    """What fails: a flag that there is not, a command that nobody listed, a script that there is not."""
    reader = Reader(tmp_path)
    for line, expected in {
        "python train.py --audio-encoder muq --no-such-flag": "does not take these flags",
        "rm -rf data": "neither run nor listed",
        "python nowhere.py": "a script that this test does not know",
    }.items():
        reader.read(Snippet("a manual:1", "bash", line))
        assert expected in reader.faults[-1]
        assert line in reader.faults[-1]
