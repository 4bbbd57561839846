"""The report as a file: one page, complete, escaped, the same for the same analysis."""

from __future__ import annotations

import ast
import html
import json
import os
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from attar.compare import report
from attar.compare.analysis import Analysis, Failure
from attar.compare.figures import confusion, shortened
from attar.compare.report import html_text, write_report
from attar.compare.tables import csv_text, json_text, markdown_text
from attar.errors import AttarError
from compare.samples import sample, several, two_entries
from runs import python_code, said_in_child

VOID = {"meta", "link", "br", "wbr"}
HOSTILE = "<img src=x onerror=alert(1)>\"'&"


class Page(HTMLParser):
    """Tags, identifiers, references and text; refuses tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [value or "" for _, key, value in self.attributes if key == name]


SAMPLES = {
    "plain": sample,
    "two": two_entries,
    "many": lambda: several(10),
    "one seed": lambda: sample(seeds=(3,), failed=None),
    "nothing": lambda: sample([("ONE", 0.0, 1.0)], seeds=(), broken=None, failed=None),
    "baselines": lambda: sample([], smoothing=False),
    "one epoch": lambda: sample(epochs=1),
    "20 classes": lambda: sample(classes=[str(i) for i in range(20)]),
    "200 classes": lambda: sample(classes=[f"class {i}" for i in range(200)]),
}


@pytest.fixture(scope="module", params=list(SAMPLES))
def analysis(request: pytest.FixtureRequest) -> Analysis:
    return SAMPLES[request.param]()


@pytest.fixture(scope="module")
def text(analysis: Analysis) -> str:
    return html_text(analysis)


def test_page_is_whole_and_needs_nothing_else(text: str) -> None:
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert not {"link", "img", "iframe", "object", "image"} & set(page.tags)
    assert page.tags["script"] == page.tags["style"] == page.tags["h1"] == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in page.values("content")[0]


def test_identifiers_are_unique_and_references_meet_them(text: str) -> None:
    page = Page(text)
    known = Counter(page.values("id"))
    assert max(known.values()) == 1
    references = [value[1:] for value in page.values("href")]
    references += re.findall(r"url\(#([^)]+)\)", text)
    assert references
    assert set(references) <= set(known)


def test_figures_follow_the_theme_and_say_what_they_show(text: str) -> None:
    page = Page(text)
    assert page.values("role").count("img") == page.tags["svg"]
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == page.tags["svg"]
    assert all(labels)
    styles = [value or "" for _, name, value in page.attributes if name == "style"]
    assert not [style for style in styles if re.search(r"#[0-9a-f]{3,6}\b", style)]


def test_every_entry_figure_and_setting_is_there(analysis: Analysis, text: str) -> None:
    said = " ".join(" ".join(Page(text).text).split())
    squeezed = said.replace(" ", "")
    for entry in analysis.entries:
        assert entry.label.replace(" ", "") in squeezed
        for failure in entry.failures:
            assert failure.reason in said
        for folder in entry.folders:
            assert folder in said
        if "top1" in entry.figures:
            assert f"{100 * entry.figures['top1'].mean:.2f} %" in said
    for column in analysis.columns:
        assert column.meaning in said
    for note in (*analysis.notes, analysis.reproduce, *analysis.settings):
        assert note in said


def test_files_are_written_and_agree(tmp_path: Path) -> None:
    analysis = sample()
    files = write_report(analysis, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert set(files) == {"report.html", "report.csv", "report.json", "report.md"}
    for name, text in (
        ("report.html", html_text(analysis)),
        ("report.csv", csv_text(analysis)),
        ("report.json", json_text(analysis)),
        ("report.md", markdown_text(analysis)),
    ):
        assert files[name].read_bytes() == text.encode()
    with pytest.raises(AttarError, match="cannot be written"):
        write_report(analysis, tmp_path / "missing")


def test_same_analysis_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom compare.samples import sample\nfrom attar.compare.report import html_text\n"
        "Path('hash').write_text(str(hash('attar')))\n"
        "Path('page').write_bytes(html_text(sample()).encode())"
    )
    done = said_in_child(python_code, code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    if "PYTHONHASHSEED" not in os.environ:
        assert int((tmp_path / "hash").read_text()) != hash("attar"), "sets have another order there"
    assert (tmp_path / "page").read_bytes() == html_text(sample()).encode()


def test_everything_is_escaped() -> None:
    analysis = sample([(HOSTILE, 0.01, 1.0)], classes=[f"{HOSTILE}{i}" for i in range(4)], broken=None, failed=None)
    entry = analysis.entries[-1]
    entry = replace(
        entry,
        failures=(Failure(7, HOSTILE),),
        options={HOSTILE: {HOSTILE: HOSTILE}},
        folders=(HOSTILE,),
        verdict=f"{entry.label} {HOSTILE}",
    )
    column = replace(analysis.columns[0], title=HOSTILE, meaning=HOSTILE)
    analysis = replace(
        analysis,
        model=HOSTILE,
        data=HOSTILE,
        columns=(column, *analysis.columns[1:]),
        entries=(*analysis.entries[:-1], entry),
        settings={HOSTILE: [HOSTILE]},
        environment={HOSTILE: (HOSTILE,)},
        smoothing={HOSTILE: 0.5},
        images={HOSTILE: 1},
        reproduce=f"</script>{HOSTILE}",
        notes=(HOSTILE,),
    )
    text = html_text(analysis)
    page = Page(text)
    assert "<img" not in text
    assert page.tags["img"] == 0
    assert page.tags["script"] == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert html.escape(HOSTILE, quote=True).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in text


def test_names_that_markup_cannot_hold() -> None:
    analysis = sample([("a\x07b\nc $x$", 0.01, 1.0)], broken=None, failed=None)
    text = html_text(analysis)
    assert "a b c $x$" in Page(text).values("aria-label")[0] + "".join(Page(text).text)


def test_with_many_classes_pairs_take_the_place_of_heat_maps() -> None:
    analysis = sample(classes=[f"class {i}" for i in range(200)])
    plain, method = analysis.entries[0], analysis.entries[2]
    change = method.confusion - plain.confusion
    row, col = divmod(int(np.argmax(np.abs(change))), 200)
    text = html_text(analysis)
    section = text[text.index('<section id="classes">') : text.index('<section id="attached">')]
    assert "<svg" not in section
    assert f"<td>class {row}</td>" in section
    assert f"{abs(change[row, col]):.1f}</td>" in section
    assert len(text) < 500_000


def test_confusion_names_its_largest_change() -> None:
    change = np.array([[2.0, -2.0], [-5.0, 5.0]])
    drawn = confusion("ONE", change, ["no", "yes"], 0)
    assert drawn.finding == (
        "Confusion of ONE minus plain: the largest change is -5.0 images per seed of yes answered as no."
    )
    assert [drawn.svg.count(f">{text}<") for text in ("+2.0", "−2.0", "−5.0", "+5.0")] == [1, 1, 1, 1]
    assert "var(--good)" in drawn.svg  # more right answers, fewer confusions
    assert "var(--bad)" not in drawn.svg
    assert "var(--bad)" in confusion("ONE", -change, ["no", "yes"], 0).svg


def test_long_names_keep_both_ends() -> None:
    assert shortened("KD(teacher=resnet110,temperature=4)", 15) == "KD(teac…ture=4)"
    assert len(shortened("x" * 99, 20)) == 20
    assert shortened("ONE", 3) == "ONE"


def test_matplotlib_waits_until_something_is_drawn() -> None:
    for path in Path(report.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "pyplot" not in text
        for node in ast.parse(text).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("matplotlib", "jinja2")]


def test_settings_of_matplotlib_stay_as_they_were() -> None:
    import matplotlib

    before = json.dumps({key: str(value) for key, value in matplotlib.rcParams.items()})
    html_text(two_entries())
    assert json.dumps({key: str(value) for key, value in matplotlib.rcParams.items()}) == before
