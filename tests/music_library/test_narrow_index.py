"""The narrow form of wide spaces: the same ranking in few dimensions."""

import numpy as np
import pytest
import torch

from music_library.index_space import IndexSpace
from music_library.narrow_index import NarrowForm, projection_identity, text_basis
from text_to_audio.model.head import ProjectionHead


def head(seed, text_dim=24, hidden=12, audio=500):
    torch.manual_seed(seed)
    made = ProjectionHead(text_dim, hidden, audio).eval()
    made.set_statistics(torch.randn(audio).numpy(), torch.rand(audio).numpy() + 0.2, "zscore")
    return made


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_ranks_as_the_wide_space_does(seed):
    made = head(seed)
    plain = np.random.default_rng(seed).normal(size=(400, 500)).astype(np.float32)
    wide, narrow = IndexSpace("x", made, "r", "e", narrow=False), IndexSpace("x", made, "r", "e", narrow=True)
    assert (wide.dim, narrow.dim, narrow.narrow) == (500, 14, True)
    texts = made.project_text(torch.randn(200, 24)).numpy()
    a, t = narrow.audio(plain), narrow.queries(texts)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(t, axis=1), 1, atol=1e-5)
    expected = wide.queries(texts) @ wide.audio(plain).T
    np.testing.assert_allclose(t @ a.T, expected, atol=2e-6)
    distances = np.square(t[:, None] - a[None]).sum(-1)
    first, second = np.sort(-expected)[:, :2].T
    clear = second - first > 1e-5  # closer ones may change places by rounding
    assert clear.mean() > 0.9
    assert (distances.argmin(1) == expected.argmax(1))[clear].all()


def test_a_rank_deficient_last_layer_is_no_trouble():
    made = head(0)
    with torch.no_grad():
        made.layers[-1].weight[:, 3] = made.layers[-1].weight[:, 4]
    space = IndexSpace("x", made, "r", "e", narrow=True)
    plain = np.random.default_rng(0).normal(size=(30, 500)).astype(np.float32)
    with torch.no_grad():
        texts = made.project_text(torch.randn(20, 24)).numpy()
    found, expected = space.queries(texts) @ space.audio(plain).T, texts @ space.standardised(plain).T
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_audio_outside_the_subspace_is_a_length_alone():
    basis = text_basis(head(1))
    np.testing.assert_allclose(basis.T @ basis, np.eye(13), atol=1e-5)
    form = NarrowForm(basis)
    vector = np.random.default_rng(0).normal(size=(1, 500)).astype(np.float32)
    outside = vector - vector @ basis.numpy() @ basis.numpy().T
    np.testing.assert_allclose(form.audio(outside / np.linalg.norm(outside))[0], [*[0] * 13, 1], atol=1e-5)
    assert form.audio(np.zeros((0, 500))).shape == (0, 14)


def test_identity_tells_projections_apart(tmp_path):
    one, other = head(0), head(0)
    assert projection_identity(one, True) == projection_identity(other, True)
    with torch.no_grad():
        other.layers[-1].bias[0] += 1
    assert projection_identity(one, True) != projection_identity(other, True)
    assert projection_identity(one, False) == projection_identity(other, False)  # wide vectors do not depend on it
    other.mean[0] += 1
    assert projection_identity(one, False) != projection_identity(other, False)


def test_the_basis_is_kept(tmp_path):
    first = IndexSpace("x", head(0), "r", "e", True, tmp_path)
    (path,) = tmp_path.iterdir()
    changed = path.stat().st_mtime_ns
    again = IndexSpace("x", head(0), "r", "e", True, tmp_path)
    assert path.stat().st_mtime_ns == changed
    vectors = np.random.default_rng(0).normal(size=(5, 500))
    np.testing.assert_array_equal(first.audio(vectors), again.audio(vectors))
