"""The Range header of a request for a file, read as RFC 9110, section 14, says."""

import re

from fastapi import HTTPException
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse

MAX_RANGES = 100
"""A header with more ranges than this is ignored; the RFC allows that."""

_UNIT = re.compile(r"[ \t]*bytes[ \t]*=(.*)", re.IGNORECASE | re.DOTALL)
_SPEC = re.compile(r"[ \t]*(?:([0-9]+)-([0-9]*)|-([0-9]+))[ \t]*")


def byte_ranges(header: str, size: int) -> list[tuple[int, int]] | None:
    """First and last byte of each range of a file of `size` bytes; those beyond its end are left out.

    None for what is to be ignored: another unit than bytes, a malformed header, a last byte before the first. An
    empty list for ranges of which none can be satisfied.
    """
    unit = _UNIT.fullmatch(header)
    specs = [spec for spec in unit[1].split(",") if spec.strip(" \t")] if unit else []
    matches = [_SPEC.fullmatch(spec) for spec in specs]
    if not matches or len(matches) > MAX_RANGES:
        return None
    found = []
    for match in matches:
        if match is None:
            return None
        first, last, suffix = match.groups()
        if suffix is not None:
            start, end = max(0, size - _bounded(suffix)), size - 1
        else:
            start, end = _bounded(first), _bounded(last) if last else size - 1
            if last and end < start:
                return None
        if start <= min(end, size - 1):
            found.append((start, min(end, size - 1)))
    return found


def _bounded(digits: str) -> int:
    """The number, or one beyond any file's size for more digits than Python likes to read."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) < 20 else 10**20


def settle_range(request: Request, response: FileResponse) -> None:
    """Leave in the request what `response`, made with the file's `stat_result`, is to answer: a sound Range or none.

    Starlette answers 400 to what has to be ignored, 416 where one of several ranges lies beyond the end, and ranges
    of HEAD. Raises `HTTPException` 416 with Content-Range where no range can be satisfied.
    """
    asked, condition = request.headers.getlist("range"), request.headers.get("if-range")
    if not asked:
        return
    headers = MutableHeaders(scope=request.scope)
    del headers["range"]
    if request.method != "GET" or len(asked) > 1:
        return
    if condition is not None and condition not in (response.headers["etag"], response.headers["last-modified"]):
        return
    size = int(response.headers["content-length"])
    ranges = byte_ranges(asked[0], size)
    if ranges is None:
        return
    if not ranges:
        said = f"the Range header asks for bytes beyond the file's end; it has {size}"
        raise HTTPException(416, said, {"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"})
    headers["range"] = "bytes=" + ",".join(f"{first}-{last}" for first, last in ranges)
