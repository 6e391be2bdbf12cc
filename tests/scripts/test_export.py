import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModel

import export
from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert, make_qwen3
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.measuring.summary import update_summary
from text_to_audio.model.checkpoints import model_state, save_checkpoint
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.inference import embed_texts_batch
from text_to_audio.model.pooling import POOLS
from text_to_audio.model.text_encoder import TextEncoder, pad_tokens

TEXTS = ["calm piano", "a", "happy fast drum song with guitar"]


@pytest.fixture(params=["bert", "qwen3"])
def made(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"bert": make_bert, "qwen3": make_qwen3}[request.param](tmp_path / "base")
    header, splits = make_header(), make_splits()
    write_store(tmp_path / "embeddings.h5", header, splits, make_vectors(header, splits))
    config = TrainingConfig("muq", data_path=str(tmp_path / "embeddings.h5"), text_model=base, device="cpu")
    config.text_dim, config.audio_dim, config.hidden_dim = 32, 6, 16
    encoder, head = TextEncoder(config).eval(), ProjectionHead(32, 16, 6).eval()
    for name, value in encoder.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    head.mean.normal_()
    contents = {**model_state(config, encoder, head), "epoch": 3, "metrics": {"t2a_R@1": 12.5}}
    contents |= {"audio_space": header.encoders["muq"], "dataset": {"name": "test recordings", "revision": "r7"}}
    save_checkpoint(Path("muq_best_r1.pt"), {**contents, "text_model_revision": "c0ffee"})
    return encoder, head, base


def run():
    export.main(["--checkpoint", "muq_best_r1.pt", "--out", "out/muq"])
    return Path("out/muq")


def test_peft_and_the_card_s_snippet_give_the_same_vectors(made, monkeypatch):
    encoder, head, base = made
    out = run()
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), out / "adapter")
    plain = encoder(TEXTS)
    assert not model.training

    def by_peft():
        ids, mask = pad_tokens(encoder.tokenise(TEXTS), encoder.pad_token)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize(POOLS[encoder.pooling](hidden, mask), dim=-1)

    with torch.no_grad():
        torch.testing.assert_close(by_peft(), plain, atol=1e-6, rtol=0)
        torch.nn.init.zeros_(next(value for name, value in model.named_parameters() if "lora_B" in name))
        assert (by_peft() - plain).abs().max() > 1e-4  # the adapter is in use
    with safe_open(out / "head.safetensors", "pt") as file:
        assert file.metadata()["standardise"] == "zscore"
        assert file.metadata()["audio_dim"] == "6"
    assert TrainingConfig(**json.loads((out / "config.json").read_text())).hidden_dim == 16
    card = (out / "README.md").read_text()
    monkeypatch.chdir(out)
    names = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    encoder.model = names["model"]
    expected = embed_texts_batch(TEXTS, encoder, head, "cpu")
    for text, vector in zip(TEXTS, expected, strict=True):
        torch.testing.assert_close(names["embed_text"](text), torch.from_numpy(vector), atol=1e-5, rtol=0)
    audio = torch.randn(4, 6)
    torch.testing.assert_close(names["standardise_audio"](audio), head.standardise_audio(audio))


def test_metrics_are_those_of_this_checkpoint_or_none(made):
    assert "not measured" in (run() / "README.md").read_text()
    update_summary(Path("."), "muq", {"t2a_R@1": 45.25, "epoch": 3, "query_gb": 8.84})
    card = (run() / "README.md").read_text()
    assert "| t2a_R@1 | 45.25 |" in card
    assert "| t2a_R@1 | 12.5 |" in card
    assert "| data set | test recordings | r7 |" in card
    assert "| c0ffee |" in card
    assert "takes about 8.8 GB of memory on a CPU." in card
    assert "| query_gb" not in card
    assert "tiny/muq" in card
    update_summary(Path("."), "muq", {"t2a_R@1": 45.25, "epoch": 2})
    assert "45.25" not in (run() / "README.md").read_text()


def test_another_folder_is_refused(made):
    run()
    assert [path.name for path in Path("out").iterdir()] == ["muq"]
    Path("out/muq/mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"found another folder \(mine\.txt\)"):
        run()
    assert Path("out/muq/mine.txt").read_text() == "keep"
    with pytest.raises(UserError, match="no such file"):
        export.main(["--checkpoint", "gone.pt", "--out", "x"])


def test_the_card_says_what_the_encoder_s_weights_allow(made):
    state = torch.load("muq_best_r1.pt", weights_only=True)
    assert "not for commercial use" in (run() / "README.md").read_text()
    state["config"]["audio_encoder"] = "musicnn"
    torch.save(state, "musicnn_best_r1.pt")
    export.main(["--checkpoint", "musicnn_best_r1.pt", "--out", "out/musicnn"])
    card = Path("out/musicnn/README.md").read_text()
    assert "the audio encoder musicnn (MSD_musicnn) are ISC, which allows commercial use" in card
    assert "non-commercial" not in card
    assert "not for commercial" not in card
