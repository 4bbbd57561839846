"""The report in a real browser: silent, local, sortable, readable in both themes, on a phone and on paper."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attar.compare.report import write_report
from compare.samples import TEN, dense_sample, sample, several, two_entries

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
AWKWARD = ("<b>bold</b>", 'say "hi" & go', "it's", "日本語", "$x_1$", "a|b", "back\\slash", "*star*", "two words", "ok")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sample(), tmp_path_factory.mktemp("report"))["report.html"]


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("ATTAR_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Opened:
    """A page, what it complained of and what it asked for."""

    def __init__(self, browser: Any, file: Path, **about: Any):
        self.context = browser.new_context(**about)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.context.close()


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# Every piece of text with its colour and the first opaque background below it.
COLOURS = """() => [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() &&
  [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
    const style = getComputedStyle(e);
    let below = e;
    while (below && /, 0\\)|transparent/.test(getComputedStyle(below).backgroundColor)) below = below.parentElement;
    const svg = e instanceof SVGElement;
    return [svg ? style.fill : style.color, getComputedStyle(below || document.body).backgroundColor, e.textContent];
  })"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_silent_local_and_within_the_screen(browser: Any, report: Path, shots: Path, width: int, scheme: str) -> None:
    with Opened(browser, report, viewport={"width": width, "height": 900}, color_scheme=scheme) as opened:
        page = opened.page
        assert page.title() == "Does it help? cifar_resnet20 on cifar10"
        closed = page.locator("details:not([open]) > summary")
        assert closed.count() >= 3
        while closed.count():
            closed.first.click()
        size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert size[0] <= size[1] == width
        page.screenshot(path=shots / f"report-{width}-{scheme}.png", full_page=True)
        colours = page.evaluate(COLOURS)
        assert len(colours) > 500
        assert [each for each in colours if contrast(each[0], each[1]) < 4.5] == []
        assert opened.complaints == []
        assert opened.requests == [report.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_toggle_turns_the_theme_and_keeps_it(browser: Any, report: Path, scheme: str) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with Opened(browser, report, color_scheme=scheme) as opened:
        page, before = opened.page, opened.page.evaluate(background)
        assert (luminance(before) < 0.2) == (scheme == "dark")
        page.get_by_role("button", name="Light theme" if scheme == "dark" else "Dark theme").click()
        after = page.evaluate(background)
        assert (luminance(after) < 0.2) == (scheme == "light")
        colours = page.evaluate(COLOURS)
        assert [each for each in colours if contrast(each[0], each[1]) < 4.5] == []
        page.reload()
        assert page.evaluate(background) == after
        assert opened.complaints == []


def shown(page: Any, column: int) -> list[float | None]:
    texts = page.evaluate(
        "n => [...document.querySelectorAll('#figures tbody')].map(b => b.rows[0].cells[n].dataset.value)", column
    )
    return [float(text) if text else None for text in texts]


def test_the_table_sorts_by_click_and_by_keyboard(browser: Any, report: Path) -> None:
    analysis = sample()
    keys = [column.key for column in analysis.columns]
    with Opened(browser, report, viewport={"width": 1440, "height": 900}) as opened:
        page = opened.page
        for key, first in (("top1", True), ("training_seconds", False)):
            values = [entry.figures[key].mean for entry in analysis.entries if key in entry.figures]
            place = 3 + keys.index(key)
            head = page.locator(f'#figures th[data-key="{key}"]')
            head.locator("button").click()  # the better end first
            assert shown(page, place) == [*sorted(values, reverse=first), None]
            assert head.get_attribute("aria-sort") == ("descending" if first else "ascending")
            head.locator("button").press("Enter")
            assert shown(page, place) == [*sorted(values, reverse=not first), None]
            assert head.get_attribute("aria-sort") == ("ascending" if first else "descending")
        assert page.locator('#figures [aria-sort="ascending"], #figures [aria-sort="descending"]').count() == 1
        page.get_by_role("button", name="entry").click()
        labels = page.locator("#figures tbody tr:first-child th").evaluate_all("all => all.map(e => e.dataset.value)")
        assert sorted(labels) == sorted(entry.label for entry in analysis.entries)
        assert labels == sorted(labels, key=str.lower)
        # The reason of a failure still stands below its entry.
        why = page.locator("#figures tbody", has=page.locator('th[data-value="SCD"]'))
        assert "NaN at step 812" in why.locator(".why").inner_text()
        assert opened.complaints == []


def test_the_first_column_stays_while_the_table_scrolls(browser: Any, report: Path) -> None:
    with Opened(browser, report, viewport={"width": 390, "height": 800}) as opened:
        left = "document.querySelector('#figures tbody th').getBoundingClientRect().left"
        before = opened.page.evaluate(left)
        opened.page.evaluate("document.querySelector('#figures').parentElement.scrollLeft = 500")
        assert opened.page.evaluate("document.querySelector('#figures').parentElement.scrollLeft") == 500
        assert abs(opened.page.evaluate(left) - before) <= 1


def test_copying_the_command(browser: Any, report: Path) -> None:
    with Opened(browser, report, permissions=["clipboard-read", "clipboard-write"]) as opened:
        opened.page.get_by_role("button", name="Copy").click()
        opened.page.get_by_role("button", name="Copied").wait_for(timeout=5000)
        assert opened.page.evaluate("navigator.clipboard.readText()") == sample().reproduce


def test_on_paper_all_is_open_light_and_without_buttons(browser: Any, report: Path, shots: Path) -> None:
    with Opened(browser, report, color_scheme="dark", viewport={"width": 718, "height": 1000}) as opened:
        page = opened.page
        page.emulate_media(media="print", color_scheme="dark")
        assert page.locator("#theme:visible, [data-copy]:visible, nav:visible").count() == 0
        heads = page.locator("#figures thead tr:last-child th").all_inner_texts()
        assert [" ".join(head.split()) for head in heads[3:]] == [column.title for column in sample().columns]
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.screenshot(path=shots / "report-print.png", full_page=True)
        hidden = page.evaluate(
            "[...document.querySelectorAll('details > *:not(summary)')].filter(e => !e.checkVisibility()).length"
        )
        assert hidden == 0
        page.pdf(path=shots / "report.pdf", prefer_css_page_size=True)
        assert opened.complaints == []


def test_without_scripts_all_but_sorting_and_the_toggle_is_there(browser: Any, report: Path) -> None:
    with Opened(browser, report, java_script_enabled=False) as opened:
        assert opened.page.locator("button:visible").count() == 0
        assert opened.page.locator("svg:visible").count() >= 10
        assert opened.page.locator("#figures tbody").count() == 8


@pytest.fixture(scope="module", params=["two", "many", "classes", "awkward", "dense", "dense many"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name: str = request.param
    analysis = {
        "two": two_entries,
        "many": lambda: several(23),
        "classes": lambda: sample(classes=[f"class {i}" for i in range(200)]),
        "awkward": lambda: replace(sample([("x" * 90, 0.01, 2.0), ("</script><i>", 0.0, 1.0)]), classes=AWKWARD),
        "dense": lambda: dense_sample(AWKWARD[:5]),
        "dense many": lambda: dense_sample([f"class {i}" for i in range(40)], methods=14, size=(60, 80)),
    }[name]()
    assert len(AWKWARD) == len(TEN)
    return name, write_report(analysis, tmp_path_factory.mktemp("other"))["report.html"]


@pytest.mark.parametrize("width", [390, 1440])
def test_other_comparisons_fit_too(browser: Any, other: tuple[str, Path], shots: Path, width: int) -> None:
    name, file = other
    with Opened(browser, file, viewport={"width": width, "height": 900}) as opened:
        size = opened.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert size[0] <= size[1] == width
        assert opened.page.locator("b, i").count() == 0
        assert opened.complaints == []
        opened.page.screenshot(path=shots / f"{name}-{width}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_masks_are_seen_in_both_themes(browser: Any, tmp_path: Path, shots: Path, width: int, scheme: str) -> None:
    analysis = dense_sample()
    file = write_report(analysis, tmp_path)["report.html"]
    with Opened(browser, file, viewport={"width": width, "height": 900}, color_scheme=scheme) as opened:
        page = opened.page
        drawn = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.alt])")
        assert len(drawn) == 4 * (2 + len(analysis.entries))
        assert all(done and (across, down) == (240, 180) and alt for done, across, down, alt in drawn)
        shown = page.evaluate("[...document.images].map(i => i.getBoundingClientRect()).map(b => [b.width, b.height])")
        assert all(abs(down / across - 0.75) < 0.01 and 100 < across < width for across, down in shown)
        # Images of one row stand in line, whatever their captions.
        tops = page.evaluate("[...document.querySelector('.strip').children].map(f => f.getBoundingClientRect().top)")
        assert len(set(tops[: 2 if width == 390 else 7])) == 1
        hatched = page.locator("img.mask").first.evaluate("e => getComputedStyle(e).backgroundImage")
        assert hatched.startswith("repeating-linear-gradient")
        bars = page.locator("#iou tbody tr:first-child .bar")
        assert bars.count() == (len(analysis.classes) - 1) * len(analysis.entries)
        lengths = bars.evaluate_all("all => all.map(e => e.getBoundingClientRect().width)")
        assert len(set(lengths)) == 1
        assert [each for each in page.evaluate(COLOURS) if contrast(each[0], each[1]) < 4.5] == []
        assert opened.complaints == []
        assert [url for url in opened.requests if not url.startswith("data:")] == [file.as_uri()]
        page.screenshot(path=shots / f"dense-{width}-{scheme}.png", full_page=True)


def test_masks_on_paper(browser: Any, tmp_path: Path, shots: Path) -> None:
    file = write_report(dense_sample(methods=14), tmp_path)["report.html"]
    with Opened(browser, file, color_scheme="dark", viewport={"width": 718, "height": 1000}) as opened:
        page = opened.page
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("[...document.images].filter(i => !i.checkVisibility()).length") == 0
        assert page.locator("img.mask").first.evaluate("e => getComputedStyle(e).printColorAdjust") == "exact"
        assert page.evaluate("document.querySelector('#iou').offsetWidth") <= 1046  # A4 landscape, 277 mm
        page.screenshot(path=shots / "dense-print.png", full_page=True)
        page.pdf(path=shots / "dense.pdf", prefer_css_page_size=True)
        assert opened.complaints == []
