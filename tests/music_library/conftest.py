"""A server of the page over a searcher that needs no model and no database."""

import pytest

from helpers.searcher_double import DoubleSearcher, running_server
from music_library.serving import allowed_hosts


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    return DoubleSearcher(tmp_path_factory.mktemp("music"))


@pytest.fixture(scope="module")
def client(double):
    with running_server(lambda: double, allowed_hosts("127.0.0.1")) as client:
        client.wait_until_ready()
        yield client
