"""The cover picture inside an audio file's tags."""

import base64
import binascii
import logging
from pathlib import Path

import mutagen
from mutagen.flac import FLAC, Picture
from mutagen.flac import error as BadPicture

MAX_BYTES = 10 * 2**20
SIGNATURES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF8": "image/gif",
}
"""First bytes -> media type. What else a tag calls a picture (SVG can hold scripts) is not handed out."""

log = logging.getLogger(__name__)


def cover_art(path: Path) -> tuple[bytes, str] | None:
    """The first usable picture in the tags of an audio file and its media type; None where there is none.

    Read: ID3 (mp3, wav, aiff), FLAC, Vorbis and Opus comments, MP4. JPEG, PNG, GIF and WebP up to `MAX_BYTES`.
    """
    try:
        file = mutagen.File(path)
        pictures = [] if file is None else _pictures(file)
    except (mutagen.MutagenError, OSError, ValueError) as error:
        log.warning("%s: the tags could not be read: %s", path, error)
        return None
    for data in pictures:
        kind = _media_type(data)
        if kind and len(data) <= MAX_BYTES:
            return data, kind
    return None


def _media_type(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for signature, kind in SIGNATURES.items() if data.startswith(signature)), None)


def _pictures(file: mutagen.FileType) -> list[bytes]:
    """All picture bytes in the tags, in the order of the file."""
    if isinstance(file, FLAC):
        return [picture.data for picture in file.pictures]
    tags = file.tags
    if tags is None:
        return []
    if hasattr(tags, "getall"):  # ID3
        return [frame.data for frame in tags.getall("APIC")]
    keys = {key.lower() for key in tags.keys()}  # noqa: SIM118 - Vorbis comments iterate over pairs
    if "covr" in keys:  # MP4
        return [bytes(picture) for picture in tags["covr"]]
    if "metadata_block_picture" in keys:  # Vorbis comments: a FLAC picture in base64
        return [data for text in tags["metadata_block_picture"] if (data := _decoded_picture(text))]
    return []


def _decoded_picture(text: str) -> bytes | None:
    try:
        return Picture(base64.b64decode(text)).data
    except (binascii.Error, BadPicture):
        return None
