import gzip
import io
import random
import tarfile
import tracemalloc

import pytest

from common.errors import UserError
from preparing.clips import FileClips, TarClips, folder_or_tar


def content(number):
    """Bytes that do not compress, so that cutting the file cuts the data."""
    return random.Random(number).randbytes(5000 + number)


MEMBERS = {f"data/clip{i:02d}.wav": content(i) for i in range(40)}


def add(tar, name, data=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path, members=MEMBERS, mode="w:gz", prefix="datashare/", **options):
    with tarfile.open(path, mode, **options) as tar:
        add(tar, "datashare", type=tarfile.DIRTYPE)
        for name, data in members.items():
            add(tar, prefix + name, data)
    return path


def read(path, wanted=frozenset(MEMBERS)):
    return list(TarClips(path).read(set(wanted)))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize(("mode", "name"), [("w:gz", "a.tar.gz"), ("w", "a.tar.gz"), ("w:gz", "a.tar")])
def test_members_come_in_the_tars_order_gzipped_or_not(tmp_path, mode, name, form):
    path = write_tar(tmp_path / name, mode=mode, format=form)
    assert read(path) == list(MEMBERS.items())


@pytest.mark.parametrize("prefix", ["", "./", "datashare/", "./datashare/", "a/b/" + "long/" * 40])
def test_the_root_inside_the_tar_does_not_matter(tmp_path, prefix):
    assert read(write_tar(tmp_path / "a.tar", prefix=prefix)) == list(MEMBERS.items())


def test_what_is_not_wanted_is_not_yielded_and_what_is_missing_is_no_error(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz")
    wanted = {"data/clip07.wav", "data/clip03.wav", "data/never.wav", "clip01"}
    assert [name for name, _ in read(path, wanted)] == ["data/clip03.wav", "data/clip07.wav"]
    assert read(path, set()) == []


def test_a_name_that_only_ends_alike_is_another_file(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"moredata/clip.wav": b"no", "data/clip.wav": b"yes"})
    assert read(path, {"data/clip.wav"}) == [("data/clip.wav", b"yes")]


def test_of_two_members_of_one_name_the_first_counts_once(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "datashare/data/a.wav", b"first")
        add(tar, "datashare/data/a.wav", b"second")
        add(tar, "datashare/data/b.wav", b"other")
    assert read(path, {"data/a.wav", "data/b.wav"}) == [("data/a.wav", b"first"), ("data/b.wav", b"other")]


def test_progress_counts_compressed_bytes_up_to_the_size(tmp_path):
    clips, positions = TarClips(write_tar(tmp_path / "a.tar.gz")), []
    list(clips.read({*MEMBERS, "data/missing.wav"}, positions.append))
    assert positions == sorted(positions)
    assert positions[-1] == clips.size_bytes


def test_the_pass_ends_when_all_wanted_members_were_seen(tmp_path):
    path = write_tar(tmp_path / "a.tar", {**MEMBERS, "data/large.wav": bytes(4_000_000)}, mode="w")
    positions = []
    list(TarClips(path).read({"data/clip00.wav"}, positions.append))
    assert positions[-1] < path.stat().st_size / 4


def test_memory_does_not_grow_with_the_tar(tmp_path):
    peaks = []
    for count in (500, 500, 4000):  # the first pass fills Python's own caches
        clips = TarClips(write_tar(tmp_path / "a.tar", {f"data/{i}.wav": b"x" for i in range(count)}, mode="w"))
        tracemalloc.start()
        list(clips.read({"data/missing.wav"}))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 200_000  # 3,500 more members kept would be over 2 MB more


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.77, 0.9])
def test_a_truncated_tar_gives_what_came_before_and_then_an_error(tmp_path, mode, share):
    path = write_tar(tmp_path / "a.tar.gz", mode=mode)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    got = []
    with pytest.raises(UserError) as caught:
        got.extend(TarClips(path).read(set(MEMBERS)))
    assert got == list(MEMBERS.items())[: len(got)]
    assert len(got) >= int(len(MEMBERS) * share) - 2
    assert str(path) in str(caught.value)
    assert "cut short after byte" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plain_tar_cut_between_two_members_is_an_error(tmp_path):
    """tarfile itself takes the end of the file for the end of the archive: thousands of clips would be missing."""
    path = write_tar(tmp_path / "a.tar", mode="w")
    with tarfile.open(path) as tar:
        boundary = tar.getmember("datashare/data/clip20.wav").offset
    for cut in (boundary, boundary + 100, boundary + 512):
        path.write_bytes(write_tar(tmp_path / "whole.tar", mode="w").read_bytes()[:cut])
        got = []
        with pytest.raises(UserError, match="clip"):
            got.extend(TarClips(path).read(set(MEMBERS)))
        assert len(got) == 20


def test_a_damaged_header_is_an_error_not_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", mode="w")
    with tarfile.open(path) as tar:
        offset = tar.getmember("datashare/data/clip20.wav").offset
    damaged = bytearray(path.read_bytes())
    damaged[offset + 10] ^= 255
    path.write_bytes(damaged)
    got = []
    with pytest.raises(UserError, match=r"at datashare/data/clip19.wav \(bad checksum\)"):
        got.extend(TarClips(path).read(set(MEMBERS)))
    assert len(got) == 20


def test_damage_inside_the_compressed_stream_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 2000] = bytes(2000)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="damaged"):
        read(path, {*MEMBERS, "data/missing.wav"})


def test_a_wrong_checksum_at_the_end_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz")
    damaged = bytearray(path.read_bytes())
    damaged[-8] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="CRC"):
        read(path, {*MEMBERS, "data/missing.wav"})


def test_a_gzip_file_of_several_members_is_read_through(tmp_path):
    plain = write_tar(tmp_path / "plain.tar", mode="w").read_bytes()
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(plain[:70_001]) + gzip.compress(plain[70_001:]))
    assert read(path) == list(MEMBERS.items())


@pytest.mark.parametrize("text", [b"", b"this is no tar", b"PK\x03\x04" + bytes(600), b"x" * 2000])
def test_a_file_that_is_no_tar_is_refused(tmp_path, text):
    (tmp_path / "a.tar.gz").write_bytes(text)
    with pytest.raises(UserError, match=r"a\.tar\.gz: damaged or cut short"):
        read(tmp_path / "a.tar.gz")


@pytest.mark.parametrize(
    ("name", "attributes", "expected"),
    [
        ("datashare/../../evil.wav", {}, "an unsafe path: 'datashare/../../evil.wav'"),
        ("../evil.wav", {}, "an unsafe path: '../evil.wav'"),
        ("/etc/evil.wav", {}, "an unsafe path: '/etc/evil.wav'"),
        ("datashare/link.wav", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link or device"),
        ("datashare/hard.wav", {"type": tarfile.LNKTYPE, "linkname": "data/clip00.wav"}, "a link or device"),
        ("datashare/null.wav", {"type": tarfile.CHRTYPE}, "a link or device"),
        ("datashare/pipe.wav", {"type": tarfile.FIFOTYPE}, "a link or device"),
    ],
)
def test_unsafe_members_are_refused_by_name(tmp_path, name, attributes, expected):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "datashare/data/clip00.wav", b"sound")
        add(tar, name, **attributes)
        add(tar, "datashare/data/clip01.wav", b"sound")
    got = []
    with pytest.raises(UserError) as caught:
        got.extend(TarClips(path).read({"data/clip00.wav", "data/clip01.wav"}))
    assert got == [("data/clip00.wav", b"sound")]
    assert expected in str(caught.value)
    assert name in str(caught.value)


def test_files_are_given_as_paths_in_their_order(tmp_path):
    for number in (2, 0, 3):
        (tmp_path / f"{number}.wav").write_bytes(bytes(10 * number))
    (tmp_path / "4.wav").mkdir()
    clips = FileClips({f"id {i}": tmp_path / f"{i}.wav" for i in (3, 2, 1, 0, 4)})
    positions = []
    assert list(clips.read({"id 0", "id 1", "id 3", "id 4"}, positions.append)) == [
        ("id 3", tmp_path / "3.wav"),
        ("id 0", tmp_path / "0.wav"),
    ]
    assert positions[-1] == clips.size_bytes == 50


def test_over_long_names_count_as_missing(tmp_path):
    long = "data/" + "x" * 5000 + ".wav"
    assert list(FileClips({long: tmp_path / long}).read({long})) == []
    with pytest.raises(UserError, match="found neither"):
        folder_or_tar(tmp_path, [long])
