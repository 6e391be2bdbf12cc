import json
from pathlib import Path

import pytest
import torch

import evaluate
import train
from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_qwen3
from store.writing import write_store


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    header, splits = make_header("float16"), make_splits((20, 6, 5))
    splits["test"].caption_kind = ["A/main", "B/main"] * 5
    write_store(folder / "embeddings.h5", header, splits, make_vectors(header, splits))
    words = "--audio-encoder latent --data-path embeddings.h5 --text-model qwen3 --epochs 3 --lr 1e-2 --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_qwen3("qwen3")
        train.main([*words.split(), "--batch-size", "4", "--gradient-accumulation-steps", "2"])
    return folder


@pytest.fixture(autouse=True)
def there(trained, monkeypatch):
    monkeypatch.chdir(trained)


def test_gives_the_numbers_that_training_gave(capsys):
    evaluate.main(["--checkpoint", "checkpoints/latent_best_r1.pt", "--json"])
    found = json.loads(capsys.readouterr().out)
    summary = json.loads(Path("checkpoints/training_summary.json").read_text())["latent"]
    del summary["epoch"], summary["started"], summary["query_gb"]
    assert found == summary


@pytest.mark.parametrize("which", ["best_r1", "best_loss", "last"])
def test_validation_again(which):
    path = f"checkpoints/latent_{which}.pt"
    found = evaluate.main(["--checkpoint", path, "--split", "val"])
    del found["gallery"]
    assert found == pytest.approx(torch.load(path, weights_only=True)["metrics"], rel=1e-6)


def test_table(capsys):
    evaluate.main(["--checkpoint", "checkpoints/latent_last.pt"])
    printed = capsys.readouterr().out
    for text in ("R@10", "latent A", "latent B", "chance of 5", "a2t_MRR:", "B/t2a_R@1:"):
        assert text in printed


def test_another_store(tmp_path):
    header, splits = make_header(dims={"latent": 9}), make_splits()
    write_store(tmp_path / "wide.h5", header, splits, make_vectors(header, splits))
    with pytest.raises(UserError, match=r"wide\.h5: expected latent vectors 4 wide, .* found 9"):
        evaluate.main(["--checkpoint", "checkpoints/latent_last.pt", "--data-path", str(tmp_path / "wide.h5")])
    header, splits = make_header(), make_splits((4, 3, 9))
    write_store(tmp_path / "other.h5", header, splits, make_vectors(header, splits))
    found = evaluate.main(["--checkpoint", "checkpoints/latent_last.pt", "--data-path", str(tmp_path / "other.h5")])
    assert found["gallery"] == 9


def test_no_checkpoint():
    with pytest.raises(UserError, match=r"gone\.pt: no such file"):
        evaluate.main(["--checkpoint", "gone.pt"])


def test_through_milvus_beside_the_exact_figure(capsys):
    words = ["--checkpoint", "checkpoints/latent_best_r1.pt", "--milvus", "data/eval.db"]
    metrics = evaluate.main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["milvus_t2a_R@1"] == round(metrics["milvus_t2a_R@1"], 2)
    for kind in ("FLAT", "IVF_FLAT"):  # once more over what is there
        again = evaluate.main([*words, "--index-type", kind])
        for k in (1, 5, 10):  # five recordings: every index is exact
            assert again[f"milvus_t2a_R@{k}"] == pytest.approx(metrics[f"t2a_R@{k}"])
    shown = capsys.readouterr().out
    assert "text -> audio through data/eval.db, IVF_FLAT" in shown
    assert "exact, in memory" in shown
    with pytest.raises(SystemExit):
        evaluate.main([*words, "--index-type", "hnsw"])
    assert "invalid choice: 'hnsw'" in capsys.readouterr().err
