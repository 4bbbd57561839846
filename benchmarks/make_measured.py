"""Write what methods have gained into the package, from the report of a comparison.

python benchmarks/make_measured.py runs/selfdist/report.json benchmarks/self_distillation.md "5,000 CIFAR-10 images"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from attar.measured import read_report, write_measured


def main() -> None:
    report, file, data = sys.argv[1:]
    rows = read_report(json.loads(Path(report).read_text(encoding="utf-8")), file, data)
    write_measured(rows, Path(__file__).parent.parent / "src/attar/measured.json")
    for row in rows:
        print(f"{row.method}: {row}")


if __name__ == "__main__":
    main()
