"""Write the report's files: JSON, the page, raw samples, CSV; and read the training log that it contains."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litdeploy.errors import BundleError, SettingsError
from litdeploy.files import MOST_RECORD_BYTES, is_file, parse_json, read_small, write_whole
from litdeploy.profiler.formatting import LARGEST
from litdeploy.profiler.report.page import render
from litdeploy.profiler.schema import REPORT_NAME, Measurement, RawSamples, Report
from litdeploy.storage.bundle import SAMPLES

_PNG = b"\x89PNG\r\n\x1a\n"
_NESTED = ("teacher", "student", "comparison", "conditions")


def write_report(report: Report, samples: Sequence[RawSamples], folder: Path) -> None:
    """Write samples.json, report.html and, last, report.json, each whole or not at all.

    Args:
        folder: `profile/` in the bundle; the page shows the bundle's sample sheet.
    """
    raw = {"schema_version": 2, "measurements": [each.model_dump(mode="json") for each in samples]}
    texts = {
        "samples.json": json.dumps(raw),
        "report.html": render(report, _sample_sheet(folder.parent / SAMPLES)),
        REPORT_NAME: report.model_dump_json(indent=2),
    }
    for name, text in texts.items():
        with write_whole(folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _sample_sheet(path: Path) -> bytes | None:
    """A generator's sample sheet; None if there is none that a page can show."""
    try:
        content = read_small(path)
    except OSError:
        return None
    return content if content.startswith(_PNG) else None


def read_training(path: Path) -> tuple[dict[str, Any], ...]:
    """Read the rows of a metrics.jsonl; none if the file is missing. Torn lines are skipped.

    Raises:
        BundleError: the file cannot be read, or is far too large.
    """
    if not is_file(path):
        return ()
    rows = []
    try:
        text = read_small(path, MOST_RECORD_BYTES).decode("utf-8", errors="replace")
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be read ({error.strerror}). Remove it, or put the right one there."
        ) from None
    for line in text.splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append({_encodable(key): _plain(value) for key, value in row.items()})
    return tuple(rows)


def _plain(value: object, levels: int = 4) -> Any:
    """The value with only numbers that a chart can show and text that a page can hold; None for anything else."""
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, list) and levels:
        return [_plain(each, levels - 1) for each in value]
    if isinstance(value, dict) and levels:
        return {_encodable(key): _plain(each, levels - 1) for key, each in value.items()}
    if isinstance(value, bool) or (isinstance(value, int | float) and abs(value) < LARGEST):
        return value
    return None


def _encodable(text: str) -> str:
    """Replace lone surrogates: JSON can hold them, files cannot."""
    return text.encode("utf-8", errors="replace").decode()


def to_csv(reports: Sequence[Report]) -> str:
    """All measurements of the reports as CSV: one row per side and measurement; the first columns identify the report.

    The columns are named like the fields in report.json: of the report, the measurement, its side (`side` is `teacher`
    or `student`), its comparison and its conditions (prefixed with `gpu_` for the GPU's). Unknown values are empty.
    """
    rows = [
        _csv_row(report, measurement, side)
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


def _csv_row(report: Report, measurement: Measurement, side: str) -> dict[str, Any]:
    values = measurement.model_dump(mode="json")
    gpu = values["conditions"].pop("gpu") or {}
    flat = {
        "bundle": report.bundle,
        "student_sha256": report.student_sha256,
        "date": report.environment.date,
        "device_name": report.environment.device_name,
        **{name: value for name, value in values.items() if name not in _NESTED},
        "side": side,
        **values[side],
        **values["comparison"],
        **values["conditions"],
        **{f"gpu_{name}": value for name, value in gpu.items()},
    }
    return {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in flat.items()}


def check_output(path: Path, option: str) -> None:
    """Create the folder of a file that the user named, before anything is measured.

    Args:
        option: that named it: `--csv`.

    Raises:
        SettingsError: there cannot be a file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{option} {path}: its folder cannot be created ({error.strerror}).") from None
    if path.is_dir():
        raise SettingsError(f"{option} {path}: is a folder; name a file in it.")


def write_output(path: Path, text: str, option: str) -> None:
    """Write a file that the user named, whole or not at all.

    Raises:
        SettingsError: the file cannot be written.
    """
    check_output(path, option)
    try:
        with write_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{option} {path}: it cannot be written there ({error.strerror}).") from None
