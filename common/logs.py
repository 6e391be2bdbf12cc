"""Log lines for the scripts: the console, and a file that several processes may append to at once."""

import logging
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError

LINE = "%(asctime)s [%(process)d] %(levelname)s %(message)s"


class _ConsoleHandler(logging.Handler):
    """Writes through tqdm, so that a line does not tear the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def start_log(name: str, path: str | Path, quiet: bool = False) -> logging.Logger:
    """Return the logger `name`, which prints to the console and appends to the file `path`.

    quiet: write nothing below an error, for a process whose lines another one writes too.

    The console shows INFO and above, the file everything, each line with the time and the process. The file is
    opened for appending, so a second process adds to it and truncates nothing. Calling it again replaces the
    handlers. Raises `UserError` where the file cannot be written.
    """
    logger = logging.getLogger(name)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    try:
        console, file = _ConsoleHandler(), logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: expected to write the log there, found: {error.strerror}") from error
    console.setFormatter(logging.Formatter("%(message)s"))
    console.setLevel(logging.INFO)
    file.setFormatter(logging.Formatter(LINE))
    for handler in (console, file):
        logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.DEBUG)
    logger.propagate = False
    return logger
