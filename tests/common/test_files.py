"""Files beside and renamed, and locks: two processes at once, kills, a full disk."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from common.errors import UserError
from common.files import lock_holder, locked, replacing

MB = 1 << 20


def in_child(function):
    """Run it in a forked process; returns its exit code, -9 for one that was killed."""
    child = os.fork()
    if not child:
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write(path, content, previous=None):
    with replacing(path, previous) as beside:
        beside.write_bytes(content)


def test_old_until_new_is_whole(tmp_path):
    path = tmp_path / "a file [1].txt"
    write(path, b"old")
    with replacing(path) as beside:
        beside.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == [path.name]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    write(path, b"old")

    def fail():
        with replacing(path, tmp_path / "previous") as beside:
            beside.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_one_before_is_kept(tmp_path):
    path, previous = tmp_path / "file", tmp_path / "file.prev"
    for content in (b"1", b"2", b"3"):
        write(path, content, previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_before_any_call(tmp_path, monkeypatch, call):
    """The old file or the new one stands at any instant, or the old one as the previous; the rest is cleared up."""
    path, previous = tmp_path / "file", tmp_path / "file.prev"
    original = getattr(os, call)
    for fatal in (1, 2):
        write(path, b"old")

        def killed(fatal=fatal):
            calls = []

            def counted(*args):
                calls.append(args)
                if len(calls) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args)

            setattr(os, call, counted)
            write(path, b"new", previous)

        assert in_child(killed) == -signal.SIGKILL
        assert (path if path.exists() else previous).read_bytes() in (b"old", b"new")
        write(path, b"newer")
        assert path.read_bytes() == b"newer"
        assert {each.name for each in tmp_path.iterdir()} <= {"file", "file.prev"}


def test_two_processes_at_once(tmp_path):
    """Whole files alone are ever seen, and neither process takes the other's away."""
    path = tmp_path / "file"
    children = []
    for letter in (b"a", b"b"):
        child = os.fork()
        if not child:
            for _ in range(60):
                write(path, letter * MB)
            os._exit(0)
        children.append(child)
    seen = set()
    while children:
        if path.exists():
            content = path.read_bytes()
            assert len(content) == MB
            seen.add(content[:1])
            assert content == content[:1] * MB
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
    assert seen == {b"a", b"b"}
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write(path, b"old")

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MB, MB))
        try:
            write(path, bytes(2 * MB))
        except OSError:
            os._exit(7)

    assert in_child(full) == 7
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def holder(path):
    code = (
        "import sys, time; from pathlib import Path; from common.files import locked\n"
        "with locked(Path(sys.argv[1]), 'busy'): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / "shard.lock"
    process = holder(path)
    with pytest.raises(UserError, match=rf"^busy \(process {process.pid} \(.*python.*\)\)$"), locked(path, "busy"):
        pass
    process.kill()
    process.wait()
    with locked(path, "busy"):
        assert lock_holder(path) is not None
    assert not path.exists()
    assert lock_holder(path) is None


def test_waiting_processes_have_it_in_turn(tmp_path):
    """The file of the lock is removed by each; none works beside another because of that."""
    count = tmp_path / "count"
    count.write_text("0")

    def add():
        for _ in range(40):
            with locked(tmp_path / "lock"):
                number = int(count.read_text())
                count.write_text(str(number + 1))

    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            add()
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert count.read_text() == "120"


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="lock: expected to write there and lock it"), locked(tmp_path / "file/lock"):
        pass
