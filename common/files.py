"""Files that are written beside their name and renamed, and the room they need."""

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
