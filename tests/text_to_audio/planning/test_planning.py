import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config

import train
from benchmarks.preparing.full_size import QWEN3_SHAPE
from common.errors import UserError
from examples.make_tiny_models import train_tokenizer
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert, make_qwen3
from store.reading import EmbeddingStore
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.model.checkpoints import model_state, save_checkpoint
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.pretrained import resolved_pooling
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.planning.choosing import choose, fewest_layers, tensor_room
from text_to_audio.planning.data import PlannedData
from text_to_audio.planning.duration import is_that_of, operations, time_lines
from text_to_audio.planning.footprint import PARTS, Shape, batch_captions, footprint, text_encoder_on_meta
from text_to_audio.planning.plan import GIB, advice, make_plan, plan_run, propose
from text_to_audio.planning.plan_text import plan_text
from text_to_audio.planning.published import H100, TEXT_MODELS, checkpoint_bytes
from text_to_audio.planning.text_shape import text_model_at_hand


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """64 training recordings in a narrow space and one of MERT's width."""
    path = tmp_path_factory.mktemp("store") / "embeddings.h5"
    header, splits = make_header("float16", {"muq": 6, "mert": 76_800}), make_splits((64, 3, 4))
    write_store(path, header, splits, make_vectors(header, splits))
    return str(path)


@pytest.fixture(scope="module")
def four_billion(tmp_path_factory):
    """Folder of a text model with the widths of Qwen3-Embedding-4B: config.json and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("qwen3_4b")
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    shape = QWEN3_SHAPE | {"num_hidden_layers": 36}
    Qwen3Config(**shape, pad_token_id=end, eos_token_id=end, bos_token_id=None).save_pretrained(folder)
    return str(folder)


def shape_of(recordings=512, dim=76_800, captions=2):
    source = np.arange(recordings)
    return Shape({"muq": dim}, torch.float16, source, np.repeat(source, captions))


def peak_memory(config, shape):
    return footprint(config, shape, train.train_step).peak


def test_default_mert_run_at_published_widths(four_billion):
    config = TrainingConfig(
        "mert", text_model=four_billion, device="cpu", precision="bf16", gradient_checkpointing="on"
    )
    start = time.process_time()
    found = footprint(config, shape_of(), train.train_step)
    assert time.process_time() - start < 60
    assert tuple(found.peak) == PARTS
    assert 10 * GIB < found.total <= 14 * GIB
    assert 4.0e9 < found.parameters - found.trainable < 4.03e9
    assert found.peak["base"] == pytest.approx(2 * (found.parameters - found.trainable), rel=1e-6)
    lora = 33_030_144  # 36 layers, rank 16: 16 x (inputs + outputs) of q, k, v, o, gate, up and down
    head = 2560 * 1024 + 1024 + 1024 * 76_800 + 76_800
    assert found.trainable == lora + head
    assert found.peak["optimizer"] == pytest.approx(8 * found.trainable, rel=1e-3)
    assert found.peak["LoRA"] == 8 * lora
    assert 4 * head < found.peak["heads"] <= 8 * head + 8 * 76_800 + 8
    # each of the 36 layers keeps its input, 32 x 192 tokens x 2560 in bf16
    assert found.peak["activations"] > 36 * 32 * 192 * 2560 * 2
    assert found.peak["logits"] >= 256 * 76_800 * 4  # the batch's recordings
    assert found.peak["bank"] == 0


@pytest.mark.parametrize("text_negatives", ["micro", "batch"])
@pytest.mark.parametrize("audio_negatives", ["micro", "batch"])
def test_more_text_takes_more_activations_and_nothing_else(qwen3, audio_negatives, text_negatives):
    config = TrainingConfig(
        "muq", text_model=qwen3, device="cpu", batch_size=8, gradient_accumulation_steps=4, max_length=96,
        audio_negatives=audio_negatives, text_negatives=text_negatives,
    )  # fmt: skip
    shape = shape_of(dim=1536)
    parts, longer = peak_memory(config, shape), peak_memory(replace(config, max_length=192), shape)
    more = {name for name in PARTS if longer[name] > parts[name]}
    # the peak of long texts may be at another moment than that of short ones
    assert more == {"activations"} | ({"logits"} & more)
    assert sum(longer.values()) > sum(parts.values())


def test_checkpointing_and_precision_count(qwen3):
    config = TrainingConfig("muq", text_model=qwen3, device="cpu", max_length=128, gradient_checkpointing="off")
    shape = shape_of(dim=6)
    off, on = (peak_memory(replace(config, gradient_checkpointing=each), shape) for each in ("off", "on"))
    assert on["activations"] < off["activations"]
    half = peak_memory(replace(config, precision="bf16"), shape)
    assert half["base"] < 0.6 * off["base"]
    assert half["LoRA"] == off["LoRA"]  # float32 in either


def test_checkpoint_sizes_are_those_of_the_files(qwen3, tmp_path):
    config = TrainingConfig("muq", text_model=qwen3, device="cpu")
    found = footprint(config, shape_of(dim=1536), train.train_step)
    encoder = TextEncoder(config)
    head = ProjectionHead(encoder.dim, config.hidden_dim, 1536)
    save_checkpoint(tmp_path / "best.pt", model_state(config, encoder, head))
    assert (tmp_path / "best.pt").stat().st_size == pytest.approx(found.best_bytes, rel=0.02)
    assert found.parameters == 1 + sum(each.numel() for model in (encoder, head) for each in model.parameters())
    assert found.last_bytes == pytest.approx(3 * found.best_bytes, rel=0.02)


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_plan_of_a_store(kind, qwen3, store, tmp_path):
    model = qwen3 if kind == "qwen3" else make_bert(tmp_path)
    for weights in ("model.safetensors", "pytorch_model.bin"):
        assert kind == "qwen3" or not (tmp_path / weights).unlink(missing_ok=True)
    config = TrainingConfig(
        "mert", text_model=model, data_path=store, device="cpu", batch_size=8, gradient_accumulation_steps=2, epochs=3
    )
    plan = make_plan(config, train.train_step)
    assert (plan.captions, plan.recordings, plan.steps, plan.warmup_steps) == (128, 64, 24, 2)
    assert plan.tokens.whole <= plan.tokens.padded < 2 * plan.tokens.whole
    assert plan.read == 0
    assert plan.kept == 64 * 76_800 * 2
    assert plan.proposals == dict.fromkeys((16, 24, 32), (8, 2, 0, plan.footprint.total))
    lines = plan_text(plan).splitlines()
    for part in (*PARTS, "tensors", "CUDA allowance", "fits 16 GB", "steps", "warm-up", "tokens an epoch"):
        assert any(line.strip().startswith(part) for line in lines), part
    assert max(map(len, lines)) <= 120


def test_a_batch_is_no_larger_than_the_sources_allow():
    config = TrainingConfig("muq", batch_size=8, gradient_accumulation_steps=4)
    few = Shape({"muq": 6}, torch.float32, np.array([0] * 10 + [1] * 5), np.arange(15))
    assert batch_captions(config, few) == 2
    assert batch_captions(config, shape_of(1000)) == 32


def test_proposals_halve_the_batch_and_keep_the_effective_one():
    config = TrainingConfig("muq", batch_size=32, gradient_accumulation_steps=8)
    asked = []

    def measure(each):
        asked.append((each.batch_size, each.recomputed_layers))
        assert each.effective_batch_size == 256
        return 10 * 10**9 + each.batch_size * 10**9

    found = propose(config, measure, 36)
    room = {card: tensor_room(card) for card in (16, 24, 32)}
    assert found == {16: (4, 64, 0, 14 * 10**9), 24: (8, 32, 0, 18 * 10**9), 32: (16, 16, 0, 26 * 10**9)}
    assert all(found[card].total <= room[card] < found[card].total * 2 for card in found)
    assert len(asked) == len(set(asked))
    assert propose(config, lambda each: 40 * 10**9, 36) == dict.fromkeys((16, 24, 32))
    odd = TrainingConfig("muq", batch_size=6, gradient_accumulation_steps=2)
    assert propose(odd, lambda each: each.batch_size * 9 * 10**9, 36)[32] == (3, 4, 0, 27 * 10**9)


def test_no_more_layers_are_recomputed_than_the_memory_asks_for():
    config = TrainingConfig("muq")

    def measure(each):  # a layer keeps 1 GB, and 0.1 GB where it is recomputed; then one is there in the backward pass
        kept = 36 - each.recomputed_layers
        return 10 * 10**9 + kept * 10**9 + each.recomputed_layers * 10**8 + (10**9 if not kept else 0)

    for room in range(15 * 10**9, 50 * 10**9, 700_000_000):
        fewest = fewest_layers(config, measure, 36, room)
        assert measure(replace(config, recomputed_layers=fewest)) <= room
        assert fewest <= 1 or measure(replace(config, recomputed_layers=fewest - 2)) > room
    assert fewest_layers(config, measure, 36, 14 * 10**9) is None
    found = propose(config, measure, 36)
    assert found[32].batch_size == found[24].batch_size == config.batch_size
    assert 0 < found[32].recomputed < found[24].recomputed < 36
    assert found[16] is None


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A config says it runs on CUDA, of which so many bytes are free."""
    monkeypatch.setattr(TrainingConfig, "torch_device", property(lambda self: torch.device(self.device)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 * 10**9))
    free = [80 * 10**9]
    return free


def test_auto_is_chosen_from_the_whole_run_and_kept(qwen3, store, on_a_gpu):
    def chosen(before=None, **settings):
        config = TrainingConfig("muq", text_model=qwen3, data_path=store, **{"device": "cuda", **settings})
        choose(config, train.train_step, before)
        return config

    long = chosen(epochs=2000, batch_size=4)
    assert (long.compile, long.recomputed_layers) == ("on", 0)
    assert chosen(epochs=2, batch_size=4).compile == "off"
    assert chosen(epochs=2, compile="on").compile == "on"
    assert (chosen(device="cpu", epochs=2000).compile, chosen(device="cpu").recomputed_layers) == ("off", 0)
    assert chosen(gradient_checkpointing="on").recomputed_layers == -1

    total = {
        n: footprint(replace(long, recomputed_layers=n), shape_of_store(store), train.train_step).total for n in (0, 2)
    }
    tight = (sum(total.values()) / 2 / 0.95 + 2**30) / 1e9
    for settings in ({"memory_gb": tight}, {"memory_gb": tight, "device": "cpu"}):
        assert 0 < chosen(batch_size=4, **settings).recomputed_layers <= 2
    assert chosen(batch_size=4, memory_gb=0.5).recomputed_layers == 2  # it will not fit, but this is the most
    on_a_gpu[0] = int(sum(total.values()) / 2 / 0.95)
    assert 0 < chosen(batch_size=4).recomputed_layers <= 2

    # a run that is gone on with does as it did, on another card and for another number of epochs too
    again = chosen(TrainingConfig.from_dict(long.as_dict(), "muq_last.pt"), epochs=2, batch_size=4)
    assert (again.compile, again.recomputed_layers) == ("on", 0)
    assert chosen(long, gradient_checkpointing="on", batch_size=4).layers_recomputed(2) == 2
    assert chosen(long, memory_gb=tight, batch_size=4).recomputed_layers > 0
    old = TrainingConfig("muq", compile=False)  # what checkpoints from before say
    assert chosen(old, epochs=2000, batch_size=4).compile == "off"


def shape_of_store(path):
    return Shape.of(EmbeddingStore(path), ("muq",))


def test_advice_names_a_batch_size_that_fits(qwen3, store):
    config = TrainingConfig("mert", text_model=qwen3, data_path=store, device="cpu", batch_size=8)
    said = advice(config, train.train_step)
    assert "\n" not in said
    assert "--batch-size 4 --gradient-accumulation-steps 16 (about 2.8 GiB" in said
    assert "effective batch stays 64" in said
    assert "out of memory: try --gradient-checkpointing on (about" in advice(config, train.train_step, free=10**12)
    assert "no smaller batch size fits; try --gradient-checkpointing on" in advice(config, train.train_step, free=10**8)
    assert "try --gradient-checkpointing on" in advice(replace(config, batch_size=1), train.train_step)


def test_what_is_missing_is_said_in_one_line(qwen3, store, tmp_path):
    train_tokenizer().save_pretrained(tmp_path)
    for settings, words in (
        ({"data_path": str(tmp_path / "none.h5"), "text_model": qwen3}, "none.h5: no such file"),
        ({"data_path": store, "text_model": str(tmp_path)}, "found no config.json"),
        ({"data_path": store, "text_model": qwen3, "audio_encoder": "latent"}, "expected vectors of 'latent'"),
    ):
        with pytest.raises(UserError) as error:
            make_plan(TrainingConfig(**{"audio_encoder": "muq", "device": "cpu", **settings}), train.train_step)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_plan_of_a_joint_run_with_bank_cache_and_queue(qwen3, store, capsys):
    words = ["--audio-encoder", "muq", "mert", "--text-model", qwen3, "--data-path", store, "--device", "cpu"]
    words += ["--batch-size", "8", "--gradient-accumulation-steps", "2", "--text-negatives", "batch"]
    train.main([*words, "--text-queue", "40", "--audio-negatives", "bank", "--learn-temperature", "--plan"])
    printed = capsys.readouterr().out
    assert printed.startswith("run                muq, mert; ")
    (bank,) = [line for line in printed.splitlines() if line.strip().startswith("bank")]
    assert float(bank.split()[1]) == pytest.approx(64 * (76_800 + 6) * 4 / GIB, abs=0.006)
    alone = peak_memory(TrainingConfig("mert", text_model=qwen3, device="cpu"), shape_of())
    joint_shape = replace(shape_of(), dims={"muq": 1536, "mert": 76_800})
    joint = peak_memory(TrainingConfig("muq mert", text_model=qwen3, device="cpu"), joint_shape)
    assert joint["heads"] > alone["heads"]
    assert joint["base"] == alone["base"]


LIMITED = """
import resource, sys, train
from common.errors import run_script
original = train.fit

def fit(run):
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 60_000_000, resource.RLIM_INFINITY))
    try:
        original(run)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

train.fit = fit
run_script(lambda: train.main(sys.argv[1:]))
"""


def test_a_run_that_is_out_of_memory_ends_with_advice(qwen3, store, tmp_path):
    words = ["--audio-encoder", "mert", "--text-model", qwen3, "--data-path", store, "--device", "cpu", "--epochs", "1"]
    words += ["--batch-size", "32", "--hidden-dim", "64", "--num-workers", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: out of memory: batches of 32 texts did not fit; try --batch-size 16 --gradient-acc")
    assert "Traceback" not in done.stderr


def musicbench_plan(capsys, *words):
    train.main(["--audio-encoder", "muq", *words])
    return " ".join(capsys.readouterr().out.split())


def test_a_plan_without_a_store_counts_what_is_published(qwen3, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = musicbench_plan(capsys, "--text-model", qwen3, "--device", "cpu", "--batch-size", "4", "--plan")
    assert "94,982 captions of 47,491 recordings (no data/musicbench_embeddings/embeddings.h5 yet: MusicBench's" in said
    assert "steps 59,380 in 20 epochs" in said  # 20 x 94,982 / 32, rounded up in each epoch
    assert "tokens an epoch not known without the captions" in said
    assert re.search(r"time here at least [\d.,]+ h.*: cpu makes \d+\.\d\d TFLOP/s in fp32 products now", said)
    assert "H100" not in said.split("time here")[1]
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"elsewhere\.h5: no such file"):  # one that is named has to be there
        musicbench_plan(capsys, "--text-model", qwen3, "--data-path", "elsewhere.h5", "--plan")
    with pytest.raises(UserError, match="expected an audio space of muq, "):
        train.main(["--audio-encoder", "own", "--text-model", qwen3, "--plan"])


def test_a_plan_for_a_card_that_is_not_here(qwen3, store, capsys):
    said = musicbench_plan(capsys, "--text-model", qwen3, "--data-path", store, "--plan-for", "0.05 GB")
    assert "arithmetic bf16, 2 of 2 layers recomputed, a GPU of 0.05 GB" in said
    assert "fits 0.05 GB no, at no batch size" in said
    words = ["--text-model", qwen3, "--data-path", store, "--plan-for"]
    assert "fits 32 GB yes, 0 of 2 layers recomputed" in musicbench_plan(capsys, *words, "32GB")
    assert "time here" not in musicbench_plan(capsys, *words, "32")
    assert "bank" in musicbench_plan(capsys, *words, "32", "--audio-negatives", "bank")
    for wrong in ("0", "32GiB", "large"):
        with pytest.raises(SystemExit):
            musicbench_plan(capsys, *words, wrong)
        assert f"expected a GPU's memory such as 32GB, found '{wrong}'" in capsys.readouterr().err


def test_a_smaller_batch_is_planned_where_the_card_asks_for_it(qwen3, store):
    config = TrainingConfig("muq", text_model=qwen3, data_path=store, batch_size=64, gradient_accumulation_steps=1)
    data = PlannedData.of_store(config)
    large = footprint(replace(config, device="cuda"), data.shape, train.train_step).total  # all layers recomputed
    card = (0.8 * large / 0.95 + 2**30) / 1e9
    plan = plan_run(config, train.train_step, data, card)
    assert (plan.config.batch_size, plan.config.gradient_accumulation_steps) == (32, 2)
    assert plan.footprint.total <= tensor_room(card)
    assert f"fits {card:g} GB" in plan_text(plan)
    assert "with --batch-size 32 --gradient-accumulation-steps 2" in plan_text(plan)


@pytest.fixture
def no_hub(monkeypatch):
    def unreachable(model, *_):
        if Path(model).is_dir():
            return Path(model)
        raise UserError("https://hub cannot be reached; check the network")

    monkeypatch.setattr("text_to_audio.model.pretrained.fetch_model_folder", unreachable)


def test_the_shape_of_an_absent_text_model_is_the_published_one(no_hub):
    config = TrainingConfig("muq")
    with text_model_at_hand(config) as (at_hand, origin):
        assert "as published; its config.json could not be looked at (https://hub cannot be reached)" in origin
        assert resolved_pooling(at_hand) == "last"
        encoder = text_encoder_on_meta(at_hand)
    assert not Path(at_hand.text_model).exists()
    shape = TEXT_MODELS["Qwen/Qwen3-Embedding-4B"]
    frozen = sum(each.numel() for each in encoder.parameters() if not each.requires_grad)
    trained = sum(each.numel() for each in encoder.parameters() if each.requires_grad)
    assert (shape.parameters, shape.lora_parameters(16)) == (frozen, trained)
    head = ProjectionHead(2560, 1024, 1536)
    held = trained + sum(each.numel() for each in head.state_dict().values())
    moved = trained + sum(each.numel() for each in head.parameters())
    assert checkpoint_bytes(shape, [1536], 16, 1024) == pytest.approx(4 * (4 * held + 4 * moved), rel=1e-3)
    with (
        pytest.raises(UserError, match="https://hub cannot be reached"),
        text_model_at_hand(replace(config, text_model="some/other")),
    ):
        pass


def test_hours_are_those_of_the_card_that_was_timed(qwen3, store):
    config = TrainingConfig("muq", text_model=qwen3, data_path=store, device="cpu", precision="bf16", epochs=10)
    config.recomputed_layers = 0
    small = make_plan(config, train.train_step)
    said = dict(time_lines(small, 2.0))
    assert said["time on a GPU"].startswith("not known")
    work = 4 * small.layer_weights * small.tokens.padded * 10
    assert operations(small, small.tokens.padded / small.captions) == pytest.approx(work)
    assert said["time here"].startswith(f"at least {work / 2e12 / 3600:,.1f} h")
    published = replace(
        small, text_weights=H100.text_model.parameters, captions=2560, tokens=None, layers=36,
        layer_weights=H100.text_model.parameters - 151_665 * 2560,
    )  # fmt: skip
    assert dict(time_lines(published, None))["time"].startswith(f"{100 * 1.76 / 3600:.1f} h on one H100 80 GB")
    compiled = replace(published, config=replace(config, compile="on", recomputed_layers=18), captions=2_560_000)
    lines = dict(time_lines(compiled, None))
    assert lines["time"].startswith(f"{100_000 * 1.75 / 3600:.1f} h on one H100 80 GB")
    # what the arithmetic says of the card that was timed, at its own speed, is what was timed
    compiled = replace(compiled, config=replace(compiled.config, recomputed_layers=0))
    needed = float(dict(time_lines(compiled, None))["other cards"].split()[4].replace(",", ""))
    assert needed / 785 == pytest.approx(100_000 * 1.37 / 3600, rel=0.03)
    for changed in ({"text_negatives": "batch"}, {"audio_negatives": "bank"}, {"audio_encoder": "muq mert"}):
        assert not is_that_of(replace(published, config=replace(config, **changed)), H100)
