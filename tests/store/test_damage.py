"""A damaged file ends in one line or is read rightly: no hang, no crash, no traceback (more: helpers/damage.py)."""

import shutil
import struct
from pathlib import Path

import h5py
import pytest

from common.errors import UserError
from helpers.damage import make_store, outcomes, read_store
from store import checksum
from store.reading import EmbeddingStore, read_blocks
from store.verifying import faults

OLD = Path(__file__).parents[1] / "data/written_by_1a63506/data/musicbench_embeddings/embeddings.h5"


@pytest.mark.parametrize(
    ("kind", "places", "allowed"),
    [
        ("store", 40, {"right", "one line"}),
        ("work file", 40, {"right", "one line"}),
        ("library", 40, {"right", "one line"}),
    ],
)
def test_damaged_places(tmp_path, kind, places, allowed):
    found = outcomes(kind, places, tmp_path, seed=1)
    assert set(found) <= allowed, found
    assert found["one line"] > 0


def test_each_part_of_the_first_line_is_guarded(tmp_path):
    path = make_store(tmp_path)
    content = path.read_bytes()
    for at in [*range(0, 200, 7), 4095]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(UserError, match=r"e\.h5: expected an HDF5 store"):
            EmbeddingStore(path)


def test_checksum_line_is_what_head_shows(tmp_path):
    path = make_store(tmp_path)
    line = path.read_bytes().split(b"\n")[0]
    assert line.startswith(b"text-audio-embeddings checksum ")
    with h5py.File(path) as file:  # other readers skip it
        assert file.userblock_size == checksum.BLOCK_BYTES
        assert file.attrs["format"] == "text-audio-embeddings"


def test_an_old_store_in_which_hdf5_hangs_or_crashes_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "old.h5"
    shutil.copyfile(OLD, path)
    assert read_store(path) == read_store(OLD)
    monkeypatch.setattr(checksum, "_OLD_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"old\.h5: .*HDF5 hangs in it for 0.5 s"):
        checksum.check_undamaged(path, lambda: __import__("time").sleep(60))
    with pytest.raises(UserError, match=r"old\.h5: .*HDF5 crashes in it \(signal 6\)"):
        checksum.check_undamaged(path, lambda: __import__("os").abort())


def test_verify_notices_a_vector_that_is_not_finite_but_no_other(tmp_path):
    """What nothing protects: the vectors. A bit of one is noticed where it shows in the statistics or is not finite."""
    path = make_store(tmp_path)
    block = read_blocks(path)["val/muq_embeddings"]
    content = bytearray(path.read_bytes())
    content[block.offset : block.offset + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(content)
    assert list(faults(path)) == ["/val/muq_embeddings: 1 rows are not finite"]
    content[block.offset : block.offset + 4] = struct.pack("<f", 1.25)
    path.write_bytes(content)
    assert list(faults(path)) == []
