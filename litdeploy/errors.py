"""Every error that a user can meet.

    LitdeployError                 exit code 2: the user's input, told without a traceback
    ├── CheckpointError            a weights file that is missing, torn, not weights, or does not fit
    ├── NetworkError               a network that is unknown, ambiguous, or has no repeated blocks
    ├── StudentError               a depth, plan or initialisation that the teacher does not allow
    ├── DataError                  a dataset that is missing, malformed, or not the teacher's
    ├── SettingsError              a recipe or target with an unknown key or a wrong value
    ├── TrainingError              a run that cannot go on: a loss that is not finite, no memory, a rank lost
    ├── BundleError                a folder that is no bundle, holds another run, was altered, is locked or unwritable
    ├── DeviceError                a device that is not there
    ├── RunnerError                a backend that cannot run what it was given
    ├── CompilationError           a function that torch.compile cannot compile here
    ├── DependencyError            an optional library that is not installed
    ├── GateError                  exit code 3: a result beyond a stated limit
    │   └── ParityError            an artefact that does not compute what the student computes
    └── InterruptedRun             exit code 130: stopped by the user; what was done is kept

A message says what was wrong, what was found, what would be right, and what to type. How a run that was stopped is gone
on with is told in the error's notes.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar


class LitdeployError(Exception):
    """Base of all errors that are told as a message; anything else is a fault of litdeploy's own (exit code 1)."""

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
