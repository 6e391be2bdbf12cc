"""prepare_dataset.py where a finished store is there: what has changed, what is taken from it and what is computed."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from test_prepare_dataset import arguments

import prepare_dataset
from common.errors import UserError
from embedding_models.base import AudioEmbeddingModel
from helpers.small_musicbench import SmallMusicBench, clip, wav_bytes
from preparing.changes import next_store_lines
from store.reading import SPLITS, EmbeddingStore
from store.verifying import faults

STORE = Path("out/embeddings.h5")
ALL = ("muq", "mert", "latent")


class Table:
    """A table of one-second recordings with two captions each, and their files; change `captions`, then `write`."""

    def __init__(self, recordings):
        self.captions = {}
        self.add(range(recordings))

    def add(self, numbers):
        for number in numbers:
            self.captions[f"song {number}.wav"] = [f"song {number}", f"piece {number}"]
            Path(f"song {number}.wav").write_bytes(wav_bytes(clip(number, 1.0)))

    def write(self, name="mine.jsonl"):
        lines = [json.dumps({"audio": audio, "captions": texts}) for audio, texts in self.captions.items()]
        Path(name).write_text("\n".join(lines))
        return name


@pytest.fixture
def prepare(tmp_path, tiny_models, monkeypatch):
    """Run prepare_dataset.py in a folder of its own and return how many vectors each encoder computed."""
    monkeypatch.chdir(tmp_path)
    counts, begin = Counter(), AudioEmbeddingModel.begin

    def counted(self, waveforms):
        counts[self.name] += len(waveforms)
        return begin(self, waveforms)

    monkeypatch.setattr(AudioEmbeddingModel, "begin", counted)

    def run(dataset, *flags, encoders=("muq",)):
        counts.clear()
        assert prepare_dataset.main(arguments(tiny_models, dataset, *flags, encoders=encoders)) == 0
        return dict(counts)

    return run


def vectors_by_id(path=STORE):
    """(space, audio id) -> the bytes of the vector."""
    store = EmbeddingStore(path)
    return {
        (space, audio_id): vector.tobytes()
        for name in SPLITS
        for space in store.encoders
        for audio_id, vector in zip(store.split(name).audio_id, store.vectors(name, space), strict=True)
    }


def captions_by_id(path=STORE):
    store, found = EmbeddingStore(path), {}
    for split in map(store.split, SPLITS):
        for row, text in zip(split.caption_audio, split.caption, strict=True):
            found.setdefault(split.audio_id[row], []).append(text)
    return found


def log():
    return Path("prepare_dataset.log").read_text()


def test_more_recordings_other_captions_and_one_more_encoder(prepare):
    table = Table(12)
    prepare(table.write(), encoders=ALL)
    before = vectors_by_id()
    table.add(range(12, 16))
    table.captions["song 3.wav"] = ["song 3", "an edited caption"]
    table.captions["song 4.wav"].append("one more")
    table.captions["song 5.wav"].pop()
    del table.captions["song 6.wav"]
    assert prepare(table.write(), encoders=(*ALL, "musicnn")) == {"muq": 4, "mert": 4, "latent": 4, "musicnn": 15}
    after = vectors_by_id()
    assert {key: after[key] for key in before if key[1] != "song 6.wav"} == {
        key: vector for key, vector in before.items() if key[1] != "song 6.wav"
    }
    assert captions_by_id() == table.captions
    assert list(faults(STORE)) == []  # the statistics are those of the new train rows
    assert os.listdir("out") == ["embeddings.h5"]
    assert "recordings: 4 new, 1 gone" in log()
    assert "captions of the others: 1 changed, 1 new, 1 gone" in log()
    assert "musicnn: not in the store" in log()
    assert "vectors taken from the store before: muq 11, mert 11, latent 11" in log()
    assert "vectors computed: muq 4, mert 4, latent 4, musicnn 15" in log()
    made = STORE.read_bytes()
    assert prepare(table.write(), encoders=(*ALL, "musicnn")) == {}
    assert STORE.read_bytes() == made
    assert "complete already" in log()


def test_a_grown_store_is_the_one_made_anew(prepare):
    table = Table(10)
    prepare(table.write(), "--output-dir", "grown")
    table.add(range(10, 14))
    prepare(table.write(), "--output-dir", "grown", "--seed", "7")
    prepare(table.write(), "--output-dir", "anew", "--seed", "7")
    a, b = EmbeddingStore("grown/embeddings.h5"), EmbeddingStore("anew/embeddings.h5")
    assert a.header == b.header
    for name in SPLITS:
        assert vars(a.split(name)).keys() == vars(b.split(name)).keys()
        assert a.split(name).audio_id == b.split(name).audio_id
        assert a.split(name).caption == b.split(name).caption
        np.testing.assert_array_equal(a.digests(name), b.digests(name))
        x, y = a.vectors(name, "muq"), b.vectors(name, "muq")
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())  # other batches
    np.testing.assert_allclose(a.statistics("muq"), b.statistics("muq"), atol=1e-4)


def test_half_precision_and_another_split_take_every_vector(prepare):
    table = Table(10).write()
    prepare(table)
    before, split = vectors_by_id(), EmbeddingStore(STORE).split("train").audio_id
    assert prepare(table, "--dtype", "float16", "--seed", "8") == {}
    assert EmbeddingStore(STORE).split("train").audio_id != split
    for key, vector in vectors_by_id().items():
        assert vector == np.frombuffer(before[key], np.float32).astype(np.float16).tobytes()
    assert list(faults(STORE)) == []
    with pytest.raises(UserError, match=r"none of its vectors holds for this run; .*\n  dtype: 'float16' there"):
        prepare(table, "--seed", "8")
    assert EmbeddingStore(STORE).header.dtype == "float16"


def test_a_recording_is_known_by_its_sound(prepare):
    table = Table(10)
    prepare(table.write())
    before = vectors_by_id()
    Path("song 1.wav").write_bytes(wav_bytes(clip(77, 1.0)))  # another sound
    os.rename("song 2.wav", "renamed.wav")
    table.captions["renamed.wav"] = table.captions.pop("song 2.wav")
    assert prepare(table.write()) == {"muq": 1}
    after = vectors_by_id()
    assert after["muq", "renamed.wav"] == before["muq", "song 2.wav"]
    assert after["muq", "song 1.wav"] != before["muq", "song 1.wav"]
    assert "of 1 recordings the file is another than then" in log()
    Path("moved").mkdir()
    for name in list(table.captions):
        os.rename(name, f"moved/{name}")
        table.captions[f"moved/{name}"] = table.captions.pop(name)
    assert prepare(table.write()) == {}  # no id is as it was, every sound is


def test_files_that_are_gone_keep_their_vectors(prepare):
    table = Table(10)
    prepare(table.write())
    for name in table.captions:
        os.remove(name)
    table.captions["song 3.wav"] = ["an edited caption"]
    assert prepare(table.write()) == {}
    assert captions_by_id() == table.captions
    assert "the files of 10 recordings are gone; their vectors were taken by the id" in log()
    table.captions["song 10.wav"] = ["its file never was there"]
    with pytest.raises(UserError, match="none of the 11 recordings in the metadata is among its audio files"):
        prepare(table.write())


def test_a_store_without_digests_goes_by_name_and_id(prepare, monkeypatch):
    table = Table(10)
    prepare(table.write())
    before = vectors_by_id()
    monkeypatch.setattr(EmbeddingStore, "digests", lambda *_: None)  # as older versions wrote it
    table.add([10])
    assert prepare(table.write()) == {"muq": 1}
    assert {key: vectors_by_id()[key] for key in before} == before
    assert "it does not say which sound they are of: the data set's name, its revision and the id count" in log()
    assert "10 recordings were taken by their id" in log()
    shutil.copy("mine.jsonl", "other.jsonl")
    assert prepare("other.jsonl", "--seed", "3") == {"muq": 11}  # another data set, for all that is known


def test_what_would_be_lost_is_refused(prepare):
    table = Table(10)
    prepare(table.write(), encoders=("muq", "latent"))
    before = STORE.read_bytes()
    with pytest.raises(UserError, match="also holds latent, which this run would drop; name all in --encoders"):
        prepare(table.write())
    with pytest.raises(UserError, match="with --limit 1, would drop 7 of its 10 recordings"):
        prepare(table.write(), "--limit", "1", encoders=("muq", "latent"))
    table.captions = {}
    table.add(range(20, 30))
    with pytest.raises(UserError, match=r"holds none of the 10 recordings of mine\.jsonl"):
        prepare(table.write(), encoders=("muq", "latent"))
    assert STORE.read_bytes() == before
    assert os.listdir("out") == ["embeddings.h5"]
    assert prepare(table.write(), "--overwrite", encoders=("latent",)) == {"latent": 10}


def test_shards_make_the_next_store_beside_the_old_one(prepare):
    table = Table(10)
    prepare(table.write())
    before = STORE.read_bytes()
    table.add(range(10, 13))
    os.remove("song 11.wav")  # a gap, so that the shards are copied
    first = prepare(table.write(), "--split-id", "0", "--num-splits", "2")
    assert STORE.read_bytes() == before
    with pytest.raises(UserError, match="go on with that number, or remove those shards"):
        prepare(table.write())
    table.captions["song 1.wav"] = ["edited while shards are at work"]
    with pytest.raises(UserError, match="use those, or remove the file:\n  the recordings, their captions"):
        prepare(table.write(), "--split-id", "0", "--num-splits", "2")
    table.captions["song 1.wav"] = ["song 1", "piece 1"]
    second = prepare(table.write(), "--split-id", "1", "--num-splits", "2")
    assert Counter(first) + Counter(second) == {"muq": 2}
    store = EmbeddingStore(STORE)
    assert store.skipped() == [("song 11.wav", "missing")]
    assert sum(len(store.split(name).audio_id) for name in SPLITS) == 12
    assert list(faults(STORE)) == []
    assert os.listdir("out") == ["embeddings.h5"]


def test_a_pinned_data_set_is_not_read_for_what_is_there(prepare, monkeypatch):
    """MusicBench on the hub: of one revision, the archive is only needed for what is missing."""
    data = SmallMusicBench(train_sources=4, copies=0, test=2).write(Path("data"))
    original = prepare_dataset.open_dataset

    def pinned(*args):
        dataset = original(*args)
        dataset.revision = "b141e96"
        return dataset

    monkeypatch.setattr(prepare_dataset, "open_dataset", pinned)
    prepare(data)
    rows = [json.loads(line) for line in (data / "MusicBench_train.json").read_text().splitlines()]
    rows[0]["main_caption"] = "an edited caption"
    (data / "MusicBench_train.json").write_text("\n".join(map(json.dumps, rows)))
    (data / "MusicBench.tar.gz").write_bytes(b"not to be read")
    assert prepare(data) == {}
    assert "an edited caption" in captions_by_id()[rows[0]["location"]]
    digests = np.concatenate([EmbeddingStore(STORE).digests(name) for name in SPLITS])
    assert digests.any(axis=1).all()  # they went along


def test_the_plan_says_what_is_taken_and_what_computed(prepare, tiny_models, capsys):
    def plan(*flags, encoders=("muq",)):
        flags = arguments(tiny_models, table.write(), *flags, encoders=encoders)
        return "\n".join(next_store_lines(prepare_dataset.build_parser().parse_args(flags)))

    table = Table(10)
    assert plan() == ""
    prepare(table.write())
    prepare(table.write(), "--plan")
    assert plan() in capsys.readouterr().out
    before = STORE.read_bytes()
    assert f"{STORE} is what this run makes: nothing is computed" in plan()
    table.add([10, 11])
    table.captions["song 3.wav"] = ["song 3", "an edited caption"]
    said = plan(encoders=("muq", "musicnn"))
    assert "recordings: 2 new; captions of the others: 1 changed" in said
    assert "vectors taken: muq 10" in said
    assert "vectors computed: muq 2, musicnn 12" in said
    assert "vectors taken: muq 10\n            vectors computed: muq 2\n" in plan("--dtype", "float16")
    with pytest.raises(UserError, match="also holds muq"):
        plan(encoders=("musicnn",))
    assert STORE.read_bytes() == before
    size = float(said.split("the new one takes ")[1].split(" GB")[0])
    prepare(table.write(), encoders=("muq", "musicnn"))
    assert os.path.getsize(STORE) / 1e9 == pytest.approx(size, abs=0.001)


def test_an_encoder_is_known_by_its_weights(prepare, tiny_models):
    table = Table(10).write()
    shutil.copytree(tiny_models, "models")
    first = ("--muq-model", "models/muq_mulan", "--muq-backbone", "models/muq_large")
    prepare(table, *first)
    shutil.move("models", "elsewhere")
    moved = ("--muq-model", "elsewhere/muq_mulan", "--muq-backbone", "elsewhere/muq_large")
    assert prepare(table, *moved) == {}
    weights = Path("elsewhere/muq_mulan/model.safetensors")
    tensors = load_file(weights)
    save_file(
        {name: tensor * 1.5 if "audio_to_latents" in name else tensor for name, tensor in tensors.items()}, weights
    )
    with pytest.raises(UserError, match=r"none of its vectors holds for this run; .*\n  weights muq: "):
        prepare(table, *moved)
