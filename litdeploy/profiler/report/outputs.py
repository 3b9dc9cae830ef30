"""Files that a user names on the command line."""

from __future__ import annotations

from pathlib import Path

from litdeploy.errors import SettingsError
from litdeploy.files import write_whole


def check_output(path: Path, option: str) -> None:
    """Makes the file's folder, before anything is measured.

    Args:
        option: that named it: `--csv`.

    Raises:
        SettingsError: it cannot be a file there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{option} {path}: its folder cannot be made ({error.strerror}).") from None
    if path.is_dir():
        raise SettingsError(f"{option} {path}: is a folder; name a file in it.")


def write_output(path: Path, text: str, option: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        SettingsError: it cannot be written there.
    """
    check_output(path, option)
    try:
        with write_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{option} {path}: it cannot be written there ({error.strerror}).") from None
