"""Fixtures that several test files share."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread in each, and in what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Two processes that compile one function of librosa's for two types at once can leave a cache whose index names the
    # other's code, on which every later process crashes. Each worker has its own.
    cache = Path(__file__).parents[1] / ".pytest_cache" / "numba" / os.environ["PYTEST_XDIST_WORKER"]
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache))

import pytest

from helpers.stores import make_header, make_splits, make_vectors


@pytest.fixture
def store_parts():
    header, splits = make_header(), make_splits()
    return header, splits, make_vectors(header, splits)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Tiny checkpoints of the three audio encoders and a Qwen3 text encoder, in the published formats."""
    from examples.make_tiny_models import main

    folder = tmp_path_factory.mktemp("models")
    main(["--out", str(folder)])
    return folder
