"""Ctrl-C and SIGTERM as a request that a loop grants where nothing is lost."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import Stopped
from text_to_audio.processes import ALONE, Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, SIGINT and SIGTERM are only noted; `check` raises `Stopped` with `text` once one has come.

    Work that may be broken off anywhere goes into `at_once`. After the first signal both have their usual effect
    again, so that a second one ends the process immediately. For the main thread, as signals are.
    Processes that train together stop together, after the same step; what is done `at_once` they finish first, since
    one that left it would be waited for.
    """

    def __init__(self, text: str, processes: Processes = ALONE):
        self._text, self._processes = text, processes
        self._signal: int | None = None
        self._raises = False

    def __enter__(self) -> "StopRequest":
        self._before = {each: signal.signal(each, self._note) for each in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, _frame: object) -> None:
        self._signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        # print may be what was interrupted, and is not re-entrant
        os.write(2, f"\n{signal.Signals(number).name}: saving; once more leaves at once\n".encode())
        if self._raises:
            self.check()

    def check(self) -> None:
        """Raise `Stopped` if a signal has come, to whichever process."""
        if self._processes.any(self._signal is not None):
            number = self._signal or signal.SIGTERM
            raise Stopped(number, f"stopped by {signal.Signals(number).name}; {self._text}")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise `Stopped` immediately, wherever it comes inside this block."""
        self._raises = self._processes.count == 1
        try:
            self.check()
            yield
        finally:
            self._raises = False
