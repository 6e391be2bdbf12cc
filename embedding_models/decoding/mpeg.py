"""MPEG audio (MP3): every frame found, so that length is what is there and not what a header or bit rate makes of it.

A frame is a header of four bytes (ISO/IEC 11172-3 and 13818-3) and what its bit rate says follows. An encoder may put
a frame in front that holds no sound but the number of frames ("Xing" or "Info", with what players trim); without it
decoders guess the length from the bit rate. Between frames there may be tags, pictures, and the end and beginning of
files that were joined.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from embedding_models.decoding.headers import id3_end
from embedding_models.decoding.views import ByteReader, Piece

_SEARCH_BYTES = 1 << 20  # how far the first frame may be behind tags, and a next one behind damage
# Samples that an encoder puts in front of the sound: what LAME does and nearly all copy. Players take them off with
# those that decoding adds; a stream that does not say is taken to have them, so that it begins where its twin does.
_USUAL_DELAY = 576
_RATES = (44_100, 48_000, 32_000)  # of MPEG 1; half of it in MPEG 2, a quarter in 2.5
_KBITS = {  # by (MPEG 1, layer), for the bit rate's index from 1
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_KBITS[False, 3] = _KBITS[False, 2]


class Frame(NamedTuple):
    """What a frame's header says. kind: version, layer and sample rate, alike in all frames of a stream."""

    kind: tuple[int, int, int]
    length: int
    samples: int
    xing_at: int  # where "Xing" stands in a frame that has it: behind the side information


def parse_frame(head: bytes) -> Frame | None:
    """Read the four bytes of a frame's header; None for what is none, or has a free bit rate."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3:
        return None
    first = version == 3
    hertz = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kbits = _KBITS[first, layer][bit_rate - 1]
    padding = head[2] >> 1 & 1
    mono = head[3] >> 6 == 3
    if layer == 1:
        return Frame((version, layer, hertz), 4 * (12_000 * kbits // hertz + padding), 384, 0)
    samples = 1152 if first or layer == 2 else 576
    side = ((17 if mono else 32) if first else (9 if mono else 17)) if layer == 3 else 0
    return Frame((version, layer, hertz), samples * 125 * kbits // hertz + padding, samples, 4 + side)


@dataclass
class MpegStream:
    """Frames that belong together, from a "Xing" frame (where there is one) to the next.

    runs: (start, stop) of frames that lie side by side. counted: what the "Xing" frame says, None if nothing.
    """

    frame: Frame
    head: bytes
    xing: bytes = b""
    counted: int | None = None
    frames: int = 0
    runs: list[tuple[int, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The length by the larger of the two counts, what players trim included."""
        return max(self.frames, self.counted or 0) * self.frame.samples / self.frame.kind[2]

    def pieces(self) -> list[Piece]:
        """The stream as a file of its own, which begins with the number of its frames."""
        if self.frame.kind[1] != 3:  # the other layers have no such frame
            return list(self.runs)
        if self.counted is not None and self.counted >= self.frames:
            return [self.xing, *self.runs]
        return [_with_count(self.xing, self.frame, self.frames) if self.xing else self._new_xing(), *self.runs]

    def _new_xing(self) -> bytes:
        head = bytearray(self.head)
        head[1] |= 1  # no checksum
        head[2] = head[2] & 0x0D | 0x90  # a bit rate that leaves room in every version, no padding
        made = parse_frame(bytes(head))
        assert made is not None
        frame = bytearray(head + bytes(made.length - 4))
        count = b"Info" + (1).to_bytes(4) + self.frames.to_bytes(4)
        tag = count + b"LAME".ljust(21, b"\0") + (_USUAL_DELAY << 12).to_bytes(3)
        frame[made.xing_at : made.xing_at + len(tag)] = tag
        return bytes(frame)


def _with_count(xing: bytes, frame: Frame, frames: int) -> bytes:
    """A "Xing" frame with the number of frames set; it keeps what is there if it has the field."""
    at = frame.xing_at
    flags = int.from_bytes(xing[at + 4 : at + 8])
    if flags & 1:
        return xing[: at + 8] + frames.to_bytes(4) + xing[at + 12 :]
    blank = bytearray(len(xing))
    blank[:4], blank[at : at + 4] = xing[:4], xing[at : at + 4]
    blank[at + 4 : at + 12] = (1).to_bytes(4) + frames.to_bytes(4)
    return bytes(blank)


def mpeg_streams(reader: ByteReader) -> list[MpegStream]:
    """The streams of an MPEG audio file, in order; none where it does not begin like one."""
    streams: list[MpegStream] = []
    position = 0
    while True:
        frame = parse_frame(reader.at(position, 4))
        if frame is None or not streams or frame.kind != streams[-1].frame.kind:
            position = _next_frame(reader, id3_end(reader, position))
            frame = parse_frame(reader.at(position, 4)) if position >= 0 else None
        if frame is None or position + frame.length > reader.size:
            break
        _take(reader, position, frame, streams)
        position += frame.length
    return [stream for stream in streams if stream.frames]


def _take(reader: ByteReader, position: int, frame: Frame, streams: list[MpegStream]) -> None:
    """Add a frame to the last stream, or begin one with it."""
    body = reader.at(position, frame.length) if _may_be_xing(reader, position, frame) else b""
    if body or not streams or streams[-1].frame.kind != frame.kind:
        streams.append(MpegStream(frame, reader.at(position, 4), body, _count_in(body, frame.xing_at)))
    if body:
        return
    stream = streams[-1]
    stream.frames += 1
    if stream.runs and stream.runs[-1][1] == position:
        stream.runs[-1] = (stream.runs[-1][0], position + frame.length)
    else:
        stream.runs.append((position, position + frame.length))


def _may_be_xing(reader: ByteReader, position: int, frame: Frame) -> bool:
    return frame.kind[1] == 3 and reader.at(position + frame.xing_at, 4) in (b"Xing", b"Info")


def _count_in(xing: bytes, at: int) -> int | None:
    flags = int.from_bytes(xing[at + 4 : at + 8]) if xing else 0
    return int.from_bytes(xing[at + 8 : at + 12]) or None if flags & 1 else None


def _next_frame(reader: ByteReader, start: int) -> int:
    """Where the next frame begins that others like it follow; -1 where there is none near."""
    position = start
    while (position := reader.find(b"\xff", position, start + _SEARCH_BYTES)) >= 0:
        if _others_follow(reader, position):
            return position
        position += 1
    return -1


def _others_follow(reader: ByteReader, position: int) -> bool:
    """Whether two more frames of its kind follow a frame, or the file's end does: by chance any bytes look like one."""
    first = frame = parse_frame(reader.at(position, 4))
    for _ in range(2):
        if first is None or frame is None or frame.kind != first.kind:
            return False
        position += frame.length
        if position == reader.size:
            return True
        frame = parse_frame(reader.at(position, 4))
    return first is not None and frame is not None and frame.kind == first.kind
