import base64
import shutil

import pytest

from common.errors import UserError
from examples import page_picture


def test_without_chromium(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="expected chromium"):
        page_picture.main([])


def test_a_server_that_does_not_start_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: "chromium")
    missing = str(tmp_path / "missing.db")
    with pytest.raises(UserError, match=r"expected (a page that answers|the page's address)"):
        page_picture.main(["--checkpoint", str(tmp_path / "missing.pt"), "--milvus-uri", missing])


def test_the_picture_in_the_repository_is_small(request):
    picture = (request.config.rootpath / "docs/search_page.png").read_bytes()
    assert picture.startswith(base64.b64decode("iVBORw0KGgo="))
    assert len(picture) <= 120_000
