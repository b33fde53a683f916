"""Opens every page of the built site in headless Chromium; fails on what a reader would see missing.

    python docs/look.py                     after `make docs`; needs Chromium on the PATH
    python docs/look.py --pictures FOLDER   also takes each page's picture: light and dark, wide and narrow

A page fails with an error in its console, a picture that does not load, a request that leaves the site, a
formula that is not typeset, or when it is wider than a narrow screen. Only the standard library is used:
Chromium is spoken to by its DevTools protocol.
"""

import argparse
import base64
import functools
import http.server
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

HTML = Path(__file__).parent / "_build" / "html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOOKS = {
    "wide-light": (1280, 900, "light"),
    "wide-dark": (1280, 900, "dark"),
    "narrow-light": (390, 800, "light"),
    "narrow-dark": (390, 800, "dark"),
}
# What is wrong with the page as it stands: pictures, formulas, width.
PROBE = """(() => {
  const problems = [];
  for (const img of document.images) {
    if (img.complete && img.naturalWidth === 0) problems.push('missing picture ' + img.src);
  }
  for (const math of document.querySelectorAll('.math')) {
    const words = math.textContent.slice(0, 60);
    if (!math.querySelector('mjx-container')) problems.push('untypeset formula ' + words);
  }
  for (const error of document.querySelectorAll('mjx-merror, [data-mjx-error]')) {
    problems.push('bad formula ' + error.textContent);
  }
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 1) problems.push('wider than the screen by ' + wide);
  return problems;
})()"""


class Socket:
    """A WebSocket, as much of it as the DevTools protocol needs."""

    def __init__(self, url):
        host, _, path = url.removeprefix("ws://").partition("/")
        name, _, port = host.partition(":")
        self.socket = socket.create_connection((name, int(port)), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET /{path} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
        self.socket.sendall("\r\n".join(lines).encode())
        self.stream = self.socket.makefile("rb")
        while self.stream.readline() not in (b"\r\n", b""):
            pass
        self.count, self.events = 0, []

    def call(self, method, **params):
        self.count += 1
        data = json.dumps({"id": self.count, "method": method, "params": params}).encode()
        mask = os.urandom(4)
        short = len(data) < 65536
        size = struct.pack("!BH", 0xFE, len(data)) if short else struct.pack("!BQ", 0xFF, len(data))
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
        self.socket.sendall(b"\x81" + size + mask + masked)
        while (message := self._next()).get("id") != self.count:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def _next(self):
        data, last = b"", False
        while not last:
            first, size = self.stream.read(2)
            last, size = bool(first & 0x80), size & 0x7F
            if size == 126:
                (size,) = struct.unpack("!H", self.stream.read(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", self.stream.read(8))
            data += self.stream.read(size)
        return json.loads(data)


def evaluate(page, expression):
    return page.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


def look_at(page, url, site, look, picture=None):
    """What is wrong with a page in one look."""
    width, height, scheme = look
    page.events.clear()
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    page.call("Emulation.setDeviceMetricsOverride", **metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.call("Emulation.setEmulatedMedia", features=features)
    page.call("Page.navigate", url=url)
    ready = f"document.readyState === 'complete' && location.href === {json.dumps(url)}"
    for _ in range(200):
        if evaluate(page, ready):
            break
        time.sleep(0.05)
    evaluate(page, "document.querySelectorAll('img').forEach(img => { img.loading = 'eager'; })")
    for _ in range(40):  # formulas are typeset, and pictures loaded, after the page is
        time.sleep(0.05)
        problems = evaluate(page, PROBE)
        if not problems:
            break
    for event in page.events:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                problems.append(f"error {params['exceptionDetails'].get('exception', {}).get('description')}")
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                problems.append(f"console {params['args']}")
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                problems.append(f"log {params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                target = params["request"]["url"]
                if not target.startswith((site, "data:", "blob:")):
                    problems.append(f"a request leaves the page: {target}")
    if picture is not None:
        size = page.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": width, "height": min(size["height"], 6000), "scale": 1}
        shot = page.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        picture.write_bytes(base64.b64decode(shot["data"]))
    return problems


def browser(folder):
    """Chromium, and its DevTools' address."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        sys.exit(f"None of {', '.join(NAMES)} is installed.")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    options += ["--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        [path, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    port = Path(folder) / "DevToolsActivePort"
    for _ in range(300):
        if port.exists() and len(lines := port.read_text().split()) == 2:
            return process, f"http://127.0.0.1:{lines[0]}"
        time.sleep(0.1)
    process.kill()
    sys.exit("Chromium did not start.")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--html", type=Path, default=HTML, help="the built site")
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of each page")
    parser.add_argument("names", nargs="*", help="pages, such as start.html; by default all")
    args = parser.parse_args()
    pages = args.names or sorted(str(p.relative_to(args.html)) for p in args.html.rglob("*.html"))
    pages = [page for page in pages if not page.startswith("_")]
    if not pages:
        sys.exit(f"There is no page in {args.html}: make docs")
    handler = functools.partial(Quiet, directory=args.html)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}/"
    failed = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process, address = browser(folder)
        try:
            with urllib.request.urlopen(f"{address}/json") as reply:
                target = next(t for t in json.load(reply) if t["type"] == "page")
            page = Socket(target["webSocketDebuggerUrl"])
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.call(f"{domain}.enable")
            for name in pages:
                for look, size in LOOKS.items():
                    picture = None
                    if args.pictures:
                        args.pictures.mkdir(parents=True, exist_ok=True)
                        picture = args.pictures / f"{name.removesuffix('.html').replace('/', '-')}-{look}.png"
                    for problem in look_at(page, site + name, site, size, picture):
                        failed += 1
                        print(f"{name}, {look}: {problem}")
        finally:
            process.terminate()
            process.wait()
    print(f"{len(pages)} pages in {len(LOOKS)} looks: {failed or 'nothing'} wrong.")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
