"""Pages in headless Chromium."""

import contextlib
import html
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

# The page in frames of these widths; what is in them is written where --dump-dom shows it.
FRAMES = """<!DOCTYPE html>
<body><script>
const measured = []
for (const width of {widths}) {{
  const frame = document.createElement("iframe")
  frame.style = `border: 0; height: 4000px; width: ${{width}}px`
  frame.onload = () => {{
    const page = frame.contentDocument, root = page.documentElement
    measured.push({{
      width: root.clientWidth, needed: root.scrollWidth,
      images: [...page.images].map(image => [image.complete, image.naturalWidth, image.getBoundingClientRect().width]),
    }})
    document.body.dataset.measured = JSON.stringify(measured)
  }}
  frame.srcdoc = {page}
  document.body.append(frame)
}}
</script></body>
"""


def chromium(folder: Path, *arguments: str) -> str:
    """Returns what headless Chromium prints; fails if a page has said something to the console."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed")
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--force-color-profile=srgb", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert done.returncode == 0 and not said, (said, done.stderr[-3000:])
    return done.stdout


def measure(page: Path, widths_px: Sequence[int], folder: Path) -> list[dict]:
    """Returns of the page at each width: `width`, `needed`, `images` (complete, natural width, shown width)."""
    frames = folder / "frames.html"
    text = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
    frames.write_text(FRAMES.format(widths=list(widths_px), page=text), encoding="utf-8")
    dom = chromium(folder, "--dump-dom", frames.as_uri())
    return json.loads(html.unescape(dom.split('data-measured="')[1].split('"')[0]))


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the address of a folder, and the list of what is asked for there."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_request(self, *_):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
