"""Files that survive a kill: written beside their name and renamed, locks between processes, the room on disk."""

import fcntl
import glob
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import Timeout, UnixFileLock

from common.errors import UserError

_numbers = itertools.count()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` where the file system of `folder` has not `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {what} needs {needed / 1e6:,.1f} MB of disk, {free / 1e6:,.1f} MB are free")


@contextmanager
def replacing(path: str | Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on leaving, what was written there takes the place of `path`.

    The new file is on disk before it gets its name, so that a kill or a power cut at any instant leaves the old file
    or the new one, whole. After an error inside, a full disk included, the old file stays and the half-written one is
    removed; what a killed process has left is removed by the next that writes the same file. Two processes may
    write at once: each writes a file of its own, and the last to be ready stays.

    previous: keep the file that was there under this name. A kill between the two renames leaves `previous` alone.
    """
    path = Path(path)
    _remove_abandoned(path)
    beside = path.with_name(f"{path.name}.{_host()}-{os.getpid()}-{next(_numbers)}.part")
    try:
        yield beside
        _flush(beside)
        if previous is not None and path.exists():
            os.replace(path, previous)
        _rename(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def publish(beside: Path, path: Path) -> None:
    """Rename a complete file to its name such that neither a kill nor a power cut leaves half of it there."""
    _flush(beside)
    _rename(beside, path)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _rename(beside: Path, path: Path) -> None:
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _host() -> str:
    return re.sub(r"[^\w.]", "_", os.uname().nodename)[:64]


def _remove_abandoned(path: Path) -> None:
    """Remove what processes of this machine that are no longer there have left beside `path`."""
    form = re.compile(re.escape(f"{path.name}.{_host()}-") + r"(\d+)-\d+\.part")
    for each in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        if (match := form.fullmatch(each.name)) and not _runs(int(match[1])):
            each.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a lock between processes; it ends with the process, however that ends, and its file is removed.

    Waits for the one who holds it, or where `busy` is given raises `UserError` with that text and who holds it; also
    where the file cannot be written or its file system has no locks.
    """
    # Never a "soft" lock, which is a file's mere existence: it would outlive a process that is killed.
    lock = UnixFileLock(path, timeout=-1 if busy is None else 0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{busy} ({lock_holder(path) or 'it has just ended: try again'})") from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or "its file system knows no locks"
        raise UserError(f"{path}: expected to write there and lock it, found: {reason}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # first: who waits for the lock finds that its file is gone, and makes another
            path.unlink()
        lock.release()


def lock_holder(path: Path) -> str | None:
    """Who holds the lock of a file: None for nobody, else the process with its command where the system tells."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            inode = os.fstat(file.fileno()).st_ino
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].split(":")[-1] == str(inode):
                command = Path(f"/proc/{fields[4]}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return f"process {fields[4]} ({' '.join(command.split())[:200]})"
    except (OSError, IndexError):
        pass
    return "another process"
