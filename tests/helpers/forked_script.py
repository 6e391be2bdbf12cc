"""A script that is run again and again, each time in a process of its own.

One interpreter imports the script and forks a child for each run: importing torch and transformers takes longer than
all that a small run does. A child ends as a script does, with its exit code, its last line on stderr and whatever
Python does at the end of a process.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class ForkedScript:
    """Use it as a context manager; one run at a time. `settings` are names in the script's module to set."""

    def __init__(self, name: str, **settings: object):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        command = [sys.executable, "-m", "helpers.forked_script", name, json.dumps(settings)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)

    def __enter__(self) -> "ForkedScript":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()  # its stdin ends, and so does it

    def start(self, folder: Path, words: list[str]) -> None:
        """Begin a run in this folder, where `stderr.txt` gets what it says; returns once it runs."""
        self._server.stdin.write(json.dumps([str(folder), list(map(str, words))]) + "\n")
        self._pid = int(self._server.stdout.readline())

    def running(self) -> bool:
        return not select.select([self._server.stdout], [], [], 0)[0]

    def kill(self) -> None:
        """kill -9; does nothing to a run that is over, whose number stays its own until the next one starts."""
        os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return int(self._server.stdout.readline())


def serve(name: str, settings: dict[str, object]) -> None:
    script = importlib.import_module(name)
    for key, value in settings.items():
        setattr(script, key, value)
    child = 0
    for line in sys.stdin:
        if child:
            os.waitpid(child, 0)
        folder, words = json.loads(line)
        child = os.fork()
        if not child:
            run(script, folder, words)
        print(child, flush=True)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)


def run(script, folder: str, words: list[str]) -> None:
    """In the child; does not come back."""
    from common.errors import run_script

    os.chdir(folder)
    for number, path, mode in ((0, os.devnull, "r"), (1, os.devnull, "w"), (2, "stderr.txt", "w")):
        with open(path, mode) as file:
            os.dup2(file.fileno(), number)
    run_script(lambda: script.main(words))


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
