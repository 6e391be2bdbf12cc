"""Files that are written beside their name and renamed, the room they need, and the lock of who writes them."""

import fcntl
import os
import shutil
from pathlib import Path

from common.errors import UserError


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` where the file system of `folder` has not `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {what} needs {needed / 1e6:,.1f} MB of disk, {free / 1e6:,.1f} MB are free")


def publish(beside: Path, path: Path) -> None:
    """Rename a complete file to its name such that neither a kill nor a power cut leaves half of it there."""
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Lock:
    """An exclusive lock on a path, held until `release` or until the process ends, however it ends.

    Without `wait`, a lock that another process holds raises `UserError(message)`.
    """

    def __init__(self, path: Path, wait: bool, message: str = ""):
        self._path = path
        while True:
            self._file = open(path, "a")  # noqa: SIM115 - the lock lives as long as the open file
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                self._file.close()
                raise UserError(message) from error
            if self._is_current():
                return
            self._file.close()  # the holder before us removed this file; another one is in its place

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file and let the next process in."""
        self._path.unlink(missing_ok=True)
        self._file.close()
