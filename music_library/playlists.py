"""Found tracks as people and players take them: a table for the terminal, JSON, an extended M3U playlist."""

import json
import unicodedata
from dataclasses import asdict
from pathlib import Path

from common.errors import UserError
from common.files import replacing
from music_library.searching import Hit

_TITLE, _ARTIST = 32, 24  # columns of the table


def table(hits: list[Hit]) -> str:
    """Rank, score, title, artist and path, a line per track; where moments were searched, when the moment is."""
    if not hits:
        return "  nothing found"
    lines = []
    for hit in hits:
        moment = "" if hit.moment is None else f"{clock(hit.moment):>8}  "
        title, artist = _column(hit.title, _TITLE), _column(hit.artist, _ARTIST)
        lines.append(f"{hit.rank:>4}  {hit.score:>6.3f}  {moment}{title}  {artist}  {one_line(hit.path)}")
    head = "rank   score  " + ("  moment  " if hits[0].moment is not None else "")
    return "\n".join([f"{head}{'title':<{_TITLE}}  {'artist':<{_ARTIST}}  path", *lines])


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def one_line(text: str) -> str:
    """The text with every character that a terminal does not print as a letter told by its code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _column(text: str, width: int) -> str:
    """Cut or filled to `width` columns; East Asian letters and emoji take two."""
    shown, used = "", 0
    for letter in one_line(text):
        columns = 2 if unicodedata.east_asian_width(letter) in "WF" else 0 if unicodedata.combining(letter) else 1
        if used + columns > width:
            break
        shown, used = shown + letter, used + columns
    return shown + " " * (width - used)


def as_json(queries: list[str], answers: list[list[Hit]]) -> str:
    """A list with an object per query: "query", and "results" with every field of a hit."""
    entries = [
        {"query": query, "results": [asdict(hit) for hit in hits]} for query, hits in zip(queries, answers, strict=True)
    ]
    return json.dumps(entries, indent=2, ensure_ascii=False)


def write_playlist(path: str | Path, answers: list[list[Hit]]) -> list[str]:
    """Write the tracks in their order, each once, as extended M3U in UTF-8; returns the paths that M3U cannot hold.

    Those have a line break in them. Raises `UserError` where the file cannot be written.
    """
    path, lines, seen, refused = Path(path), ["#EXTM3U"], set(), []
    for hit in (hit for hits in answers for hit in hits):
        if hit.path in seen:
            continue
        seen.add(hit.path)
        if len(hit.path.splitlines()) != 1:
            refused.append(hit.path)
            continue
        name = " - ".join(filter(None, (hit.artist, hit.title)))
        lines += [f"#EXTINF:{round(hit.duration)},{one_line(name)}", hit.path]
    try:
        with replacing(path) as beside:
            beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: expected to write the playlist there, found: {error.strerror}") from error
    return refused
