import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from common.errors import UserError
from helpers.losses import symmetric_loss
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert, make_qwen3
from store.writing import write_store
from text_to_audio.loading.batches import micro_batches
from text_to_audio.model.temperature import Temperature
from text_to_audio.training.optimisation import (
    build_optimizer,
    gradient_norms,
    rate_factor,
    schedule_warnings,
    warmup_length,
)

ROOT = Path(train.__file__).parent
QUICK = "--epochs 2 --batch-size 4 --gradient-accumulation-steps 2 --hidden-dim 32 --lr 1e-2 --text-lr 1e-3"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A store of 20 / 6 / 5 recordings with two captions each, and both kinds of text model."""
    folder = tmp_path_factory.mktemp("parts")
    header, splits = make_header(), make_splits((20, 6, 5))
    splits["test"].caption_kind = ["A/main", "B/main"] * 5
    write_store(folder / "embeddings.h5", header, splits, make_vectors(header, splits))
    make_bert(folder / "bert")
    make_qwen3(folder / "qwen3")
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(parts, *words, encoder="latent", model="bert", store="embeddings.h5"):
    paths = ["--data-path", str(parts / store), "--text-model", str(parts / model), "--device", "cpu"]
    return ["--audio-encoder", encoder, *paths, *QUICK.split(), *words]


def scalars(encoder):
    events = EventAccumulator(f"logs/tensorboard/{encoder}", size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("model", ["bert", "qwen3"])
def test_everything_a_run_leaves(parts, workplace, model):
    train.main(arguments(parts, model=model))
    names = sorted(path.name for path in Path("checkpoints").iterdir())
    assert names == [
        "latent_best_loss.pt",
        "latent_best_r1.pt",
        "latent_last.prev.pt",
        "latent_last.pt",
        "latent_report.html",
        "training_summary.json",
    ]
    summary = json.loads(Path("checkpoints/training_summary.json").read_text())["latent"]
    best = torch.load("checkpoints/latent_best_r1.pt", weights_only=True)
    weights = {"text_encoder_state_dict", "projection_state_dict"}
    described = {"audio_space", "dataset", "text_model_revision", "started"}
    assert set(best) == weights | described | {"config", "epoch", "step", "metrics", "log_temperature"}
    for key in ("t2a_R@1", "t2a_R@5", "t2a_R@10", "t2a_MRR", "t2a_median_rank", "a2t_R@1", "A/t2a_R@1", "B/a2t_MRR"):
        assert key in summary
    assert summary["gallery"] == 5
    assert 0.7 < summary["query_gb"] < 0.8  # hardly more than the libraries
    log = Path("train.log").read_text()
    for text in ("trainable:", "frozen:", "batches of 8-8 captions", "at most 10 steps", "warm-up 1 steps (10%)",
                 "padding", "--warmup-steps 2000 is no shorter than the run", "epoch 2/2", "chance of 5",
                 "a text query of latent takes about 0.7 GB of memory on a CPU",
                 "latent A", "validation t2a_R@1 ", " over 6 recordings: ", "; kept epoch "):  # fmt: skip
        assert text in log
    found = scalars("latent")
    for tag in ("train/loss", "val/loss", "val/t2a_R@1", "val/a2t_R@10", "val/t2a_MRR", "val/t2a_median_rank",
                "test/t2a_R@1", "learning_rate/head", "learning_rate/lora", "train/temperature", "gradient_norm/head",
                "gradient_norm/lora", "train/padding_share", "train/captions_per_second", "train/tokens_per_second",
                "train/memory_gb"):  # fmt: skip
        assert all(math.isfinite(value) for value in found[tag])
    assert len(found["val/loss"]) == 2
    per_module = [tag for tag in found if tag.startswith("gradient_norm/lora/")]
    assert len(per_module) == (12 if model == "bert" else 14)


def test_last_checkpoint_holds_what_going_on_needs(parts, workplace):
    train.main(arguments(parts))
    last = torch.load("checkpoints/latent_last.pt", weights_only=True)
    assert (last["epoch"], last["step"]) == (2, 10)
    assert last["schedule_state_dict"]["last_epoch"] == 10
    assert len(last["optimizer_state_dict"]["state"]) > 0
    assert set(last["spaces"]["latent"]["best"]) == {"r1", "r1_epoch", "loss", "hits", "mrr"}
    assert last["random_state"]["cpu"].dtype == torch.uint8


def test_it_learns_and_the_same_seed_gives_the_same_run(parts, workplace):
    header, splits = make_header(), make_splits((20, 6, 5))
    splits["train"].caption = [text for row in range(20) for text in (f"{row} song", f"a {row}")]
    write_store("numbers.h5", header, splits, make_vectors(header, splits))
    words = arguments(parts, "--epochs", "15", "--patience", "99", encoder="muq", store=Path("numbers.h5").resolve())
    losses, weights = [], []
    for folder in ("a", "b"):
        train.main([*words, "--checkpoint-dir", folder])
        losses.append(scalars("muq")["val/loss"])
        weights.append(torch.load(f"{folder}/muq_last.pt", weights_only=True))
    log = Path("train.log").read_text()
    first, last = (float(log.split(f"epoch {epoch}/15: train loss ")[1].split(",")[0]) for epoch in (1, 15))
    assert last < 0.5 * first
    assert losses[0] == losses[1]  # a new run hides the curves that were in the folder
    assert len(losses[1]) == 15
    for part in ("projection_state_dict", "text_encoder_state_dict"):
        for name, value in weights[0][part].items():
            assert torch.equal(value, weights[1][part][name])
    lora = weights[0]["text_encoder_state_dict"]
    assert all(value.abs().sum() > 0 for name, value in lora.items() if "lora_B" in name)


def test_a_step_s_gradient_is_the_weighted_mean_over_micro_batches(parts, workplace):
    words = arguments(parts, "--head-dropout", "0", "--lora-dropout", "0", "--batch-size", "3")
    config = train.config_from_arguments(train.build_parser().parse_args(words))
    run = train.prepare(config, train.start_log("train", "train.log"))
    batch = np.array([0, 3, 4, 9, 11, 12, 30])
    loss = train.train_step(run, run.reader.read(0, batch)).item()
    (space,) = run.spaces
    trained = [p for p in (*space.projection.parameters(), *run.text_encoder.parameters()) if p.requires_grad]
    found = [p.grad.clone() for p in trained]
    for module in run.modules():
        module.zero_grad()
    text = space.projection.project_text(run.text_encoder([run.captions.captions[i] for i in batch]))
    audio = space.projection.standardise_audio(space.vectors[run.captions.caption_audio[batch]])
    total = 0.0
    for part in micro_batches(batch, run.tokens.lengths, 3):
        own = torch.from_numpy(part)
        total = total + len(part) / 7 * symmetric_loss(text[own] @ audio.T, own, 0.07 * space.config.spread)
    total.backward()
    expected = [p.grad for p in trained]
    assert loss == pytest.approx(total.item(), rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    norms = gradient_norms(run.text_encoder, {"latent": space.projection})
    head = sum(p.grad.square().sum() for p in space.projection.parameters()).sqrt()
    assert norms["head/latent"] == pytest.approx(head.item(), rel=1e-5)
    modules = [value for name, value in norms.items() if name.startswith("lora/")]
    assert norms["lora"] == pytest.approx(math.hypot(*modules))
    assert "lora/encoder.layer.0.attention.self.query" in norms


def test_stops_when_validation_does_not_improve(parts, workplace):
    train.main(arguments(parts, "--epochs", "50", "--patience", "2", "--lr", "1e-9", "--text-lr", "0"))
    log = Path("train.log").read_text()
    assert "stopped: none of 2 epochs was better in validation" in log
    assert "epoch 50/50" not in log
    best = torch.load("checkpoints/latent_best_r1.pt", weights_only=True)["epoch"]
    assert torch.load("checkpoints/latent_last.pt", weights_only=True)["epoch"] == best + 2


def test_a_loss_that_is_not_finite_leaves_the_checkpoints(parts, workplace):
    train.main(arguments(parts))
    before = {path.name: path.read_bytes() for path in Path("checkpoints").glob("latent_*")}
    with pytest.raises(UserError, match=r"step \d+: expected a finite loss in latent, found nan; lower --lr") as raised:
        train.main(arguments(parts, "--lr", "1e30"))
    assert "\n" not in str(raised.value)
    aside = Path("checkpoints/latent_finished_1")  # where a fresh run puts them
    assert {path.name: path.read_bytes() for path in aside.glob("latent_*")} == before
    assert not list(Path("checkpoints").glob("latent_*.pt"))
    torch.load(aside / "latent_last.pt", weights_only=True)


def test_mistakes_end_in_one_line(parts, workplace):
    header, splits = make_header(), make_splits((4, 3, 0))
    write_store("no_test.h5", header, splits, make_vectors(header, splits))
    cases = {
        r"embeddings\.h5: expected vectors of 'mert', found muq, latent": arguments(parts, encoder="mert"),
        r"gone\.h5: no such file": arguments(parts, store="gone.h5"),
        r"nowhere: expected a folder": arguments(parts, model="nowhere"),
        r"no_test\.h5: expected recordings with captions in the split 'test'": arguments(
            parts, store=Path("no_test.h5").resolve()
        ),
        r"checkpoints/x: expected a folder to write to": arguments(parts, "--checkpoint-dir", "checkpoints/x"),
        r"expected hidden_dim .*expected temperature": arguments(parts, "--hidden-dim", "0", "--temperature", "0"),
    }
    Path("checkpoints").write_text("a file")
    for pattern, words in cases.items():
        with pytest.raises(UserError, match=pattern) as raised:
            train.main(words if "checkpoints/x" in pattern else [*words, "--checkpoint-dir", "c"])
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_vector_that_is_not_finite(parts, workplace, split):
    header, splits = make_header(), make_splits((20, 6, 5))
    vectors = make_vectors(header, splits)
    vectors[split, "latent"][3, 1] = np.nan
    write_store("bad.h5", header, splits, vectors)
    pattern = {"train": r"bad\.h5: latent: .*not finite", "val": r"bad\.h5: val vector of latent: .*data/val0003\.wav"}
    with pytest.raises(UserError, match=pattern[split]):
        train.main(arguments(parts, store=Path("bad.h5").resolve()))


def test_few_sources_train_in_smaller_batches(parts, workplace):
    header, splits = make_header(), make_splits((20, 6, 5))
    splits["train"].source_id = [f"source-{row // 5}" for row in range(20)]
    write_store("few.h5", header, splits, make_vectors(header, splits))
    train.main(arguments(parts, "--batch-size", "16", store=Path("few.h5").resolve()))
    log = Path("train.log").read_text()
    assert "10 batches of 4-4 captions" in log
    assert "warning: batches hold 4 captions instead of 32" in log


def test_schedule():
    config = train.TrainingConfig("muq", device="cpu")
    assert warmup_length(config, 7420) == 2000
    assert warmup_length(config, 2000) == 200
    assert warmup_length(config, 5) == 1
    assert rate_factor(0, 10, 100) == pytest.approx(0.1)
    assert rate_factor(9, 10, 100) == rate_factor(10, 10, 100) == 1
    assert rate_factor(55, 10, 100) == pytest.approx(0.5)
    assert rate_factor(100, 10, 100) == pytest.approx(0)
    assert schedule_warnings(config, 7420) == []
    assert len(schedule_warnings(config, 200)) == 2
    assert "200 steps are few for --lr 5e-05" in schedule_warnings(config, 200)[1]
    short = train.TrainingConfig("muq", device="cpu", lr=1e-3, text_lr=1e-4, warmup_steps=10)
    assert schedule_warnings(short, 100) == []


def test_optimizer_groups(parts, workplace):
    config = train.config_from_arguments(train.build_parser().parse_args(arguments(parts)))
    encoder, head = train.TextEncoder(config), train.ProjectionHead(32, 8, 4)
    temperature = Temperature(0.07, learnt=False)
    groups = build_optimizer(config, encoder, [(head, temperature)]).param_groups
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("head", 1e-2, 0.1),
        ("head", 1e-2, 0.0),
        ("lora", 1e-3, 0.1),
    ]
    assert [len(g["params"]) for g in groups] == [2, 2, 24]
    assert all(p.requires_grad for g in groups for p in g["params"])


def test_importing_train_starts_nothing(tmp_path):
    code = "from train import TextEncoder, ProjectionHead, TrainingConfig; import sys; print('datasets' in sys.modules)"
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert list(tmp_path.iterdir()) == []


def test_the_script_reports_a_mistake_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--audio-encoder", "muq"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: data/musicbench_embeddings/embeddings.h5: no such file; expected a store")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def recorder(tmp_path):
    """A stand-in interpreter that notes how it was called, and fails for the encoder in FAIL."""
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\necho "$@" >> calls.txt\n[ -n "$FAIL" ] && [ "$3" = "$FAIL" ] && exit 3\n'
        '[ "$1" = -m ] && echo SUMMARY\nexit 0\n'
    )
    script.chmod(0o755)
    return script


def run_all(recorder, folder, *words, fail=""):
    environment = {**os.environ, "PYTHON": str(recorder), "FAIL": fail}
    done = subprocess.run([ROOT / "train_all.sh", *words], cwd=folder, env=environment, capture_output=True, text=True)
    return done, (folder / "calls.txt").read_text().splitlines()


def test_train_all_passes_flags_on_and_ends_with_the_summary(recorder, tmp_path):
    done, calls = run_all(recorder, tmp_path, "--epochs", "3", "--checkpoint-dir", "my runs")
    expected = [
        f"{ROOT}/train.py --audio-encoder {name} --epochs 3 --checkpoint-dir my runs"
        for name in ("latent", "muq", "mert")
    ]
    assert calls == [*expected, "-m text_to_audio.measuring.summary my runs"]
    assert done.returncode == 0
    assert done.stdout.endswith("SUMMARY\n")


def test_train_all_joint_is_one_run(recorder, tmp_path):
    done, calls = run_all(recorder, tmp_path, "--epochs", "3", "--joint")
    assert calls == [
        f"{ROOT}/train.py --audio-encoder latent muq mert --epochs 3",
        "-m text_to_audio.measuring.summary checkpoints",
    ]
    assert done.returncode == 0
    _, calls = run_all(recorder, tmp_path)
    assert calls[2:] == [
        *(f"{ROOT}/train.py --audio-encoder {name}" for name in ("latent", "muq", "mert")),
        "-m text_to_audio.measuring.summary checkpoints",
    ]


def test_train_all_stops_at_the_first_failure(recorder, tmp_path):
    done, calls = run_all(recorder, tmp_path, fail="muq")
    assert done.returncode == 3
    assert [call.split()[2] for call in calls] == ["latent", "muq"]
    assert "SUMMARY" not in done.stdout
