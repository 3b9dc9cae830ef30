"""What was measured as CSV: a row for each side of each measurement, for a spreadsheet or a data frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Measurement, Report

_NESTED = ("teacher", "student", "comparison", "conditions")


def to_csv(reports: Sequence[Report]) -> str:
    """All measurements of the reports, with what tells the reports apart in the first columns.

    The columns have the names of the fields in report.json: those of the report, the measurement, its side (`side` is
    `teacher` or `student`), its comparison and its conditions (`gpu_` before
    those of the GPU). What is not known is empty.
    """
    rows = [
        _row(report, measurement, side)
        for report in reports
        for measurement in report.measurements
        for side in ("teacher", "student")
    ]
    heads = list(dict.fromkeys(head for row in rows for head in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(report: Report, measurement: Measurement, side: str) -> dict[str, Any]:
    told = measurement.model_dump(mode="json")
    flat = {
        "bundle": report.bundle,
        "student_sha256": report.student_sha256,
        "date": report.environment.date,
        "device_name": report.environment.device_name,
        **{name: value for name, value in told.items() if name not in _NESTED},
        "side": side,
        **told[side],
        **told["comparison"],
        **told["conditions"],
        **{f"gpu_{name}": value for name, value in (told["conditions"]["gpu"] or {}).items()},
    }
    del flat["gpu"]
    return {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in flat.items()}
