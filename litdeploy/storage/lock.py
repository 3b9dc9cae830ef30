"""One process at a time: a lock that the operating system releases when its holder ends, however it ends.

A file next to the lock describes the holder. It is shown to a process that is refused, and decides nothing.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from litdeploy.errors import BundleError
from litdeploy.files import read_small, write_text

_MOST_BYTES = 4096
_LONGEST_COMMAND = 200


class Holder(BaseModel):
    """The process that holds a lock: its id, machine, start (ISO 8601, UTC) and command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    pid: int
    host: str
    since: str
    command: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(
            pid=os.getpid(),
            host=socket.gethostname(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join(sys.argv)[:_LONGEST_COMMAND],
        )

    def summary(self) -> str:
        """One line for messages, without control characters for the terminal."""
        text = f"process {self.pid} on {self.host}, since {self.since}: {self.command}"
        return "".join(letter if letter.isprintable() else "?" for letter in text[: 2 * _LONGEST_COMMAND])


@contextmanager
def locked(path: Path, what: str, instead: str) -> Iterator[None]:
    """Hold the lock file `path`, whose folder is made if needed. Reentrant within a process.

    The file remains when the lock is released: if it were removed, two processes could hold two files of one name.

    Args:
        what: the name of the locked thing, for messages.
        instead: what to do if the lock cannot be had, for messages.

    Raises:
        BundleError: another process holds the lock, or it cannot be written, or is a link.
    """
    description = path.with_name(f"{path.name}.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():  # opened for writing, it would be another file
            raise BundleError(f"{path}: is a link, and a lock is a file of its own. Remove the link.")
        lock = FileLock(path.parent.resolve() / path.name, is_singleton=True)
        lock.acquire(blocking=False)
    except Timeout:
        holder = _read(description)
        raise BundleError(
            f"{what}: another process is at work there ({holder.summary() if holder else 'it is not known which'}). "
            f"Wait until it ends, or {instead}."
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BundleError(f"{what}: cannot be written ({why}). {instead[0].upper()}{instead[1:]}.") from None
    # A file of that name that describes nobody is the user's.
    described = lock.lock_counter == 1 and (not description.exists() or _read(description) is not None)
    try:
        if described:
            with suppress(OSError, BundleError):  # for messages only
                write_text(description, Holder.here().model_dump_json() + "\n")
        yield
    finally:
        if described:
            with suppress(OSError):
                description.unlink()
        lock.release()


def _read(path: Path) -> Holder | None:
    try:
        return Holder.model_validate_json(read_small(path, _MOST_BYTES))
    except (OSError, ValidationError):
        return None
