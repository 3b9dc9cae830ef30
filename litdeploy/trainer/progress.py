"""Where a run reports: progress callbacks, `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litdeploy.config.spec import Noun
from litdeploy.errors import BundleError, DependencyError
from litdeploy.files import write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, str | int | float]


class Progress:
    """Progress callbacks; the defaults do nothing.

    Attributes:
        noun: what the run trains on; set when it begins.
    """

    noun: Noun = "image"

    def note(self, text: str) -> None:
        """Show a line."""

    def begin(self, phase: str, epoch: int, epochs: int, images: int) -> None:
        """Begin an epoch of this many images or texts."""

    def advance(self, images: int) -> None:
        """Count images that were trained on."""

    def end(self, row: Row) -> None:
        """End an epoch, with its metrics."""


class MetricsLog:
    """One line of JSON an epoch, flushed at once, and the same numbers to TensorBoard if wanted.

    Args:
        path: of `metrics.jsonl`.
        tensorboard: folder for TensorBoard's event files; None: write none.
        rows: of a resumed run; later lines in the file are cut off.

    Raises:
        DependencyError: TensorBoard is wanted and not installed.
        BundleError: the file cannot be written.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None, rows: Sequence[Row] = ()) -> None:
        self._writer = _summary_writer(tensorboard, rows) if tensorboard else None
        self._path = path
        if path != Path(os.devnull):
            with write_whole(path) as temporary:
                temporary.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise BundleError(f"{self._path}: cannot be written ({error.strerror}). Make room there.") from error
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._writer.add_scalar(name, value, row["epoch"])
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def check_tensorboard() -> None:
    """Raise DependencyError if TensorBoard is not installed: before a run, not after its first epoch."""
    _summary_writer_class()


def _summary_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DependencyError(
            "--tensorboard needs the library tensorboard. Install it: pip install 'litdeploy[tensorboard]'"
        ) from None
    return SummaryWriter


def _summary_writer(folder: Path, rows: Sequence[Row]) -> SummaryWriter:
    first_epoch = int(rows[-1]["epoch"]) + 1 if rows else 0
    writer: SummaryWriter = _summary_writer_class()(str(folder), purge_step=first_epoch)
    return writer
