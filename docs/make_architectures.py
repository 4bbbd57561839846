"""Write docs/architectures.md from a run of the full contract matrix.

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

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from architectures import ARCHITECTURES
from attar.anatomy import split, survey


def main() -> None:
    """Count the contract tests per network and method, look each network over, write the table."""
    tally: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for file in sys.argv[1:]:
        for case in ElementTree.parse(file).iter("testcase"):
            found = re.search(r"Test(\w+?)On_(.+)$", case.get("classname", "").rpartition("test_contract.")[2])
            if found and case.find("skipped") is None:
                failed = case.find("failure") is not None or case.find("error") is not None
                tally[found[2], found[1]][failed] += 1
    methods = sorted({method for _, method in tally})
    lines = [
        "# Architectures",
        "",
        "Every network below is found, tapped and cut without being told anything about it, and every method passes",
        "the contract suite on it (`attar.testing.MethodContract`): finite terms, a gradient on every trainable",
        "tensor, frozen teachers, exact state, float32 losses under autocast, and `strip` bit-identical; on the common",
        "ones also `torch.compile(fullgraph=True)` equal to eager.",
        "",
        f"Made by `docs/make_architectures.py` on {datetime.date.today().isoformat()} with torch {torch.__version__}, "
        f"timm {timm.__version__}, torchvision {torchvision.__version__}. Cells count passed contract tests; a failure "
        "would be shown.",
        "",
        "| network | size | stages (channels at resolution) | ONE cuts after | values across | "
        + " | ".join(methods)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(methods),
    ]
    for architecture in ARCHITECTURES:
        torch.manual_seed(0)
        network = architecture.make(5)
        images = torch.randn(2, 3, architecture.size, architecture.size)
        anatomy, _ = survey(network, images, num_classes=5)
        cut = anatomy.stages[-2].name
        carried = len(split(network, cut, images).carried)
        stages = ", ".join(f"{s.channels} at {s.height}x{s.width}" for s in anatomy.stages)
        cells = []
        for method in methods:
            passed, failed = tally[architecture.name.replace(":", "_"), method]
            passed, failed = (passed, failed) if passed + failed else tally[architecture.name, method]
            cells.append(f"{passed} passed" + (f", **{failed} failed**" if failed else ""))
        lines.append(
            f"| {architecture.name} | {architecture.size} | {stages} | `{cut}` | {carried} | "
            + " | ".join(cells)
            + " |"
        )
    Path(__file__).with_name("architectures.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
