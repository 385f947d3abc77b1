"""The console's pictures in docs/images, taken of a running system.

    python -m bench.console_images

Two prefill and two decode workers with three places each serve the demo model at a calm rate, then
25 requests come at once. Needs the ``playwright`` package, Chromium, and a machine with little else
to do: *What if* is only as good as what was measured.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from playwright.sync_api import Locator, Page, ViewportSize, sync_playwright

from tests.stack import Stack

FOLDER = Path(__file__).parent.parent / "docs" / "images"
Scheme = Literal["light", "dark"]
VIEWPORT: ViewportSize = {"width": 1180, "height": 1130}
MARGIN = 16  # pixels around a part of the page
PLACES = ("--max-num-seqs", "3")
OBJECTIVE = {"ttft": 300.0, "tpot": 20.0}  # ms
CALM = ("--rate", "4", "--prompt-tokens", "48-400", "--output-tokens", "32-128")
BURST = ("--concurrency", "25", "--num-requests", "25", "--warmup", "0")
LONG = ("--prompt-tokens", "600", "--output-tokens", "120")
AFTERWARDS = 15  # seconds of calm load after the burst, so that the charts show it as past


def main(
    seconds: Annotated[int, typer.Option(help="Of calm load before the burst.", min=30)] = 180,
    scheme: Annotated[Scheme, typer.Option(help="Colours.")] = "light",
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = FOLDER,
) -> None:
    """Write console.png, slow-requests.png, waterfall.png and what-if.png."""
    decode = [PLACES, PLACES]
    name = ("--served-model-name", "kvferry-demo")
    with (
        Stack("demo", prefill=[(), ()], decode=decode, router=name, transport="auto") as stack,
        console(stack.url, OBJECTIVE, scheme) as page,
    ):
        _load(stack, *CALM, "--duration", str(seconds)).wait()
        _what_if(page, folder)
        _load(stack, *BURST, *LONG, "--seed", "1").wait()
        calm = _load(stack, *CALM, "--duration", str(AFTERWARDS), "--seed", "2")
        page.wait_for_timeout(1000 * (AFTERWARDS - 3))
        page.screenshot(path=folder / "console.png")
        _slowest(page, folder)
        calm.wait()


@contextmanager
def console(url: str, objective: dict[str, float], scheme: Scheme = "light") -> Iterator[Page]:
    """A router's console in Chromium. ``objective``: ``ttft`` and ``tpot`` in milliseconds."""
    with sync_playwright() as started:
        executable = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEWPORT, color_scheme=scheme)
        page.goto(url + "/console")
        for field, value in objective.items():
            page.locator(f"input[name={field}]").fill(f"{value:g}")
            page.keyboard.press("Enter")
        yield page
        browser.close()


def _load(stack: Stack, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cli.main", "bench", "--url", stack.url, *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _what_if(page: Page, folder: Path) -> None:
    """One prefill worker fewer, at four times the rate."""
    section = page.locator("#what-if")
    section.locator("summary").click()
    page.get_by_role("slider", name="Pools").press("ArrowLeft")
    section.get_by_text("1 prefill + 3 decode would keep").wait_for()
    with page.expect_response("**/admin/what-if"):
        page.get_by_role("slider", name="Rate").fill("2")  # a power of two
    page.locator("#what-if:not(.asking)").wait_for()
    _picture(page, section, folder / "what-if.png")
    section.locator("summary").click()
    page.evaluate("scroll(0, 0)")


def _slowest(page: Page, folder: Path) -> None:
    page.get_by_role("button", name="Slow").click()
    requests = page.locator("section", has=page.locator("#requests"))
    _picture(page, requests, folder / "slow-requests.png")
    requests.locator("tbody button").first.click()
    page.locator("#request-body").click()  # away from the button that has the focus
    page.locator("dialog#request").screenshot(path=folder / "waterfall.png")


def _picture(page: Page, part: Locator, file: Path) -> None:
    """A part of the page with some of what is around it."""
    part.evaluate("part => part.scrollIntoView({ block: 'center' })")
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)  # it marks the row that it is on
    box = part.bounding_box()
    assert box is not None
    page.screenshot(
        path=file,
        clip={
            "x": max(0, box["x"] - MARGIN),
            "y": max(0, box["y"] - MARGIN),
            "width": box["width"] + 2 * MARGIN,
            "height": box["height"] + 2 * MARGIN,
        },
    )


if __name__ == "__main__":
    typer.run(main)
