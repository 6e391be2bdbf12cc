"""The search page in headless Chromium: type, see results, press play, hear the best moment; keys, states, escaping."""

import base64
import os
import threading
from pathlib import Path

import pytest

from helpers.searcher_double import HOSTILE, DoubleSearcher, running_server
from helpers.webdriver import browser, why_missing

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

ROWS = "return document.querySelectorAll('#results li').length"
STATE = "return document.getElementById('state').textContent"
FOCUS = "return document.activeElement.id || document.activeElement.className"
AUDIO = "const a = document.getElementById('audio'); return "


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    return DoubleSearcher(tmp_path_factory.mktemp("music"))


@pytest.fixture(scope="module")
def client(double):
    with running_server(lambda: double) as client:
        client.wait_until_ready()
        yield client


@pytest.fixture(scope="module")
def window():
    with browser() as window:
        yield window


@pytest.fixture
def page(client, window):
    window.open(f"http://127.0.0.1:{client.port}/")
    window.wait("return document.getElementById('state').textContent.includes('6 tracks indexed')")
    return window


def save_picture(window, name):
    """Keep a screenshot where the variable SCREENSHOTS names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder, f"{name}.png").write_bytes(base64.b64decode(window.screenshot()))


def test_type_see_results_press_play_and_it_plays_from_the_best_moment(page, double):
    searches = len(double.embedded)
    page.type("#query", "calm piano")
    page.wait("return document.querySelectorAll('#results li').length === 6")
    assert len(double.embedded) - searches <= 3  # not one search per letter
    page.click("#results li .play")
    page.wait(AUDIO + "!a.paused && a.currentTime > 8")
    earlier = page.run(AUDIO + "a.currentTime")
    page.wait(AUDIO + f"a.currentTime > {earlier} + 0.5")
    assert 8 <= page.run(AUDIO + "a.currentTime") < 15
    assert page.run("return document.querySelectorAll('#results li.playing').length") == 1
    save_picture(page, "desktop")
    page.emulate("dark")
    save_picture(page, "desktop-dark")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 25)"
    page.emulate("light")


def test_tags_that_hold_html_are_shown_as_text(page):
    page.type("#query", "anything")
    page.wait(ROWS)
    titles = page.run("return [...document.querySelectorAll('#results .title')].map(title => title.textContent)")
    assert HOSTILE in titles
    assert page.run("return document.querySelectorAll('#results .title *, #results .artist *').length") == 0
    assert page.run("return document.title") == "Search music by text"


def test_the_whole_page_by_keyboard(page):
    page.run("document.activeElement.blur()")
    page.press("/")
    assert page.run(FOCUS) == "query"
    assert page.run("return document.getElementById('query').value") == ""
    page.press(*"strings")
    page.press("Enter")  # at once, without the pause
    page.wait(ROWS)
    page.press("ArrowDown")
    assert page.run(FOCUS) == "play"
    page.press("ArrowDown", "ArrowDown", "ArrowUp")
    second = "return document.querySelectorAll('#results .play')[1]"
    assert page.run(f"{second} === document.activeElement")
    page.press("Enter")
    page.wait(AUDIO + "!a.paused && a.currentTime > 8")
    expected = page.run(f"{second}.querySelector('.title').textContent")
    assert page.run("return document.getElementById('now-title').textContent") == expected
    page.press("ArrowUp", "ArrowUp")
    assert page.run(FOCUS) == "query"
    page.press("Escape")
    assert page.run(ROWS) == 0
    assert page.run("return document.getElementById('query').value") == ""
    page.wait("return document.getElementById('state').textContent.includes('indexed')")


def test_similar_tracks_and_without(page):
    page.type("#query", "piano")
    page.type("#without", "vocals")
    page.wait("return document.getElementById('state').textContent.includes('without what sounds like “vocals”')")
    page.click("#results li:nth-child(2) .like")
    page.wait("return document.getElementById('state').textContent.includes('similar to')")
    assert page.run("return document.getElementById('query').value") == ""


def test_a_search_is_in_the_address_and_comes_back_on_reload(page, client):
    page.open(f"http://127.0.0.1:{client.port}/?q=slow+strings")
    page.wait(ROWS)
    assert page.run("return document.getElementById('query').value") == "slow strings"


def test_errors_are_shown(page):
    page.type("#query", "crash")
    assert page.wait("return document.querySelector('#state.bad')?.textContent").startswith("The search failed")


def test_every_control_has_a_name(page):
    page.type("#query", "anything")
    page.wait(ROWS)
    nameless = page.run(
        "return [...document.querySelectorAll('input, button')].filter(control => "
        "!(control.getAttribute('aria-label') || control.textContent.trim())).length"
    )
    assert nameless == 0


def test_the_loading_state_is_shown_and_the_query_is_answered_once_the_model_is_there(tmp_path):
    may_load, double = threading.Event(), DoubleSearcher(tmp_path)

    def open_searcher():
        may_load.wait(60)
        return double

    with running_server(open_searcher) as client, browser(390, 844, phone=True) as window:
        window.open(f"http://127.0.0.1:{client.port}/")
        window.wait("return document.getElementById('state').textContent.includes('being loaded')")
        window.type("#query", "calm")
        window.wait("return document.getElementById('state').textContent.includes('asks again by itself')")
        save_picture(window, "phone-loading")
        may_load.set()
        window.wait(ROWS)
        window.click("#results li .play")
        window.wait(AUDIO + "!a.paused && a.currentTime > 8")
        assert window.run("return document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out sideways
        save_picture(window, "phone")
        window.emulate("dark")
        save_picture(window, "phone-dark")


def test_a_server_that_is_gone_is_said(tmp_path, window):
    double = DoubleSearcher(tmp_path)
    with running_server(lambda: double) as client:
        client.wait_until_ready()
        window.open(f"http://127.0.0.1:{client.port}/")
        window.wait("return document.getElementById('state').textContent.includes('indexed')")
    window.type("#query", "calm")
    window.wait("return document.getElementById('state').textContent.includes('cannot be reached')")
