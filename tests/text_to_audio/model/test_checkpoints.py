import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from helpers.tiny_text_models import make_bert
from text_to_audio.config import TrainingConfig
from text_to_audio.measuring.summary import main, read_summary, update_summary
from text_to_audio.model.checkpoints import (
    checkpoint_path,
    model_state,
    read_checkpoint,
    restore_weights,
    save_checkpoint,
)
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    config = TrainingConfig("muq", text_model=make_bert(tmp_path_factory.mktemp("bert")), device="cpu")
    config.text_dim, config.audio_dim, config.hidden_dim = 32, 6, 16
    return config, TextEncoder(config), ProjectionHead(32, 16, 6)


def test_only_what_was_trained_is_saved_and_plain_types_load_anywhere(models, tmp_path):
    config, encoder, head = models
    path = tmp_path / "muq_last.pt"
    save_checkpoint(path, {**model_state(config, encoder, head), "step": 3})
    contents = torch.load(path, weights_only=True)
    assert all("lora_" in name for name in contents["text_encoder_state_dict"])
    assert set(contents["projection_state_dict"]) == set(head.state_dict())
    tensors = [*contents["text_encoder_state_dict"].values(), *contents["projection_state_dict"].values()]
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    assert TrainingConfig(**contents["config"]).text_dim == 32
    restore_weights(path, read_checkpoint(path), encoder, head)
    assert list(tmp_path.iterdir()) == [path]


def test_paths_are_the_documented_ones():
    config = TrainingConfig("latent", checkpoint_dir="somewhere")
    assert checkpoint_path(config, "best_r1") == Path("somewhere/latent_best_r1.pt")


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path):
    path = tmp_path / "muq_last.pt"
    save_checkpoint(path, {"weights": torch.arange(3)})
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from text_to_audio.model.checkpoints import save_checkpoint\n"
        "from common.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "try: save_checkpoint(Path(sys.argv[1]), {'weights': torch.zeros(1_000_000)})\n"
        "except UserError as error: print(error)"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    expected = f"{path}: could not write the checkpoint (File too large); the one before it is still there\n"
    assert done.stdout == expected
    assert torch.load(path, weights_only=True)["weights"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        save_checkpoint(tmp_path / "gone" / "muq_last.pt", {})


def test_files_that_are_no_checkpoint(models, tmp_path):
    config, encoder, head = models
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match=r"x\.pt: no such file"):
        read_checkpoint(path)
    path.write_text("text")
    with pytest.raises(UserError, match="that torch cannot load"):
        read_checkpoint(path)
    save_checkpoint(path, model_state(config, encoder, head))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="that torch cannot load"):
        read_checkpoint(path)
    save_checkpoint(path, {"weights": torch.zeros(1)})
    with pytest.raises(UserError, match="found another file"):
        read_checkpoint(path)


def test_weights_of_other_widths(models, tmp_path):
    config, encoder, head = models
    contents = model_state(config, encoder, head)
    with pytest.raises(UserError, match="do not fit the model") as raised:
        restore_weights(tmp_path / "x.pt", contents, encoder, ProjectionHead(32, 16, 7))
    assert "\n" not in str(raised.value)


def test_summary_keeps_other_encoders(tmp_path, capsys):
    metrics = {"t2a_R@1": 45.2345, "t2a_R@5": 72.8, "t2a_R@10": 83.1, "t2a_MRR": 0.58234, "t2a_median_rank": 2.0}
    update_summary(tmp_path, "latent", {**metrics, "gallery": 400})
    update_summary(tmp_path, "muq", {**metrics, "t2a_R@1": 52.3, "gallery": 400})
    path = update_summary(tmp_path, "latent", {**metrics, "t2a_R@1": 46.0, "gallery": 400})
    summary = json.loads(path.read_text())
    assert path.name == "training_summary.json"
    assert {name: entry["t2a_R@1"] for name, entry in summary.items()} == {"latent": 46.0, "muq": 52.3}
    assert summary["muq"]["t2a_MRR"] == 0.5823
    assert [each.name for each in tmp_path.iterdir()] == ["training_summary.json"]
    main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "chance of 400" in printed
    assert "52.3" in printed


UPDATES = """
import sys; from pathlib import Path; from text_to_audio.measuring.summary import update_summary
for value in range(30): update_summary(Path(sys.argv[1]), sys.argv[2], {"t2a_R@1": float(value)})
"""


def test_summary_from_several_processes(tmp_path):
    command = [sys.executable, "-c", UPDATES, str(tmp_path)]
    workers = [subprocess.Popen([*command, name]) for name in ("muq", "mert", "latent")]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    summary = read_summary(tmp_path / "training_summary.json")
    assert summary == {name: {"t2a_R@1": 29.0} for name in ("muq", "mert", "latent")}


def test_a_summary_that_is_not_one(tmp_path):
    (tmp_path / "training_summary.json").write_text("{")
    with pytest.raises(UserError, match="expected JSON as"):
        update_summary(tmp_path, "muq", {})
    (tmp_path / "training_summary.json").write_text("[1]")
    with pytest.raises(UserError, match="expected an object"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="no such file"):
        main([str(tmp_path / "nowhere")])
