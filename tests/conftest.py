"""Fixtures that several test files share."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread in each, and in what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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
