import json

import pytest

from benchmarks import gpu
from common.errors import UserError


@pytest.mark.slow
def test_it_runs_on_a_cpu_at_a_small_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gpu.main(["--small", "--rounds", "1", "--json", "found.json", "--steps", "default", "gradient caching"])
    figures = json.loads((tmp_path / "found.json").read_text())["figures"]
    encoders = {f"{name} {dtype}" for name in ("muq", "mert", "latent") for dtype in ("float32", "tf32", "float16")}
    prepared = {f"prepare {dtype}" for dtype in ("float32", "tf32", "float16")}
    steps = {"step, plain PEFT loop", "step, default", "step, gradient caching"}
    assert figures.keys() == {"ceilings"} | encoders | prepared | steps
    assert figures["muq float32"]["difference"] == 0
    assert figures["step, default"]["validation, captions/s"] > 0
    assert "step, gradient caching" in capsys.readouterr().out


def test_what_it_refuses(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected some of default, three spaces jointly"):
        gpu.main(["--small", "--parts", "steps", "--steps", "fastest"])
