"""Headless Chromium through chromedriver's HTTP interface (W3C WebDriver): the few commands the page's test needs."""

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--mute-audio",
    "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "ArrowUp": "\ue013", "ArrowDown": "\ue015"}


def why_missing():
    """Why no browser can be driven here, or None."""
    if not shutil.which("chromium"):
        return "chromium is not installed"
    return None if shutil.which("chromedriver") else "chromedriver (Debian: chromium-driver) is not installed"


class Browser:
    """One browser window."""

    def __init__(self, address):
        self._address = address

    def command(self, method, path, body=None):
        data = None if method != "POST" else json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()[:2000]}") from None

    def open(self, url):
        self.command("POST", "/url", {"url": url})

    def run(self, script, *arguments):
        """What the JavaScript function body returns."""
        return self.command("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector):
        return self.command("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def type(self, selector, text):
        self.command("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def click(self, selector):
        self.command("POST", f"/element/{self.find(selector)}/click")

    def press(self, *names):
        """Press keys, wherever the focus is."""
        actions = [{"type": kind, "value": KEYS.get(name, name)} for name in names for kind in ("keyDown", "keyUp")]
        self.command("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def wait(self, script, seconds=20):
        """What the script returns as soon as that is true; an `AssertionError` if it never is."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)
        return value

    def emulate(self, scheme):
        """Show the page as someone sees it who prefers a `light` or `dark` screen."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command(
            "POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}}
        )

    def screenshot(self):
        """The window as PNG in base64."""
        return self.command("GET", "/screenshot")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def browser(width=1200, height=800, phone=False):
    """A `Browser` with a profile of its own; both end with the block."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    driver = subprocess.Popen(
        [shutil.which("chromedriver"), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            options = {
                "binary": shutil.which("chromium"),
                "args": [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
            }
            if phone:
                options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2}}
            started = Browser(address)
            _wait_for(started, driver)
            session = started.command(
                "POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            )["sessionId"]
            window = Browser(f"{address}/session/{session}")
            try:
                yield window
            finally:
                window.command("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(20)


def _wait_for(started, driver):
    deadline = time.monotonic() + 30
    while True:
        assert driver.poll() is None, "chromedriver ended"
        try:
            started.command("GET", "/status")
            return
        except OSError:
            assert time.monotonic() < deadline, "chromedriver does not answer"
            time.sleep(0.05)
