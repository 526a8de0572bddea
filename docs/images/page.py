"""Takes the picture of README.md, page.png: the page of `beit3 serve` with the weights that ship.

On the left a window of a desktop, where a question is answered; on the right a phone in dark mode,
where objects are found. `make picture` runs it; it needs Chromium (apt-get install chromium).
"""

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

TARGET = Path(__file__).with_name("page.png")
EXAMPLE = "a small purple triangle and a small dotted yellow bar"
QUESTION = "what color is the object below the yellow bar ?"
SCALE = 2  # pixels of the file per pixel of the page
HEIGHT, DESKTOP_WIDTH, PHONE_WIDTH, GAP = 950, 880, 360, 24


@contextmanager
def serve() -> Iterator[str]:
    """Serves the weights that ship; yields the address."""
    command = [sys.executable, "-m", "beit3", "serve", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if address := re.search(r"ready at (\S+)", line):
                yield address[1]
                return
        raise RuntimeError("the server did not start")
    finally:
        server.terminate()
        server.communicate()


@contextmanager
def open_page(browser: Browser, address: str, width: int, scheme: str) -> Iterator[Page]:
    """Opens the page and chooses the example."""
    page = browser.new_page(
        viewport={"width": width, "height": HEIGHT},
        device_scale_factor=SCALE,
        color_scheme=scheme,
    )
    page.goto(address)
    page.get_by_role("button", name=EXAMPLE).click()
    yield page
    page.close()


def take(page: Page) -> Image.Image:
    """Returns what the window shows, with neither focus nor pointer on anything."""
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def take_desktop(page: Page) -> Image.Image:
    page.get_by_role("button", name=QUESTION).click()
    page.locator(".answer").wait_for()
    return take(page)


def take_phone(page: Page) -> Image.Image:
    page.get_by_role("tab", name="Objects").click()
    page.get_by_role("button", name="Find objects").click()
    page.locator("rect.box").first.wait_for()
    return take(page)


def main() -> None:
    with serve() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        with open_page(browser, address, DESKTOP_WIDTH, "light") as page:
            desktop = take_desktop(page)
        with open_page(browser, address, PHONE_WIDTH, "dark") as page:
            phone = take_phone(page)
        browser.close()
    canvas = Image.new("RGB", (desktop.width + SCALE * GAP + phone.width, desktop.height), "white")
    canvas.paste(desktop, (0, 0))
    canvas.paste(phone, (canvas.width - phone.width, 0))
    # A palette halves the file; three rounds of k-means keep its colors true.
    canvas = canvas.quantize(kmeans=3, dither=Image.Dither.NONE)
    canvas.save(TARGET, optimize=True)
    print(f"{TARGET}: {canvas.width} x {canvas.height}, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
