"""A picture of the search page with an answer on it, taken in headless Chromium: docs/search_page.png is one."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, this folder is the path
from common.errors import UserError, run_script

SEARCH = Path(__file__).resolve().parents[1] / "search.py"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage")
SECONDS = 300  # until the model is loaded


def build_parser() -> argparse.ArgumentParser:
    """The command line; the defaults are what `make demo` leaves."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog='example: python -m examples.page_picture --query "church organ" --out organ.png      (after make demo)',
    )
    add = parser.add_argument
    add("--query", default="fast electronic dance", help="what is asked for (%(default)s)")
    add("--checkpoint", default="demo/checkpoints/musicnn_best_r1.pt", metavar="FILE", help="(%(default)s)")
    add("--milvus-uri", default="demo/data/library.db", help="the library (%(default)s)")
    add("--size", default="880,640", metavar="WIDTH,HEIGHT", help="of the window in pixels (%(default)s)")
    add("--out", type=Path, default=Path("docs/search_page.png"), help="the picture (%(default)s)")
    return parser


def wait_until_ready(address: str, server: subprocess.Popen[str]) -> None:
    """Return once queries are answered; `UserError` where the server ends or takes too long."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}api/status", timeout=60) as answer:
                if json.load(answer)["state"] == "ready":
                    return
        except OSError:
            pass  # the server is ending, which the loop finds
        time.sleep(0.5)
    raise UserError(f"{address}: expected a page that answers within {SECONDS} s; search.py's output says why not")


def main(argv: list[str] | None = None) -> None:
    """Serve the library on a free port, photograph the page, and end the server."""
    args = build_parser().parse_args(argv)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        raise UserError("expected chromium (Debian: apt-get install chromium), found none")
    library = ["--checkpoint", args.checkpoint, "--milvus-uri", args.milvus_uri]
    command = [sys.executable, str(SEARCH), "--serve", "--port", "0", *library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().split(" ")[0] if server.stdout else ""
            if not address.startswith("http"):
                raise UserError(f"{SEARCH}: expected the page's address, found none; its output says why")
            wait_until_ready(address, server)
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
                # virtual time: the picture is taken when nothing is left to load, as if this much had passed
                flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={args.size}"]
                flags += ["--virtual-time-budget=10000", f"--screenshot={args.out.resolve()}"]
                page = f"{address}?{urlencode({'q': args.query})}"
                subprocess.run([chromium, *flags, page], check=True, timeout=SECONDS, stderr=subprocess.DEVNULL)
        finally:
            server.terminate()
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_script(main)
