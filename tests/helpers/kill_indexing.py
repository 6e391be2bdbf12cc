"""Kills index_library.py (-9) at instants spread over its run, in one folder; test_index_killed.py runs this.

One interpreter imports everything, and forks a child for each run: starting Python ten times would take longer than
all that is tested.
"""

import os
import signal
import sys
import time
from pathlib import Path


def run(arguments: list[str], folder: str, kill_after: float | None) -> tuple[int, float]:
    """Run in a child; returns its exit status (negative for a signal) and how long it ran."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            import index_library

            index_library.main(arguments)
            code = 0
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def main() -> None:
    trial, folder, kills, *arguments = sys.argv[1:]
    import index_library  # noqa: F401 - before the forks

    code, whole = run(arguments, trial, None)
    assert code == 0, "the run that is not killed failed"
    killed = 0
    for number in range(int(kills)):
        if number == int(kills) // 2:  # once all is there, kill runs that have something to replace
            for path in Path(folder, "music").iterdir():
                path.write_bytes(path.read_bytes() + b"\0\0")
        code, _ = run(arguments, folder, whole * (number + 0.5) / int(kills))
        killed += code == -signal.SIGKILL
    code, _ = run(arguments, folder, None)
    print(killed, code, flush=True)


if __name__ == "__main__":
    main()
