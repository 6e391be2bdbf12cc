"""prepare_dataset.py as a user runs it, on tiny encoders in the published formats."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import prepare_dataset
from common.errors import UserError
from common.files import locked
from embedding_models import MuQEmbeddingModel, MusiCNNModel
from helpers.small_musicbench import SmallMusicBench, clip, row, wav_bytes
from preparing.work_file import DONE, WorkFile
from store.reading import SPLITS, EmbeddingStore
from store.verifying import faults

ROOT = Path(prepare_dataset.__file__).parent


@pytest.fixture
def prepare(tmp_path, tiny_models, monkeypatch):
    """Run prepare_dataset.py in a folder of its own; MuQ alone unless told otherwise."""
    monkeypatch.chdir(tmp_path)

    def run(dataset, *flags, encoders=("muq",)):
        return prepare_dataset.main(arguments(tiny_models, dataset, *flags, encoders=encoders))

    return run


def arguments(models, dataset, *flags, encoders=("muq",)):
    fixed = ["--dataset", str(dataset), "--output-dir", "out", "--device", "cpu", "--batch-size", "4"]
    fixed += ["--muq-model", str(models / "muq_mulan"), "--muq-backbone", str(models / "muq_large")]
    fixed += ["--mert-model", str(models / "mert"), "--latent-model", str(models / "music2latent")]
    return [*fixed, "--encoders", *encoders, *flags]


def skipped(path="out/embeddings.h5"):
    return dict(EmbeddingStore(path).skipped())


def one_thread():
    """The environment of processes that run side by side: more threads than cores would only slow them down."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def contents(path):
    """Everything in a store but its vectors."""
    store = EmbeddingStore(path)
    columns = ("audio_id", "source_id", "caption", "caption_kind")
    strings = {(name, column): getattr(store.split(name), column) for name in SPLITS for column in columns}
    return strings, {name: store.split(name).caption_audio.tolist() for name in SPLITS}, store.skipped()


def assert_same_store(path, expected, tolerance=1e-5):
    assert contents(path) == contents(expected)
    a, b = EmbeddingStore(path), EmbeddingStore(expected)
    assert a.header == b.header
    for name in SPLITS:
        for encoder in a.encoders:
            x, y = np.array(a.vectors(name, encoder)), np.array(b.vectors(name, encoder))
            assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


def test_three_encoders_from_a_tar(prepare, tmp_path, tiny_models):
    data_set = SmallMusicBench(train_sources=8, copies=1, test=3)
    assert prepare(data_set.write(tmp_path / "data"), encoders=("muq", "mert", "latent")) == 0
    store = EmbeddingStore("out/embeddings.h5")
    assert list(store.encoders) == ["muq", "mert", "latent"]
    assert list(faults(store.path)) == []
    assert sum(len(store.split(name).audio_id) for name in SPLITS) == 19
    assert os.listdir("out") == ["embeddings.h5"]
    test = store.split("test")
    # four captions of a recording, but for the alternative that B repeats from A with the same words
    assert set(test.caption_kind) == {"A/main", "A/alt", "B/main", "B/alt"}
    encoder = MuQEmbeddingModel(tiny_models / "muq_mulan", backbone=tiny_models / "muq_large", device="cpu")
    (tmp_path / "one.wav").write_bytes(wav_bytes(clip(8)))
    expected = encoder.embed_file(tmp_path / "one.wav")
    found = store.vectors("test", "muq")[test.audio_id.index("data/source00008.wav")]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    for name in SPLITS:
        for audio_id, digest in zip(store.split(name).audio_id, store.digests(name), strict=True):
            assert digest.tobytes() == hashlib.blake2b(data_set.audio[audio_id], digest_size=16).digest()
    log = Path("prepare_dataset.log").read_text()
    assert "train" in log
    assert "skipped  none" in log


def test_musicnn_by_name_beside_the_others(prepare, tmp_path, capsys):
    data = SmallMusicBench(train_sources=4, copies=1, test=2).write(tmp_path / "data")
    names = ("muq", "mert", "latent", "musicnn")
    assert prepare(data, "--plan", encoders=names) == 0
    plan = capsys.readouterr().out
    assert "musicnn: MSD_musicnn, weights ISC (commercial use allowed)" in plan
    assert "pip install --no-deps musicnn==0.1.0: 0.03 GB" in plan
    assert prepare(data, encoders=names) == 0
    store = EmbeddingStore("out/embeddings.h5")
    assert tuple(store.encoders) == names
    assert list(faults(store.path)) == []
    entry = store.encoders["musicnn"]
    assert (entry["id"], entry["revision"], entry["dim"], entry["sample_rate"]) == (
        "MSD_musicnn",
        "0.1.0",
        2259,
        16_000,
    )
    (tmp_path / "one.wav").write_bytes(wav_bytes(clip(4)))
    expected = MusiCNNModel(device="cpu").embed_file(tmp_path / "one.wav")
    test = store.split("test")
    found = store.vectors("test", "musicnn")[test.audio_id.index("data/source00004.wav")]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_extracted_folder_and_float16_and_limit(prepare, tmp_path):
    data = SmallMusicBench().write(tmp_path / "data", tar=False)
    prepare(data, "--dtype", "float16", "--limit", "2")
    store = EmbeddingStore("out/embeddings.h5")
    assert store.header.dtype == "float16"
    assert [len(store.split(name).audio_id) for name in SPLITS] == [2, 2, 2]


def test_tf32_is_stored_as_float32_and_is_not_float32(prepare, tmp_path):
    data = SmallMusicBench(4).write(tmp_path / "data")
    prepare(data, "--dtype", "tf32")
    store = EmbeddingStore("out/embeddings.h5")
    assert store.header.dtype == "float32"
    assert {entry["precision"] for entry in store.encoders.values()} == {"tf32"}
    with pytest.raises(UserError, match=r"muq precision: .tf32. there"):
        prepare(data)  # none of its vectors is as precise
    prepare(data, "--overwrite")
    assert not any("precision" in entry for entry in EmbeddingStore("out/embeddings.h5").encoders.values())


def test_a_failure_to_write_is_one_line(prepare, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WorkFile, "commit", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepare(SmallMusicBench(4).write(tmp_path / "data"))


def test_own_recordings(prepare, tmp_path):
    lines = []
    for number in range(10):
        (tmp_path / f"song {number}.wav").write_bytes(wav_bytes(clip(number, 21, 22_050, 2), 22_050))
        lines.append(f'{{"audio": "song {number}.wav", "captions": ["song {number}", "piece {number}"]}}')
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    prepare(tmp_path / "mine.jsonl", "--val-fraction", "0.2")
    store = EmbeddingStore("out/embeddings.h5")
    assert [len(store.split(name).audio_id) for name in SPLITS] == [6, 2, 2]
    assert list(faults(store.path)) == []


def test_the_same_command_again_changes_nothing(prepare, tmp_path, capsys):
    data = SmallMusicBench(4).write(tmp_path / "data")
    prepare(data)
    before = Path("out/embeddings.h5").read_bytes()
    prepare(data)
    assert Path("out/embeddings.h5").read_bytes() == before
    assert "complete already" in capsys.readouterr().out


def test_bad_recordings_are_skipped_with_their_reason(prepare, tmp_path):
    data = SmallMusicBench(train_sources=12, copies=0)
    names = list(data.audio)
    data.audio[names[0]] = data.audio[names[0]][:-30_000]
    data.audio[names[1]] = b""
    data.audio[names[2]] = b"these are the words of a text file, renamed\n" * 100
    data.audio[names[3]] = wav_bytes(np.full((160_000, 1), np.nan), subtype="FLOAT")
    data.audio[names[4]] = wav_bytes(clip(4, 0.05))
    del data.audio[names[5]]
    prepare(data.write(tmp_path / "data"), "--val-fraction", "0.2")
    assert skipped() == {
        names[0]: "unreadable",
        names[1]: "unreadable",
        names[2]: "unreadable",
        names[3]: "not finite",
        names[4]: "too short",
        names[5]: "missing",
    }
    store = EmbeddingStore("out/embeddings.h5")
    kept = [audio_id for name in SPLITS for audio_id in store.split(name).audio_id]
    assert sorted(kept) == names[6:]
    assert list(faults(store.path)) == []
    log = Path("prepare_dataset.log").read_text()
    assert f"skipped {names[0]}: unreadable" in log
    assert "missing: 1, not finite: 1, too short: 1, unreadable: 3" in log


def test_odd_recordings_are_handled(prepare, tmp_path):
    data = SmallMusicBench(train_sources=10, copies=0)
    names = list(data.audio)
    data.audio[names[0]] = wav_bytes(clip(0, 10, 16_000, 8))
    data.audio[names[1]] = wav_bytes(clip(1, 10, 192_000), 192_000)
    data.audio[names[2]] = wav_bytes(np.zeros((160_000, 1)))
    data.train[3]["alt_caption"] = ""
    data.train[4]["main_caption"] = None
    data.train.append(row(names[5], "a third caption of one recording", "a fourth"))
    data.train[6]["alt_caption"] = data.train[6]["main_caption"] = " "
    prepare(data.write(tmp_path / "data"))
    assert skipped() == {names[6]: "no caption"}
    store = EmbeddingStore("out/embeddings.h5")
    captions = {}
    for name in ("train", "val"):
        split = store.split(name)
        for audio, text in zip(split.caption_audio, split.caption, strict=True):
            captions.setdefault(split.audio_id[audio], []).append(text)
    assert sorted(captions) == [name for name in names[:10] if name != names[6]]
    assert captions[names[3]] == ["clip 3 main"]
    assert captions[names[4]] == ["clip 4 alt"]
    assert captions[names[5]] == ["clip 5 main", "clip 5 alt", "a third caption of one recording", "a fourth"]


def test_malformed_json_names_its_line(prepare, tmp_path):
    folder = SmallMusicBench(4).write(tmp_path / "data")
    with open(folder / "MusicBench_train.json", "a") as file:
        file.write('{"location": "data/x.wav", \n')
    with pytest.raises(UserError, match=r"MusicBench_train\.json, line 9"):
        prepare(folder)


def test_a_member_that_climbs_out_is_refused(prepare, tmp_path):
    data = SmallMusicBench(4)
    data.audio = {"../../evil.wav": b"x", **data.audio}
    with pytest.raises(UserError, match=r"evil\.wav"):
        prepare(data.write(tmp_path / "data"))


def test_a_truncated_tar_stops_and_goes_on_when_mended(prepare, tmp_path):
    folder = SmallMusicBench(10).write(tmp_path / "data")
    tar = folder / "MusicBench.tar.gz"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"MusicBench\.tar\.gz"):
        prepare(folder)
    work = WorkFile(Path("out/embeddings.shard-0-of-1.h5"))
    done = int((work.states == DONE).sum())
    work.close()
    assert 4 <= done < 23
    assert set(np.unique(work.states)) <= {0, DONE}  # what did not come is to do, not missing
    tar.write_bytes(whole)
    prepare(folder)
    assert skipped() == {}
    assert list(faults("out/embeddings.h5")) == []


def test_wrong_folders_are_one_line(prepare, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        prepare(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"MusicBench_train\.json"):
        prepare(tmp_path / "empty")
    data = SmallMusicBench(4).write(tmp_path / "data")
    with pytest.raises(UserError, match="expected to write there"):
        prepare(data, "--output-dir", str(data / "MusicBench_train.json"))


def test_audio_of_another_data_set_is_an_error_not_a_skip(prepare, tmp_path):
    data = SmallMusicBench(4)
    data.audio = {f"data/other{number}.wav": content for number, content in enumerate(data.audio.values())}
    with pytest.raises(UserError, match=r"none of the 11 recordings"):
        prepare(data.write(tmp_path / "data"))


def test_a_store_cut_in_half_is_one_line(prepare, tmp_path):
    data = SmallMusicBench(4).write(tmp_path / "data")
    prepare(data)
    os.truncate("out/embeddings.h5", os.path.getsize("out/embeddings.h5") // 2)
    with pytest.raises(UserError, match=r"embeddings\.h5: .*truncated"):
        prepare(data)
    with pytest.raises(UserError, match=r"embeddings\.h5: .*truncated"):
        prepare_dataset.main(["--verify", "out/embeddings.h5"])


def test_verify_tells_good_from_bad(prepare, tmp_path, capsys):
    prepare(SmallMusicBench(4).write(tmp_path / "data"))
    assert prepare_dataset.main(["--verify", "out/embeddings.h5"]) == 0
    assert "good" in capsys.readouterr().out
    with h5py.File("out/embeddings.h5", "r+") as file:
        file["val/muq_embeddings"][0] = np.nan
    assert prepare_dataset.main(["--verify", "out/embeddings.h5"]) == 1
    assert "not finite" in capsys.readouterr().out


def test_a_shard_that_is_being_computed_is_refused(prepare, tmp_path):
    data = SmallMusicBench(4).write(tmp_path / "data")
    Path("out").mkdir()
    with (
        locked(Path("out/embeddings.shard-0-of-1.lock")),
        pytest.raises(UserError, match="another process is computing shard 0 of 1"),
    ):
        prepare(data)
    prepare(data)


def test_another_number_of_shards_is_refused(prepare, tmp_path):
    data = SmallMusicBench(4).write(tmp_path / "data")
    prepare(data, "--split-id", "0", "--num-splits", "2")
    assert not Path("out/embeddings.h5").exists()
    with pytest.raises(UserError, match="--num-splits"):
        prepare(data)
    prepare(data, "--split-id", "1", "--num-splits", "2")
    assert list(faults("out/embeddings.h5")) == []


def test_arguments_out_of_range_are_listed_at_once(prepare, tmp_path):
    with pytest.raises(UserError, match=r"--batch-size 0.*--split-id 3"):
        prepare(tmp_path, "--batch-size", "0", "--split-id", "3")


def test_two_shards_at_once_equal_a_single_run(prepare, tmp_path, tiny_models):
    data = SmallMusicBench(train_sources=4, copies=1, test=2)
    del data.audio["data/source00003.wav"]
    folder = data.write(tmp_path / "data")
    every = ("muq", "mert", "latent")
    prepare(folder, "--output-dir", "single", encoders=every)
    processes = []
    for shard in range(2):
        flags = arguments(tiny_models, folder, "--split-id", str(shard), "--num-splits", "2", encoders=every)
        command = [sys.executable, str(ROOT / "prepare_dataset.py"), *flags]
        processes.append(
            subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=one_thread())
        )
    assert [process.wait() for process in processes] == [0, 0]
    assert_same_store("out/embeddings.h5", "single/embeddings.h5")
    assert os.listdir("out") == ["embeddings.h5"]
    log = Path("prepare_dataset.log").read_text()
    for shard in range(2):
        assert f"shard {shard} of 2" in log


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, resized by calling it with a number of kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")

    def resize(kilobytes):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)
        return folder

    yield resize
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_found_before_and_nothing_is_lost(prepare, tmp_path, small_disk):
    data = SmallMusicBench(train_sources=30, copies=0)
    del data.audio["data/source00007.wav"]  # a skipped row makes the finished rows be copied
    folder = data.write(tmp_path / "data")
    output = str(small_disk(64))
    with pytest.raises(UserError, match=r"disk: .* needs .* are free"):
        prepare(folder, "--output-dir", output)
    small_disk(200)  # room for the shard, not for its copy
    with pytest.raises(UserError, match=r"copying the finished rows"):
        prepare(folder, "--output-dir", output)
    work = WorkFile(Path(output) / "embeddings.shard-0-of-1.h5")
    assert (work.states == DONE).sum() == 32
    work.close()
    small_disk(2000)
    prepare(folder, "--output-dir", output)
    assert list(faults(Path(output) / "embeddings.h5")) == []
