"""Ogg files that are several streams one after another ("chained", RFC 3533): where each begins and ends."""

from embedding_models.decoding.views import ByteReader

_FIRST_PAGE = 2  # the flag of a page that begins a logical stream


def chained_streams(reader: ByteReader) -> list[tuple[int, int]]:
    """(start, stop) of the streams that follow one another; one for an ordinary file, none for what is no Ogg.

    Streams that run side by side all begin before any of them goes on: a beginning after that is the next link.
    """
    starts: list[int] = []
    position, beginning = 0, False
    while (position := reader.find(b"OggS", position, reader.size)) >= 0:
        head = reader.at(position, 27)
        if len(head) < 27 or head[4] != 0:  # the version
            position += 4
            continue
        first = bool(head[5] & _FIRST_PAGE)
        if first and not beginning:
            starts.append(position)
        beginning = first
        position += 27 + head[26] + sum(reader.at(position + 27, head[26]))
    return list(zip(starts, [*starts[1:], reader.size], strict=True))
