"""One process at a time: a lock that the system takes back when its holder ends, however it ends.

What the holder says of itself lies beside the lock. It is told to whoever is refused, and decides nothing.
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

# What is read of a holder's file at the most, and told of its command.
_MOST_BYTES = 4096
_MOST_TOLD = 200


class Holder(BaseModel):
    """Who holds a lock: process, machine, since when (ISO 8601, UTC), command line."""

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
            command=shlex.join(sys.argv)[:_MOST_TOLD],
        )

    def told(self) -> str:
        """As a message says it; what a terminal would take for an order is left out."""
        text = f"process {self.pid} on {self.host}, since {self.since}: {self.command}"
        return "".join(letter if letter.isprintable() else "?" for letter in text[: 2 * _MOST_TOLD])


@contextmanager
def locked(path: Path, what: str, instead: str) -> Iterator[None]:
    """Holds the lock file `path`, whose folder is made; once more inside it costs nothing.

    The file stays when the lock is released: removing it would let two processes hold two files of one name.

    Args:
        what: a message calls what is locked.
        instead: what the message proposes to whoever is refused.

    Raises:
        BundleError: another process holds it, or it cannot be written.
    """
    beside = path.with_name(f"{path.name}.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.resolve(), is_singleton=True)
        lock.acquire(blocking=False)
    except Timeout:
        holder = _read(beside)
        raise BundleError(
            f"{what}: another process is at work there ({holder.told() if holder else 'it does not say which'}). "
            f"Wait until it ends, or {instead}."
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BundleError(f"{what}: cannot be written ({why}). {instead[0].upper()}{instead[1:]}.") from None
    try:
        if lock.lock_counter == 1:
            with suppress(OSError):  # told, not needed
                beside.write_text(Holder.here().model_dump_json() + "\n", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):
                beside.unlink()
        lock.release()


def _read(path: Path) -> Holder | None:
    try:
        with path.open("rb") as file:
            return Holder.model_validate_json(file.read(_MOST_BYTES))
    except (OSError, ValidationError):
        return None
