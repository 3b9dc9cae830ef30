"""Libraries that are installed only where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from litdeploy.errors import DependencyError


def library(module: str, what: str, command: str) -> Any:
    """Imports a library.

    Args:
        what: needs it, for the message.
        command: installs it.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(f"{what} needs the library {module} ({error}). Install it: {command}") from None
