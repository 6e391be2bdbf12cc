"""A benchmark's task in a fresh process of its own, and by how much its work raised the peak of memory (Linux)."""

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")


def in_own_process(task: Callable[[], T]) -> T:
    """What a task returns in a fresh process; the task is pickled, so it is a function of a module, or a partial."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(task, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process ended without a result") from None
    finally:
        process.join()


def _send(task: Callable, sender) -> None:
    sender.send(task())


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the peak of resident memory during `work` exceeds what was resident before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = psutil.Process().memory_info().rss
    work()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(peak.group(1)) - before
