"""The report's files: JSON for programs, a page for people, the raw samples; and the training's rows that it shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litdeploy.errors import BundleError
from litdeploy.files import MOST_RECORD_BYTES, is_file, parse_json, read_small, write_whole
from litdeploy.profiler.figures import LARGEST
from litdeploy.profiler.report.page import render
from litdeploy.profiler.schema import REPORT_NAME, RawSamples, Report
from litdeploy.storage.bundle import SAMPLES

_PNG = b"\x89PNG\r\n\x1a\n"


def read_training(path: Path) -> tuple[dict[str, Any], ...]:
    """Rows of a metrics.jsonl; none where there is no such file, and without a line that was torn.

    Raises:
        BundleError: it cannot be read, or is far too large.
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
    """The same with numbers that a chart can show and texts that a page can hold; None for what is neither."""
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
    """JSON can hold half a character, which no file can."""
    return text.encode("utf-8", errors="replace").decode()


def write_report(report: Report, samples: Sequence[RawSamples], folder: Path) -> None:
    """Writes samples.json, report.html and, last, report.json, each whole or not at all.

    Args:
        folder: `profile/` in the bundle, whose sample sheet the page shows.
    """
    texts = {
        "samples.json": json.dumps(
            {"schema_version": 2, "measurements": [raw.model_dump(mode="json") for raw in samples]}
        ),
        "report.html": render(report, _sample_sheet(folder.parent / SAMPLES)),
        REPORT_NAME: report.model_dump_json(indent=2),
    }
    for name, text in texts.items():
        with write_whole(folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _sample_sheet(path: Path) -> bytes | None:
    """A generator's, for the page; None where there is none that a page can hold."""
    try:
        content = read_small(path)
    except OSError:
        return None
    return content if content.startswith(_PNG) else None
