"""How plans are set: names in a column, sizes in GB, what a folder has free, whether others use the machine."""

import os
import shutil
import textwrap
from pathlib import Path

WIDTH, NAMES = 118, 12  # columns of a line, and of the names before it


def named(name: str, text: str) -> list[str]:
    """A line of a plan with its name, broken into several where it is long."""
    rows = textwrap.wrap(text, WIDTH - NAMES, break_on_hyphens=False, break_long_words=False)
    return [f"{name if not number else '':<{NAMES}}{row}" for number, row in enumerate(rows)]


def gigabytes(size: float) -> str:
    """Bytes in words: with three digits or so, in GB or MB."""
    if size < 1e8:
        return f"{size / 1e6:,.1f} MB"
    return f"{size / 1e9:,.2f} GB" if size < 1e10 else f"{size / 1e9:,.1f} GB"


def free_bytes(folder: Path) -> int:
    """Free bytes where a folder is, or will be made."""
    folder = folder.absolute()
    return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free


def busy_note() -> str:
    """That what was timed just now shared the CPU with others, where it did: more runs than there are cores."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f" (others were at work: load {load:.0f} on {cores} cores)" if load > 1.5 * cores else ""
