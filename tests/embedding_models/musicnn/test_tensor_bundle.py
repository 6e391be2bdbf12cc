"""The reader of TensorFlow's tensor bundles: checksums, MusiCNN's own files, small bundles made here, damage."""

import multiprocessing
import random
import shutil
import struct

import numpy as np
import pytest
import torch

from common.errors import UserError
from embedding_models.musicnn.model import find_folder
from embedding_models.musicnn.tensor_bundle import crc32c, read_tensor_bundle

INDEX, DATA = ".index", ".data-00000-of-00001"
TIME_LIMIT = 20  # seconds for one damaged checkpoint
READ = ("batch_normalization_1/beta", "conv2d_4/kernel")  # small tensors, so that 200 mutations are quick


def naive_crc32c(content):
    remainder = 0xFFFFFFFF
    for byte in content:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (remainder & 1) * 0x82F63B78
    return remainder ^ 0xFFFFFFFF


def masked(content):
    value = naive_crc32c(content)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number):
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def message(*fields):
    """A protocol buffer of (number, int | bytes | four-byte checksum as `np.uint32`)."""
    result = b""
    for number, value in fields:
        if isinstance(value, bytes):
            result += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, np.uint32):
            result += varint(number << 3 | 5) + struct.pack("<I", value)
        else:
            result += varint(number << 3) + varint(value)
    return result


def block(items, compression=0):
    """A block of a table and what follows it; keys are prefix-compressed from one to the next."""
    content, last = b"", b""
    for key, value in items:
        shared = next((i for i, (a, b) in enumerate(zip(last, key, strict=False)) if a != b), min(len(last), len(key)))
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    content += struct.pack("<II", 0, 1)
    return content + bytes([compression]) + struct.pack("<I", masked(content + bytes([compression])))


def entry(array, offset, dtype, **more):
    shape = b"".join(message((2, message((1, size)))) for size in array.shape)
    checksum = np.uint32(masked(array.tobytes()))
    fields = {1: dtype, 2: shape, 4: offset, 5: array.nbytes, 6: checksum} | {int(k[1:]): v for k, v in more.items()}
    return message(*fields.items())


def write_bundle(folder, arrays, header=((1, 1),), per_block=2, compression=0, data=None, **more):
    """Write arrays {name: (array, dtype)} as a checkpoint, a few entries a block; `more` replaces fields of entries."""
    folder.mkdir(exist_ok=True)
    items, content = [(b"", message(*header))], b""
    for name, (array, dtype) in sorted(arrays.items()):
        items.append((name.encode(), entry(array, len(content), dtype, **more)))
        content += array.tobytes()
    table, index = b"", []
    for start in range(0, len(items), per_block):
        part = block(items[start : start + per_block], compression)
        index.append((items[min(start + per_block, len(items)) - 1][0], varint(len(table)) + varint(len(part) - 5)))
        table += part
    handles = []
    for part in (block([]), block(index)):
        handles.append(varint(len(table)) + varint(len(part) - 5))
        table += part
    footer = b"".join(handles).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    (folder / INDEX).write_bytes(table + footer)
    (folder / DATA).write_bytes(content if data is None else data)
    return folder


ARRAYS = {
    "layer/bias": (np.arange(3, dtype="<f4"), 1),
    "layer/kernel": (np.linspace(-1, 1, 24, dtype="<f4").reshape(2, 3, 1, 4), 1),
    "layer/kernel/Adam": (np.zeros((2, 3, 1, 4), "<f4"), 1),
    "precise": (np.array([[1e-300, 2.5]]), 2),
    "step": (np.array(7, dtype="<i8"), 9),
    "whole": (np.array([-1, 2**31 - 1], dtype="<i4"), 3),
}


def test_checksums_are_those_of_the_standard():
    # RFC 3720, appendix B.4, and the check value of the Rocksoft catalogue
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"123456789") == 0xE3069283
    content = random.Random(0).randbytes(70_000)
    for length in (*range(40), 255, 256, 257, 1023, 4095, 4099, 16_385, 70_000):
        assert crc32c(content[:length]) == naive_crc32c(content[:length]), length


@pytest.mark.parametrize("per_block", [1, 2, 100])
def test_a_bundle_of_several_blocks_and_types(tmp_path, per_block):
    found = read_tensor_bundle(write_bundle(tmp_path, ARRAYS, per_block=per_block), lambda name: "Adam" not in name)
    assert set(found) == set(ARRAYS) - {"layer/kernel/Adam"}
    for name, tensor in found.items():
        right = torch.from_numpy(ARRAYS[name][0].copy())
        assert tensor.dtype == right.dtype
        assert torch.equal(tensor, right)


def test_only_what_is_wanted_is_read(tmp_path):
    folder = write_bundle(tmp_path, ARRAYS)
    content = bytearray((folder / DATA).read_bytes())
    content[-1] ^= 1  # in "whole", the last
    (folder / DATA).write_bytes(content)
    assert set(read_tensor_bundle(folder, lambda name: name == "step")) == {"step"}
    with pytest.raises(UserError, match=r"\.data-00000-of-00001: .*found whole with a checksum that does not fit"):
        read_tensor_bundle(folder, lambda name: True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"header": ((1, 2),)}, "2 data files"),
        ({"header": ((1, 1), (2, 1))}, "big-endian"),
        ({"compression": 1}, "compression 1"),
        ({"f7": b"slice"}, "tensors in slices"),
        ({"f3": 1}, "in other data files"),
        ({"f1": 14}, r"data type 14 in layer/bias"),
        ({"f5": 11}, "where the index asks for|11 bytes for the shape"),
        ({"f2": message((2, message((1, 1 << 62))))}, "bytes for the shape"),
        ({"f4": 1 << 60}, "where the index asks for"),
        ({"f6": np.uint32(5)}, "checksum that does not fit"),
        ({"f2": 3}, "a number in a shape"),
        ({"data": b"short"}, "5 bytes where the index asks for"),
    ],
)
def test_bundles_of_another_kind_are_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        read_tensor_bundle(write_bundle(tmp_path, ARRAYS, **options), lambda name: True)
    assert "\n" not in str(caught.value)


def answer(connection):
    """In a process of its own: for each folder that comes in, the error's line or what else happened."""
    while (folder := connection.recv()) is not None:
        try:
            connection.send(("read", sorted(read_tensor_bundle(folder, lambda name: name in READ))))
        except UserError as error:
            connection.send(("line", str(error)))
        except BaseException as error:
            connection.send(("defect", repr(error)))


@pytest.fixture
def reader():
    """A process that reads checkpoints, each within the time limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs,))
    process.start()

    def outcome(folder):
        ours.send(folder)
        return ours.recv() if ours.poll(TIME_LIMIT) else ("late", "")

    yield outcome
    process.kill()
    process.join()


def flipped(content, position, bit):
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def mutations(index, data, spans):
    """200 times (what it is, the two files' contents; None for no file)."""
    rng = random.Random(13)
    for _ in range(60):
        yield "a flipped bit in the index", flipped(index, rng.randrange(len(index)), rng.randrange(8)), data
    for position in range(len(index) - 48, len(index), 4):
        yield "a flipped bit in the footer", flipped(index, position, rng.randrange(8)), data
    for _ in range(30):
        yield "a truncated index", index[: rng.randrange(len(index))], data
    for _ in range(10):
        start, length = rng.randrange(len(index) - 60), rng.randrange(1, 60)
        yield "a hole in the index", index[:start] + index[start + length :], data
    for _ in range(10):
        start = rng.randrange(len(index) - 8)
        yield "noise in the index", index[:start] + rng.randbytes(8) + index[start + 8 :], data
    for _ in range(40):
        start, size = rng.choice(spans)
        yield "a flipped bit in the data", index, flipped(data, start + rng.randrange(size), rng.randrange(8))
    for length in (0, 1, 4, len(data) - 1, *(rng.randrange(len(data)) for _ in range(14))):
        yield "truncated data", index, data[:length]
    foreign = [b"", b"text\n", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04", data[:5000], bytes(4948), index[-48:]]
    foreign += [rng.randbytes(4900) + index[-48:], index + index, index[:-48] + index[-48:][::-1]]
    for content in foreign:
        yield "a foreign index", content, data
    for content in (index, data + b"\0", bytes(len(data)), data[::-1]):
        yield "foreign data", index, content
    for pair in ((None, data), (index, None), (None, None), ("folder", data), (index, "folder"), (data, index)):
        yield "a file that is none", *pair


def test_two_hundred_kinds_of_damage_give_one_line_each(tmp_path, reader):
    original = find_folder("MSD_musicnn")[0]
    whole = read_tensor_bundle(original, lambda name: name in READ)
    index, data = (original / INDEX).read_bytes(), (original / DATA).read_bytes()
    spans = [(data.index(tensor.numpy().tobytes()), 4 * tensor.numel()) for tensor in whole.values()]
    cases = list(mutations(index, data, spans))
    assert len(cases) == 200
    folder = tmp_path / "checkpoint"
    for number, (kind, *contents) in enumerate(cases):
        folder.mkdir()
        for name, content in zip((INDEX, DATA), contents, strict=True):
            if content == "folder":
                (folder / name).mkdir()
            elif content is data:
                (folder / name).symlink_to(original / DATA)  # nine megabytes, untouched
            elif content is not None:
                (folder / name).write_bytes(content)
        found, text = reader(folder)
        assert found == "line", (number, kind, found, text)
        assert "\n" not in text
        assert str(folder) in text
        shutil.rmtree(folder)
