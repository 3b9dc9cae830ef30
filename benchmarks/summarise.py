"""Figures of finished bundles as one JSON and Markdown rows: python benchmarks/summarise.py OUT.json BUNDLE [BUNDLE …]

Reads what `compress`, `export`, `evaluate` and `profile` left in the bundles; measures nothing itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from litdeploy.profiler import read_report
from litdeploy.storage.bundle import Bundle


def figures(path: Path) -> dict[str, Any]:
    """What one bundle came to; the profile where it was made."""
    bundle = Bundle(path)
    manifest = bundle.read_complete()
    found: dict[str, Any] = {
        "method": manifest.recipe.method,
        "recipe": manifest.recipe.model_dump(mode="json", exclude={"data"}),
        "run": manifest.run.model_dump(mode="json"),
        "accuracy": {
            role: {split: accuracy.model_dump() for split, accuracy in splits.items()}
            for role, splits in manifest.metrics.items()
        },
        "images": manifest.data.images,
    }
    report = read_report(bundle.profile_path)
    if report is not None:
        found["profile"] = report.model_dump(
            mode="json",
            include={"verdict", "depth_ratio", "parameter_ratio", "flop_ratio", "measurements", "environment"},
        )
        found["parity"] = report.parity.model_dump(mode="json") if report.parity else None
    return found


def main(out: Path, bundles: list[Path]) -> None:
    rows = [figures(path) for path in bundles]
    out.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in rows:
        student = row["accuracy"]["student"]
        print(f"| {row['method']} | {student['validation']['top1']:.2%} | {student['test']['top1']:.2%} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
