"""Opens every page of the built site in headless Chromium; fails on what a reader would see missing.

    python docs/look.py                     after `make docs`; needs Chromium or Chrome on the PATH
    python docs/look.py --pictures FOLDER   also takes each page's picture: light and dark, wide and narrow

A page fails with an error in its console, a picture that does not load, a request that leaves the site, a
formula that is not typeset, or when it is wider than a narrow screen. `make docs` installs playwright, which
drives the browser, in .venv-docs.
"""

import argparse
import contextlib
import functools
import http.server
import itertools
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import TimeoutError, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES, SCHEMES = {"wide": (1280, 900), "narrow": (390, 800)}, ("light", "dark")
READY = """() => {
  document.querySelectorAll('img').forEach(img => { img.loading = 'eager'; });
  return [...document.images].every(img => img.complete)
      && [...document.querySelectorAll('.math')].every(math => math.querySelector('mjx-container'));
}"""
PROBE = """() => [
  ...[...document.images].filter(img => !img.naturalWidth).map(img => 'missing picture ' + img.src),
  ...[...document.querySelectorAll('.math')].filter(math => !math.querySelector('mjx-container'))
      .map(math => 'untypeset formula ' + math.textContent.slice(0, 60)),
  ...[...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => 'bad formula ' + e.textContent),
  ...(document.documentElement.scrollWidth > innerWidth + 1 ? ['wider than the screen'] : []),
]"""


def look_at(page, url, site, picture):
    """What is wrong with a page, new in the browser."""
    problems = []
    page.on("pageerror", lambda error: problems.append(f"error {error}"))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    with contextlib.suppress(TimeoutError):  # the probe says what is missing
        page.wait_for_function(READY, timeout=5000)
    problems += page.evaluate(PROBE)
    problems += [f"leaves the site: {x}" for x in asked if not x.startswith((site, "data:", "blob:"))]
    if picture:
        page.screenshot(path=picture, full_page=True)
    page.close()
    return problems


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--html", type=Path, default=Path(__file__).parent / "_build" / "html", help="the site"
    )
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of each page")
    parser.add_argument("names", nargs="*", help="pages, such as start.html; by default all")
    args = parser.parse_args()
    pages = args.names or sorted(str(path.relative_to(args.html)) for path in args.html.rglob("*.html"))
    pages = [page for page in pages if not page.startswith("_")]
    if not pages:
        sys.exit(f"There is no page in {args.html}: make docs")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=args.html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site, failed = f"http://127.0.0.1:{server.server_port}/", 0
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, NAMES)), None)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, (look, (width, height)), scheme in itertools.product(pages, SIZES.items(), SCHEMES):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            file = f"{name.removesuffix('.html').replace('/', '-')}-{look}-{scheme}.png"
            for problem in look_at(page, site + name, site, args.pictures and args.pictures / file):
                failed += 1
                print(f"{name}, {look} {scheme}: {problem}")
    print(f"{len(pages)} pages in four looks: {failed or 'nothing'} wrong.")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
