import base64
import shutil

import pytest

from common.errors import UserError
from examples import page_picture


def test_without_chromium(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="expected chromium"):
        page_picture.main([])


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("raise SystemExit(1)", "expected the page's address, found none"),
        ("print('http://127.0.0.1:9/  (Ctrl-C ends it)')", "expected a page that answers within"),
    ],
)
def test_a_server_that_ends_is_one_line(monkeypatch, tmp_path, program, expected):
    monkeypatch.setattr(shutil, "which", lambda name: "chromium")
    monkeypatch.setattr(page_picture, "SEARCH", tmp_path / "search.py")
    (tmp_path / "search.py").write_text(program)
    with pytest.raises(UserError, match=expected):
        page_picture.main([])


def test_the_picture_in_the_repository_is_small(request):
    picture = (request.config.rootpath / "docs/search_page.png").read_bytes()
    assert picture.startswith(base64.b64decode("iVBORw0KGgo="))
    assert len(picture) <= 120_000
