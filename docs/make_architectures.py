"""Write docs/architectures.md from runs of the contract matrix, whole or in parts; of a test the last file counts.

pytest -m slow tests/methods/test_contract.py --junit-xml slow.xml
pytest tests/methods/test_contract.py --junit-xml common.xml
python docs/make_architectures.py slow.xml common.xml
"""

from __future__ import annotations

import datetime
import re
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import timm
import torch
import torchvision

import attar

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from architectures import ARCHITECTURES
from attar.anatomy import split, survey


def read(files: list[str]) -> dict[tuple[str, str], dict[str, bool]]:
    """Return by (network, method) which contract tests ran and whether they passed."""
    found: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            name = re.search(r"Test(\w+?)On_(.+)$", case.get("classname", "").rpartition("test_contract.")[2])
            if name and case.find("skipped") is None:
                passed = case.find("failure") is None and case.find("error") is None
                found[name[2], name[1]][str(case.get("name"))] = passed
    return found


def cell(tests: dict[str, bool]) -> str:
    """Return the number of passed tests, failures beside it, "refused" where that is what is proved, else nothing."""
    if list(tests) == ["test_it_says_why"] and all(tests.values()):
        return "refused"
    failed = sum(not passed for passed in tests.values())
    return (str(len(tests) - failed) if tests else "") + (f", **{failed} failed**" if failed else "")


def main() -> None:
    """Look each network over, write what was found and which tests passed."""
    found = read(sys.argv[1:])
    methods = [name for name in attar.methods.available() if any(method == name for _, method in found)]
    lines = [
        "# Architectures",
        "",
        "Every network below is found, tapped and cut without being told anything about it.",
        "",
        f"Made by `docs/make_architectures.py` on {datetime.date.today().isoformat()} with torch {torch.__version__}, "
        f"timm {timm.__version__}, torchvision {torchvision.__version__}.",
        "",
        "| network | size | stages (channels at resolution) | ONE cuts after | values across |",
        "|---|---|---|---|---|",
    ]
    for architecture in ARCHITECTURES:
        torch.manual_seed(0)
        network = architecture.make(5)
        images = torch.randn(2, 3, architecture.size, architecture.size)
        anatomy, _ = survey(network, images, num_classes=5)
        cut = anatomy.stages[-2].name
        carried = len(split(network, cut, images).carried)
        stages = ", ".join(f"{s.channels} at {s.height}x{s.width}" for s in anatomy.stages)
        lines.append(f"| {architecture.name} | {architecture.size} | {stages} | `{cut}` | {carried} |")
    lines += [
        "",
        "## Methods on them",
        "",
        "How many tests of the contract suite (`attar.testing.MethodContract`) have passed: finite terms, a gradient",
        "on every trainable tensor, terms that move the student, frozen teachers, exact state, float32 losses under",
        "autocast, `strip` bit-identical; on the common networks also `torch.compile(fullgraph=True)` equal to eager,",
        "which not every run included. *refused*: the method has no place in this network, and says why. Empty: not",
        "run yet. A failure would be shown.",
        "",
        "| network | " + " | ".join(methods) + " |",
        "|---|" + "---|" * len(methods),
    ]
    for architecture in ARCHITECTURES:
        cells = []
        for method in methods:
            # In file names of a report the colon is an underscore.
            names = (architecture.name, architecture.name.replace(":", "_"))
            cells.append(cell(next((found[name, method] for name in names if found[name, method]), {})))
        lines.append(f"| {architecture.name} | " + " | ".join(cells) + " |")
    Path(__file__).with_name("architectures.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
