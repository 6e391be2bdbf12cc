import argparse
from dataclasses import fields

import pytest

import train
from common.errors import UserError
from text_to_audio.config import TrainingConfig, config_from_arguments, field_help


def parse(*words):
    return config_from_arguments(train.build_parser().parse_args(["--audio-encoder", "muq", *words]))


def test_defaults_are_the_documented_ones():
    config = parse()
    expected = {
        "epochs": 20, "batch_size": 32, "gradient_accumulation_steps": 8, "effective_batch_size": 256, "lr": 5e-5,
        "text_lr": 2e-5, "weight_decay": 0.1, "warmup_steps": 2000, "temperature": 0.07, "lora_rank": 16,
        "lora_alpha": 32, "lora_dropout": 0.05, "patience": 5, "hidden_dim": 1024, "head_dropout": 0.1,
        "max_length": 192, "text_model": "Qwen/Qwen3-Embedding-4B", "checkpoint_dir": "checkpoints",
        "log_dir": "logs/tensorboard", "data_path": "data/musicbench_embeddings/embeddings.h5",
        "audio_negatives": "batch", "text_negatives": "micro", "same_source": "mask", "learn_temperature": False,
        "caption_dropout": 0, "baseline": False, "standardise": "zscore",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_setting_but_the_widths_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as leaving:
        train.build_parser().parse_args(["--help"])
    assert leaving.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    texts = field_help(TrainingConfig)
    for each in fields(TrainingConfig):
        assert texts[each.name]
        flag = f"--{each.name.replace('_', '-')} "
        assert (flag in printed) == each.metadata.get("flag", True), flag
    assert "python train.py --audio-encoder muq" in printed


def test_values_on_the_command_line():
    config = parse("--lr", "1e-3", "--epochs", "2", "--audio-negatives", "micro", "--instruction", "")
    assert (config.lr, config.epochs, config.audio_negatives, config.instruction) == (1e-3, 2, "micro", "")


@pytest.mark.parametrize(
    "words", [["--audio-negatives", "all"], ["--text-negatives", "bank"], ["--resume"], ["--lear", "1"]]
)
def test_what_does_not_exist_is_not_offered(words):
    with pytest.raises(SystemExit) as leaving:
        parse(*words)
    assert leaving.value.code == 2


def test_round_trip_through_a_checkpoint():
    config = parse("--lr", "1e-3", "--device", "cpu")
    config.text_dim, config.audio_dim = 384, 1536
    again = TrainingConfig(**config.as_dict())
    assert again.device == "auto"  # a checkpoint is loaded on other machines
    again.device = "cpu"
    assert again == config
    assert all(isinstance(value, int | float | str | bool) for value in config.as_dict().values())


def test_settings_of_a_newer_version_are_named():
    with pytest.raises(UserError, match=r"x\.pt: .*\(bank_dtype, flux\).*newer version"):
        TrainingConfig.from_dict({"audio_encoder": "muq", "flux": 1, "bank_dtype": "x"}, "x.pt")


def test_all_faults_at_once_in_one_line():
    wrong = {
        "hidden_dim": "0", "temperature": "0", "epochs": "0", "lr": "nan", "head_dropout": "1", "device": "gpu",
        "weight_decay": "inf", "max_length": "3", "text_model": " ",
    }  # fmt: skip
    with pytest.raises(UserError) as raised:
        parse(*(word for name, value in wrong.items() for word in ("--" + name.replace("_", "-"), value)))
    message = str(raised.value)
    assert "\n" not in message
    assert all(f"expected {name} to be" in message for name in wrong)
    assert message.count("expected") == len(wrong)


def test_a_batch_of_one_compares_nothing():
    with pytest.raises(UserError, match="batch of 1"):
        parse("--batch-size", "1", "--gradient-accumulation-steps", "1")
    with pytest.raises(UserError, match="batch of 1"):
        parse("--batch-size", "1", "--audio-negatives", "micro")
    parse("--batch-size", "1")
    parse("--batch-size", "1", "--audio-negatives", "micro", "--text-negatives", "batch")
    parse("--batch-size", "1", "--gradient-accumulation-steps", "1", "--audio-negatives", "bank")


def test_switches_and_the_bounds_of_a_learnt_temperature():
    assert parse("--learn-temperature", "--baseline").learn_temperature
    parse("--temperature", "2")
    with pytest.raises(UserError, match=r"temperature to be from 0\.01 to 1 to be learnt, found 2\.0"):
        parse("--temperature", "2", "--learn-temperature")


def test_choices_are_checked_without_the_command_line_too():
    config = TrainingConfig("muq", audio_negatives="all", device="cpu")
    with pytest.raises(UserError, match="audio_negatives to be one of micro, batch, bank, found 'all'"):
        config.check()


def test_precision_and_checkpointing_follow_the_device():
    config = TrainingConfig("muq", device="cpu")
    assert not config.bf16
    assert config.layers_recomputed(36) == 0
    assert TrainingConfig("muq", device="cpu", precision="bf16").bf16
    assert TrainingConfig("muq", device="cuda").bf16
    assert TrainingConfig("muq", device="cuda").layers_recomputed(36) == 36  # until it was looked at
    assert TrainingConfig("muq", device="cuda", recomputed_layers=12).layers_recomputed(36) == 12
    assert (
        TrainingConfig("muq", device="cpu", gradient_checkpointing="on", recomputed_layers=0).layers_recomputed(7) == 7
    )
    assert TrainingConfig("muq", device="cuda", gradient_checkpointing="off").layers_recomputed(36) == 0


@pytest.mark.parametrize(("before", "now"), [(False, "off"), (True, "on"), ("auto", "auto")])
def test_configs_from_when_compile_was_a_switch_load(before, now):
    stored = {**TrainingConfig("muq").as_dict(), "compile": before}
    for name in ("memory_gb", "recomputed_layers"):
        del stored[name]
    for config in (TrainingConfig(**stored), TrainingConfig.from_dict(stored, "old.pt")):
        assert (config.compile, config.memory_gb, config.recomputed_layers) == (now, 0, -1)
        config.device = "cpu"
        config.check()


def test_parser_prints_defaults():
    assert isinstance(train.build_parser(), argparse.ArgumentParser)
    assert "(default: 5e-05)" in train.build_parser().format_help()
