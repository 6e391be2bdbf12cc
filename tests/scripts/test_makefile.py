"""The Makefile: what it says of itself, what it installs and how often, what it cleans."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def make(*words, cwd=ROOT):
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}  # not what an outer make hands down
    return subprocess.run(["make", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_make_alone_says_what_there_is():
    done = make()
    assert done.returncode == 0, done.stderr
    targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert re.findall(r"^make (\S+) +\S", done.stdout, re.MULTILINE) == targets


def test_an_environment_is_made_once(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("bin/python", ".installed", ".installed-for-tests"):
        (tmp_path / name).touch()
    assert make("-n", "check", "test", f"VENV={tmp_path}").stdout.count("pip install") == 0
    (tmp_path / ".installed-for-tests").unlink()
    assert make("-n", "check", "test", f"VENV={tmp_path}").stdout.count("requirements_dev.txt") == 1


def test_an_old_python_is_refused(tmp_path):
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10); $2"\n')
    old.chmod(0o755)
    done = make(f"{tmp_path}/venv/bin/python", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert re.search(r"^error: .*: expected Python 3\.11 or newer, found", done.stderr, re.MULTILINE)


def test_clean_leaves_what_make_did_not_make(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    made = [".venv", ".venv-ci", ".venv-oldest", ".venv-newest", "demo", "demo-ablation", ".mypy_cache",
            ".pytest_cache", ".ruff_cache", "store/__pycache__"]  # fmt: skip
    kept = ["data", "checkpoints", "logs", "store", ".venv-mine/__pycache__"]
    for folder in (*made, *kept):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    assert make("clean", cwd=tmp_path).returncode == 0
    assert not any((tmp_path / folder).exists() for folder in made)
    assert all((tmp_path / folder).exists() for folder in kept)
