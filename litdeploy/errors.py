"""Every error that a user can meet.

    LitdeployError                 exit code 2: invalid input, reported without a traceback
    ├── CheckpointError            a weights file that is missing, torn, not weights, or does not fit the network
    ├── NetworkError               a network that is unknown, ambiguous, or has no repeated blocks
    ├── StudentError               a depth, plan or initialization that the teacher does not allow
    ├── DataError                  a dataset that is missing, malformed, or does not match the teacher
    ├── SettingsError              a recipe or target with an unknown key or a wrong value
    ├── TrainingError              a run that cannot continue: a non-finite loss, no memory, a lost rank
    ├── BundleError                a folder that is not a bundle, holds another run, was altered, is locked or read-only
    ├── DeviceError                a device that does not exist
    ├── RunnerError                a backend that cannot run its input
    ├── CompilationError           a function that torch.compile cannot compile here
    ├── DependencyError            an optional library that is not installed
    ├── GateError                  exit code 3: a result beyond a stated limit
    │   └── ParityError            an artefact whose outputs differ from the student's
    └── InterruptedRun             exit code 130: stopped by the user; the work so far is kept

A message says what is wrong, what was found, what would be right, and what to type. The notes of an error say how to
resume a run that was stopped.
"""

from __future__ import annotations

import importlib
import signal
from typing import Any, ClassVar


class LitdeployError(Exception):
    """Base of all errors that are reported as a message; any other exception is a bug of litdeploy (exit code 1)."""

    exit_code: ClassVar[int] = 2


class CheckpointError(LitdeployError):
    pass


class NetworkError(LitdeployError):
    pass


class StudentError(LitdeployError):
    pass


class DataError(LitdeployError):
    pass


class SettingsError(LitdeployError):
    pass


class TrainingError(LitdeployError):
    pass


class BundleError(LitdeployError):
    pass


class DeviceError(LitdeployError):
    pass


class RunnerError(LitdeployError):
    pass


class CompilationError(LitdeployError):
    pass


class DependencyError(LitdeployError):
    pass


class GateError(LitdeployError):
    exit_code = 3


class ParityError(GateError):
    pass


class InterruptedRun(LitdeployError):
    exit_code = 130


def interrupting_signals() -> tuple[signal.Signals, ...]:
    """Signals that interrupt a run: Ctrl-C's, SIGTERM, and SIGHUP of a terminal that is closed, unless the process
    ignores it, as under nohup, to outlive the terminal."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    ignored = hangup is None or signal.getsignal(hangup) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (hangup,)))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters and without its full stop; its type if it has none.

    For messages that quote what another library raised.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")[:200]


def import_library(module: str, what: str, command: str) -> Any:
    """Import an optional library.

    Args:
        what: the thing that needs it, for the message.
        command: the command that installs it.

    Raises:
        DependencyError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(f"{what} needs the library {module} ({error}). Install it: {command}") from None
