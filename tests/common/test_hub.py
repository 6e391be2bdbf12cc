import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time

import pytest

from helpers.hub_server import COMMIT, Hub

LARGE = random.Random(0).randbytes(3_000_000)
DATASET = "amaai-lab/MusicBench"
PINNED = "b141e962aacc19ffd51c15732738040377989203"
FETCH_TAR = f'print(fetch_file({DATASET!r}, "MusicBench.tar.gz", repo_type="dataset"))'
FETCH_MODEL = 'print(fetch_model_folder("lab/model", ["config.json", "*.safetensors"]))'
MAIN = """import common.hub as hub
from common.errors import UserError, run_script
from common.hub import *
from preparing.musicbench import *
from preparing.opening import *
{patience}
def main():
    {code}
run_script(main)"""
HURRY = "hub.RETRY_SECONDS = (0.05,) * 4"


@pytest.fixture
def hub():
    model = {"config.json": b'{"a": 1}', "model.safetensors": LARGE, "pytorch_model.bin": LARGE[::-1], "README.md": b""}
    with Hub({("dataset", DATASET): {"MusicBench.tar.gz": LARGE}, ("model", "lab/model"): model}) as hub:
        yield hub


@pytest.fixture
def start(hub, tmp_path):
    """Start code in a process whose hub is the stand-in: huggingface_hub reads its settings when imported."""

    def start(code, endpoint=None, home=tmp_path, patience=HURRY, **more):
        more = {"HF_ENDPOINT": endpoint or hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | more
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))} | more
        return subprocess.Popen(
            [sys.executable, "-c", MAIN.format(code=code.replace("\n", "\n    "), patience=patience)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run(start):
    """Run code to its end and return (exit code, stdout, stderr)."""

    def run(code, **more):
        process = start(code, **more)
        out, err = process.communicate(timeout=60)
        return process.returncode, out.strip(), err.strip()

    return run


def printed_path(result):
    assert result[0] == 0, result
    return result[1].splitlines()[-1]


def error_line(result):
    """The one line that the user reads at the end; no traceback before it."""
    code, _, err = result
    assert code == 1, result
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def test_a_file_is_downloaded_once(run, hub):
    path = printed_path(run(FETCH_TAR))
    assert read_bytes(path) == LARGE
    assert sum(r.sent for r in hub.downloads()) == len(LARGE)
    assert printed_path(run(FETCH_TAR)) == path
    assert len(hub.downloads()) == 1


def test_a_cached_commit_needs_no_request_at_all(run, hub):
    code = FETCH_TAR.replace("repo_type", f"revision={COMMIT!r}, repo_type")
    path = printed_path(run(code))
    hub.requests.clear()
    assert printed_path(run(code)) == path
    assert hub.requests == []


def test_dropped_connections_are_resumed(run, hub):
    hub.drop_after += [1_000_000, 500_000]
    assert read_bytes(printed_path(run(FETCH_TAR))) == LARGE
    first, second, third = hub.downloads()
    assert (first.range, second.range, third.range) == (None, "bytes=1000000-", "bytes=1500000-")
    assert first.sent + second.sent + third.sent == len(LARGE)


def test_a_killed_download_is_resumed_by_the_next_process(start, run, hub, tmp_path):
    hub.seconds_per_piece = 0.02
    process = start(FETCH_TAR)
    while not (hub.downloads() and hub.downloads()[0].sent > 1_500_000):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = tmp_path.rglob("*.incomplete")
    kept = partial.stat().st_size
    assert kept >= 1_000_000
    hub.seconds_per_piece = 0
    assert read_bytes(printed_path(run(FETCH_TAR))) == LARGE
    assert hub.downloads()[1].range == f"bytes={kept}-"
    assert sum(r.sent for r in hub.downloads()) < 1.8 * len(LARGE)
    assert not list(tmp_path.rglob("*.incomplete"))


def test_two_processes_download_once(start, hub):
    hub.seconds_per_piece = 0.005
    processes = [start(FETCH_TAR) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert read_bytes(outputs[0]) == LARGE
    assert len(hub.downloads()) == 1


def test_a_hub_that_ignores_the_range_starts_the_file_anew(run, hub):
    hub.drop_after, hub.ignore_range = [1_000_000], True
    assert read_bytes(printed_path(run(FETCH_TAR))) == LARGE


def test_damaged_content_is_refused_and_fetched_again(run, hub, tmp_path):
    hub.damage = True
    assert "what was downloaded is damaged" in error_line(run(FETCH_TAR))
    assert not list(tmp_path.rglob("*.incomplete"))
    hub.damage = False
    assert read_bytes(printed_path(run(FETCH_TAR))) == LARGE


@pytest.mark.parametrize("header", [{"Retry-After": "2"}, {"RateLimit": '"api";r=0;t=2'}, {"Retry-After": "date"}, {}])
def test_too_many_requests_then_success(run, hub, header):
    if header == {"Retry-After": "date"}:
        header = {"Retry-After": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 5))}
    hub.busy = [header]
    began = time.monotonic()
    assert read_bytes(printed_path(run(FETCH_TAR, patience=""))) == LARGE
    seconds = time.monotonic() - began
    assert seconds > (2 if header else 1)
    assert [r.status for r in hub.requests[:2]] == [429, 302]


def test_too_many_requests_in_the_middle_of_a_download(run, hub):
    hub.drop_after, hub.busy_after_drop = [1_000_000], [{"Retry-After": "1"}]
    assert read_bytes(printed_path(run(FETCH_TAR))) == LARGE
    assert 429 in [r.status for r in hub.requests]
    assert hub.downloads()[1].range == "bytes=1000000-"


def test_too_many_requests_for_too_long_is_one_line(run, hub):
    hub.always_busy = True
    line = error_line(run(FETCH_TAR))
    assert "429 Too Many Requests" in line
    assert "--dataset" in line
    assert len(hub.requests) == 5


def test_a_wait_of_hours_is_not_waited_for(run, hub):
    hub.busy = [{"Retry-After": "90000"}]
    assert "429" in error_line(run(FETCH_TAR))
    assert len(hub.requests) == 1


def test_offline_with_and_without_cache(run, hub):
    assert "HF_HUB_OFFLINE is set" in error_line(run(FETCH_TAR, HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE is set" in error_line(run(FETCH_MODEL, HF_HUB_OFFLINE="1"))
    assert hub.requests == []
    tar, model = printed_path(run(FETCH_TAR)), printed_path(run(FETCH_MODEL))
    hub.requests.clear()
    assert printed_path(run(FETCH_TAR, HF_HUB_OFFLINE="1")) == tar
    assert printed_path(run(FETCH_MODEL, HF_HUB_OFFLINE="1")) == model
    assert hub.requests == []


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_no_network_with_and_without_cache(run, hub):
    line = error_line(run(FETCH_TAR, endpoint=closed_port()))
    assert "cannot be reached" in line
    assert "check the network" in line
    assert "cannot be reached" in error_line(run(FETCH_MODEL, endpoint=closed_port()))
    tar, model = printed_path(run(FETCH_TAR)), printed_path(run(FETCH_MODEL))
    code, out, err = run(FETCH_TAR + "\n" + FETCH_MODEL, endpoint=closed_port())
    assert (code, out.splitlines()) == (0, [tar, model])
    assert "using the cached" in err


REFUSALS = {
    'fetch_file("lab/none", "a")': "no such repository",
    'fetch_file("lab/gated", "a")': "access is gated",
    'fetch_file("lab/model", "none.bin")': "no such file",
    'fetch_file("lab/model", "config.json", revision="none")': "no such revision",
    'fetch_file("./none", "a")': "found no such folder",
    'fetch_model_folder("lab/none", ["*"])': "no such repository",
    'fetch_model_folder("lab/gated", ["*"])': "access is gated",
    'fetch_model_folder("lab/model", ["*.gguf"])': "expected *.gguf, found no such file",
    'fetch_model_folder("./models/none", ["*"])': "found no such folder",
    'fetch_model_folder("a/b/c", ["*"])': "found no such folder",
    'fetch_model_folder("pyproject.toml", ["*"])': "found a file",
    'file_sizes("lab/none", ["*"])': "no such repository",
    'resolved_revision("lab/none")': "no such repository",
    'resolved_revision("lab--none..")': "found no such folder",
}


def test_refusals_are_one_line(run, hub):
    hub.gated.add("lab/gated")
    code = f"""for call in {list(REFUSALS)!r}:
    try:
        print("no error", eval(call))
    except UserError as error:
        print(str(error).replace(chr(10), " NEW LINE "))"""
    code_, out, err = run(code)
    assert code_ == 0, err
    for line, (call, expected) in zip(out.splitlines(), REFUSALS.items(), strict=True):
        assert expected in line, call
        assert "NEW LINE" not in line
        assert "no error" not in line


def test_an_address_that_is_no_hub_is_named(run, hub):
    hub.repos.clear()
    assert "error: " in error_line(run(FETCH_TAR, endpoint=f"{hub.url}/nothing"))


def test_only_what_matches_of_a_model_is_downloaded(run, hub):
    folder = printed_path(run(FETCH_MODEL))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert read_bytes(f"{folder}/model.safetensors") == LARGE
    assert len(hub.downloads()) == 1


def test_a_local_folder_is_returned_as_it_is(run, hub, tmp_path):
    code = f"print(fetch_model_folder({str(tmp_path)!r}, ['*']), resolved_revision({str(tmp_path)!r}))"
    assert run(code)[1] == f"{tmp_path} None"
    assert hub.requests == []


def test_the_commit_is_known_online_and_from_the_cache(run, hub):
    code = 'print(resolved_revision("lab/model"))'
    assert "HF_HUB_OFFLINE" in error_line(run(code, HF_HUB_OFFLINE="1"))
    assert run(code)[1] == COMMIT
    printed_path(run(FETCH_MODEL))
    assert run(code, HF_HUB_OFFLINE="1")[1] == COMMIT


def test_sizes_are_asked_for_without_a_download(run, hub):
    assert run('print(file_sizes("lab/model", ["*.safetensors", "*.json"]))')[1] == str(
        {"config.json": 8, "model.safetensors": len(LARGE)}
    )
    assert hub.downloads() == []
    code = "sizes, origin = download_sizes('main'); print(sizes); print(origin)"
    assert run(code)[1].splitlines() == [str({"MusicBench.tar.gz": len(LARGE)}), f"asked of {hub.url}"]
    sizes, origin = run(code, endpoint=closed_port())[1].splitlines()
    assert sizes == "{'MusicBench.tar.gz': 16757993240}"
    assert origin.startswith("published size")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_named_before_and_while_downloading(run, hub, tmp_path):
    home = tmp_path / "small"
    home.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", home], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        line = error_line(run(FETCH_TAR, home=home))
        assert "are still to be downloaded" in line
        assert hub.downloads() == []
        blind = "import types; hub.shutil = types.SimpleNamespace(disk_usage=lambda _: types.SimpleNamespace(free=1e9))"
        assert "is full" in error_line(run(FETCH_TAR, home=home, patience=blind))
    finally:
        subprocess.run(["umount", home], check=True)


def test_musicbench_comes_from_the_hub_end_to_end(run, hub):
    def lines(*locations):
        rows = [{"location": name, "main_caption": f"main {name}", "alt_caption": "alt"} for name in locations]
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    train, test = ["data/aaaaaaaaaaa.wav", "data/bbbbbbbbbbb.wav"], ["data/ccccccccccc.wav"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in train + test:
            member = tarfile.TarInfo(f"datashare/{name}")
            member.size = len(LARGE) // 3
            tar.addfile(member, io.BytesIO(LARGE))
    hub.repos["dataset", DATASET] = {
        "MusicBench_train.json": lines(*train),
        "MusicBench_test_A.json": lines(*test),
        "MusicBench_test_B.json": lines(*test),
        "MusicBench.tar.gz": buffer.getvalue(),
    }
    code = """dataset = open_dataset(revision="main")
print(dataset.name, dataset.revision, [r.split for r in dataset.recordings], hasattr(dataset.clips, "path"))
dataset.clips.prepare()
print([(name, len(data)) for name, data in dataset.clips.read({r.audio_id for r in dataset.recordings})])"""
    code_, out, err = run(code)
    assert code_ == 0, err
    assert out.splitlines() == [
        f"{DATASET} {COMMIT} ['train', 'val', 'test'] False",
        str([(name, len(LARGE) // 3) for name in train + test]),
    ]
    assert run(code, HF_HUB_OFFLINE="1")[1] == out
    assert "no such revision" in error_line(run(code.replace('revision="main"', "")))  # the pinned one is asked for
    assert any(PINNED in r.path for r in hub.requests)
