"""Checkpoints of a run under way: tensors and JSON in one safetensors file, whose name holds its SHA-256.

    checkpoints/epoch-00003-step-0000120-SHA256.safetensors

They are data: nothing in them is run. One that was torn or altered is no longer what its name says; the one before is
used. The last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from litdeploy.errors import BundleError, SettingsError
from litdeploy.files import remove, remove_matching, remove_partial, sha256_of, write_whole

_VERSION = 2
_METADATA_KEY = "litdeploy-run"
_NAME = re.compile(r"epoch-(\d{5,})-step-(\d{7,})-([0-9a-f]{64})\.safetensors")
_KEPT = 2
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
DEFAULT_EVERY = "10min"


@dataclass(frozen=True)
class Every:
    """How often a checkpoint is written: whatever of these comes first; None of a kind: it does not count."""

    seconds: float | None = None
    steps: int | None = None
    epochs: int | None = None

    @classmethod
    def parse(cls, text: str) -> Every:
        """Reads `10min`, `1epoch`, `30s,500steps`, `off`.

        Raises:
            SettingsError: anything else.
        """
        found: dict[str, float | int] = {}
        for part in [] if text == "off" else text.split(","):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|steps?|epochs?)", part.strip())
            number = float(match[1]) if match else 0.0
            kind = "" if match is None else "seconds" if match[2] in _SECONDS else f"{match[2].rstrip('s')}s"
            if match is None or kind in found or number <= 0 or (kind != "seconds" and number % 1):
                raise SettingsError(
                    f"--checkpoint-every {text}: write a time (30s, 10min, 2h), steps (500steps) or epochs (1epoch), "
                    "several with commas between, or off."
                )
            found[kind] = number * _SECONDS[match[2]] if kind == "seconds" else int(number)
        return cls(
            found.get("seconds"), *(None if (n := found.get(k)) is None else int(n) for k in ("steps", "epochs"))
        )


@dataclass(frozen=True)
class Saved:
    """What a run can be gone on from.

    Attributes:
        tensors: by name, on the CPU.
        facts: plain JSON.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: theirs alone.
        identity: what a run must have in common with the one that wrote them, to go on from them. Plain JSON.
        every: how often one is due.
        note: told what is found damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], every: Every, note: Callable[[str], None]) -> None:
        self._folder = folder
        self._identity = json.loads(json.dumps(identity))
        self._every = every
        self._note = note
        self._latest: Path | None = None
        self._written_at = time.monotonic()
        self._at = (0, 0)

    def due(self, epochs: int, steps: int) -> bool:
        """Whether it is time for the next one.

        Args:
            epochs: whole ones of the run.
            steps: of the run.
        """
        every = self._every
        return (
            (every.seconds is not None and time.monotonic() - self._written_at >= every.seconds)
            or (every.epochs is not None and epochs - self._at[0] >= every.epochs)
            or (every.steps is not None and steps - self._at[1] >= every.steps)
        )

    def begin(self, epochs: int, steps: int) -> None:
        """From here on it is counted how long ago the last one was."""
        self._at, self._written_at = (epochs, steps), time.monotonic()

    def write(self, epochs: int, step: int, saved: Saved) -> None:
        """Writes one, and removes all but it and the one before.

        Args:
            epochs: whole ones of the run.
            step: of the epoch under way.

        Raises:
            BundleError: it cannot be written; those that are there stay.
        """
        facts = {"version": _VERSION, "identity": self._identity, **saved.facts}
        content = save(saved.tensors, {_METADATA_KEY: json.dumps(facts)})
        name = f"epoch-{epochs:05}-step-{step:07}-{hashlib.sha256(content).hexdigest()}.safetensors"
        with write_whole(self._folder / name) as temporary:
            temporary.write_bytes(content)
        before, self._latest = self._latest, self._folder / name
        # Whatever else is there is older, or was found damaged.
        kept = {path.name for path in (before, self._latest) if path is not None}
        for path in self._folder.iterdir():
            if path.name not in kept and _NAME.fullmatch(path.name):
                remove(path)

    def newest(self) -> Saved | None:
        """The newest that is whole; None where none was ever written.

        Raises:
            BundleError: all are damaged, or the newest is of another run: what differs is told.
        """
        found = sorted(
            (int(match[1]), int(match[2]), path)
            for path in (self._folder.iterdir() if self._folder.is_dir() else ())
            if (match := _NAME.fullmatch(path.name))
        )
        for _, _, path in reversed(found):
            saved = _read(path)
            if saved is None:
                self._note(f"warning: {path}: torn or altered (its content is not what its name says); not used")
                continue
            differing = differences(saved.facts.get("identity"), self._identity)
            if saved.facts.get("version") != _VERSION:
                differing = [f"version of the checkpoint's form: {saved.facts.get('version')}, and here {_VERSION}"]
            if differing:
                raise BundleError(
                    f"{path.parent}: the checkpoints are of another run, and cannot be gone on from:\n  "
                    + "\n  ".join(differing)
                    + "\nGive what that run was given, choose another folder with --out, or --overwrite it."
                )
            self._latest = path
            return saved
        if found:
            raise BundleError(
                f"{self._folder}: none of the checkpoints is whole. Begin anew: the same command with --overwrite."
            )
        return None

    def exist(self) -> bool:
        """Whether there are any, whole or not."""
        return self._folder.is_dir()

    def told(self) -> str:
        """What to do when a run ends before its time."""
        if self._latest is None:
            return "No checkpoint was written yet. Begin anew: the same command with --resume."
        epochs, step, _ = _NAME.fullmatch(self._latest.name).groups()  # type: ignore[union-attr]
        return (
            f"The last checkpoint is there ({int(epochs)} epochs, {int(step)} steps). Go on from it: the same command "
            "with --resume."
        )

    def clear(self) -> None:
        """Remove all of them, and nothing else that is in the folder."""
        remove_matching(self._folder, ["epoch-*-step-*.safetensors"])
        self._latest = None

    def tidy(self) -> None:
        """Removes what a process that was killed had begun to write."""
        remove_partial(self._folder)


def differences(theirs: Any, ours: Any, at: str = "") -> list[str]:
    """In which keys two pieces of JSON differ, a line each."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted({*theirs, *ours})
        return [line for key in keys for line in differences(theirs.get(key), ours.get(key), f"{at}.{key}".lstrip("."))]
    return [] if theirs == ours else [f"{at}: {_short(theirs)} there, {_short(ours)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _read(path: Path) -> Saved | None:
    """A checkpoint; None where it is not whole."""
    match = _NAME.fullmatch(path.name)
    try:
        if match is None or sha256_of(path) != match[3]:
            return None
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            facts = json.loads((file.metadata() or {})[_METADATA_KEY])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return Saved(tensors, facts) if isinstance(facts, dict) else None


def same_bits(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors on the CPU are the same in type, shape and every bit; NaN is itself."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(a, b)
