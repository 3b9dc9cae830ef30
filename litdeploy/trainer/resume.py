"""Resuming: what a run remembers to continue bit for bit, and the checkpoints that hold it.

A checkpoint is one safetensors file of tensors and JSON, whose name holds its SHA-256:

    checkpoints/epoch-00003-step-0000120-SHA256.safetensors

    student/NAME                weights and buffers
    best/NAME                   the same of the best student so far
    optimiser/I/NAME            buffer I of a trained parameter
    random/order, …             states of the random generators
    cache/cuts, cache/filled    which features are cached, and of which views
    rank1/…                     what another rank has otherwise: statistics of its own part of the batches, its sections

Checkpoints are data: nothing in them is run. A torn or altered one no longer matches its name; the one before is used.
The last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from litdeploy.config.spec import NetworkSpec
from litdeploy.errors import BundleError, NetworkError, SettingsError
from litdeploy.files import remove, remove_matching, remove_partial, sha256_of, write_whole
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Score
from litdeploy.trainer.identity import completed, differences, recipe_identity
from litdeploy.trainer.progress import Row

_VERSION = 2
_METADATA_KEY = "litdeploy-run"
_NAME = re.compile(r"epoch-(\d{5,})-step-(\d{7,})-([0-9a-f]{64})\.safetensors")
_KEPT = 2
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
DEFAULT_EVERY = "10min"


class Position(BaseModel):
    """How far a run is, and what it counted so far.

    Attributes:
        phase: index of the present phase, or of the last.
        epoch: whole epochs of the phase.
        step: steps done in the present epoch.
        sums: sum of each loss over these steps.
        seconds: duration of these steps.
        first_loss: mean over the phase's first steps; a diverging loss is compared with it.
        epochs_done, training_seconds: of all phases together, whole epochs.
        steps_done, images_done: of all phases together.
        validation: the student's score after the last whole epoch; after all of them that of the delivered student.
        cut: its score before its first step; None: not measured.
        best, best_epoch: score of the best student so far, and the whole epochs after which it was that; None: none is
            kept.
        rows: the metrics so far.
        started: when the run began (ISO 8601).
        elapsed: seconds of wall-clock time in earlier processes.
    """

    model_config = ConfigDict(extra="forbid")

    phase: int = Field(0, ge=0)
    epoch: int = Field(0, ge=0)
    step: int = Field(0, ge=0)
    sums: dict[str, float] = {}
    seconds: float = 0.0
    first_loss: float | None = None
    epochs_done: int = Field(0, ge=0)
    steps_done: int = Field(0, ge=0)
    images_done: int = Field(0, ge=0)
    training_seconds: float = 0.0
    validation: Score | None = None
    cut: Score | None = None
    best: Score | None = None
    best_epoch: int | None = None
    rows: list[Row] = []
    started: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    elapsed: float = 0.0

    def enter(self, phase: int) -> None:
        """Begin a phase."""
        self.phase, self.epoch, self.first_loss = phase, 0, None

    def count_step(self, images: int) -> None:
        """Count one step."""
        self.step += 1
        self.steps_done += 1
        self.images_done += images

    def end_epoch(self, row: Row) -> None:
        """End the epoch, with its metrics."""
        self.epoch += 1
        self.epochs_done += 1
        self.training_seconds += self.seconds
        self.rows.append(row)
        self.step, self.sums, self.seconds = 0, {}, 0.0


@dataclass(frozen=True)
class Every:
    """How often to write a checkpoint: whichever comes first; None: not by this measure."""

    seconds: float | None = None
    steps: int | None = None
    epochs: int | None = None

    @classmethod
    def parse(cls, text: str) -> Every:
        """Parse `10min`, `1epoch`, `30s,500steps`, `off`.

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
class Snapshot:
    """The state of a run between two steps.

    Attributes:
        tensors: by name, on the CPU.
        facts: plain JSON.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def position(self) -> Position:
        """How far the run was.

        Raises:
            BundleError: the snapshot does not say.
        """
        try:
            return Position.model_validate(self.facts.get("position"))
        except ValidationError:
            raise foreign("position") from None

    def spec(self) -> NetworkSpec:
        """The student's spec.

        Raises:
            BundleError: the snapshot has none.
        """
        try:
            return NetworkSpec.model_validate_json(json.dumps(self.facts.get("spec")))
        except ValidationError:
            raise foreign("spec") from None

    def of_rank(self, rank: int) -> dict[str, Tensor]:
        """The tensors of one rank."""
        own = f"rank{rank}/"
        tensors = {key: value for key, value in self.tensors.items() if not key.startswith("rank")}
        return tensors | {key.removeprefix(own): value for key, value in self.tensors.items() if key.startswith(own)}

    def views(self) -> int:
        """Number of cached views of each image; 0: no feature cache."""
        return int((self.facts.get("cache") or {}).get("views", 0))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: only for them.
        identity: what a run must share with the one that wrote them to resume from them. Plain JSON.
        every: how often one is due.
        note: called with a warning about each damaged file.
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
        """Whether the next one is due.

        Args:
            epochs: whole epochs of the run.
            steps: steps of the run.
        """
        every = self._every
        return (
            (every.seconds is not None and time.monotonic() - self._written_at >= every.seconds)
            or (every.epochs is not None and epochs - self._at[0] >= every.epochs)
            or (every.steps is not None and steps - self._at[1] >= every.steps)
        )

    def begin(self, epochs: int, steps: int) -> None:
        """Start counting towards the next one."""
        self._at, self._written_at = (epochs, steps), time.monotonic()

    def write(self, epochs: int, step: int, saved: Snapshot) -> None:
        """Write one, and remove all but it and the one before.

        Args:
            epochs: whole epochs of the run.
            step: of the present epoch.

        Raises:
            BundleError: it cannot be written; earlier ones stay.
        """
        facts = {"version": _VERSION, "identity": self._identity, **saved.facts}
        content = save(saved.tensors, {_METADATA_KEY: json.dumps(facts)})
        name = f"epoch-{epochs:05}-step-{step:07}-{hashlib.sha256(content).hexdigest()}.safetensors"
        with write_whole(self._folder / name) as temporary:
            temporary.write_bytes(content)
        before, self._latest = self._latest, self._folder / name
        # All others are older, or damaged.
        kept = {path.name for path in (before, self._latest) if path is not None}
        for path in self._folder.iterdir():
            if path.name not in kept and _NAME.fullmatch(path.name):
                remove(path)

    def newest(self) -> Snapshot | None:
        """The newest intact one; None if none was ever written.

        Raises:
            BundleError: all are damaged, or the newest is of another run; the message lists what differs.
        """
        found = sorted(
            (int(match[1]), int(match[2]), path)
            for path in (self._folder.iterdir() if self._folder.is_dir() else ())
            if (match := _NAME.fullmatch(path.name))
        )
        for _, _, path in reversed(found):
            saved = _read(path)
            if saved is None:
                self._note(f"warning: {path}: torn or altered (its content does not match its name); not used")
                continue
            differing = differences(completed(saved.facts.get("identity")), completed(self._identity))
            if saved.facts.get("version") != _VERSION:
                differing = [f"version of the checkpoint's format: {saved.facts.get('version')}, and here {_VERSION}"]
            if differing:
                raise BundleError(
                    f"{path.parent}: the checkpoints are of another run, and cannot be resumed:\n  "
                    + "\n  ".join(differing)
                    + "\nRepeat that run's arguments, choose another folder with --out, or --overwrite it."
                )
            self._latest = path
            return saved
        if found:
            raise BundleError(
                f"{self._folder}: none of the checkpoints is intact. Start over: the same command with --overwrite."
            )
        return None

    def exist(self) -> bool:
        """Whether there are any, intact or not."""
        return self._folder.is_dir()

    def advice(self) -> str:
        """What to type after a run ended early."""
        if self._latest is None:
            return "No checkpoint was written yet. Start over: the same command with --resume."
        epochs, step, _ = _NAME.fullmatch(self._latest.name).groups()  # type: ignore[union-attr]
        return (
            f"The last checkpoint is there ({int(epochs)} epochs, {int(step)} steps). Resume from it: the same command "
            "with --resume."
        )

    def clear(self) -> None:
        """Remove all of them, and nothing else in the folder."""
        remove_matching(self._folder, ["epoch-*-step-*.safetensors"])
        self._latest = None

    def tidy(self) -> None:
        """Remove partial files of a killed process."""
        remove_partial(self._folder)


def _read(path: Path) -> Snapshot | None:
    """Read a checkpoint; None if it is not intact."""
    match = _NAME.fullmatch(path.name)
    try:
        if match is None or sha256_of(path) != match[3]:
            return None
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            facts = json.loads((file.metadata() or {})[_METADATA_KEY])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return Snapshot(tensors, facts) if isinstance(facts, dict) else None


# Tensors of a run.


def cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU. safetensors refuses two tensors of one memory, such as tied weights."""
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's buffers, by the names of their parameters."""
    found: dict[str, Tensor] = {}
    for name, parameter in _trained(student, optimizer).items():
        state = optimizer.state.get(parameter, {})
        found |= {f"optimiser/{key}/{name}": value for key, value in state.items() if isinstance(value, Tensor)}
    return found


def restore_optimizer(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Restore optimizer and schedule of a phase. The facts are `optimizer_facts`'."""
    trained = _trained(student, optimizer)
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        buffer, _, name = rest.partition("/")
        parameter = trained.get(name)
        if kind != "optimiser" or parameter is None:  # such as one of another rank's sections
            continue
        # In the parameter's own memory format: other strides take other instructions, which round differently.
        like = torch.empty_like(parameter, dtype=value.dtype) if value.shape == parameter.shape else None
        optimizer.state[parameter][buffer] = (
            value.to(parameter.device, copy=True) if like is None else like.copy_(value)
        )
    # The rest of a schedule follows from the recipe.
    steps = int(facts["schedule"])
    schedule.load_state_dict({"last_epoch": steps, "_step_count": steps + 1})
    for group, rate in zip(optimizer.param_groups, facts["learning_rates"], strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = float(rate)


def random_tensors(order: Tensor, draws: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators; `order`: that of the images' order."""
    found = {"random/order": order, "random/draws": draws.get_state(), "random/torch": torch.get_rng_state()}
    if device.type == "cuda":
        found["random/cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore_random(
    order: torch.Generator, draws: torch.Generator, device: torch.device, tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `random_tensors` returned."""
    order.set_state(tensors["random/order"])
    draws.set_state(tensors["random/draws"])
    torch.set_rng_state(tensors["random/torch"])
    if device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"], device)


def _trained(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters that this rank trains, by names that all ranks share."""
    names = {id(parameter): f"student/{name}" for name, parameter in student.named_parameters()}
    return {names[id(each)]: each for group in optimizer.param_groups for each in group["params"]}


@torch.no_grad()
def restore_student(student: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights and buffers into the student.

    Raises:
        KeyError, ValueError: the tensors are of another network.
    """
    for name, tensor in student.state_dict().items():
        saved = tensors[f"student/{name}"]
        if tensor.shape != saved.shape:
            raise ValueError(f"student/{name}: shape {tuple(saved.shape)}")
        tensor.copy_(saved)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the student's tensors that hold NaN or infinity."""
    return [
        name
        for name, tensor in tensors.items()
        if name.startswith("student/") and tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]


def differing_from(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of another rank that differ from one's own, under `rankN/`."""
    return {f"rank{rank}/{key}": value for key, value in theirs.items() if not same_bits(value, own.get(key))}


def same_bits(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors on the CPU agree in type, shape and every bit; NaN equals itself."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(a, b)


@contextmanager
def of_this_student() -> Iterator[None]:
    """Report a snapshot that does not fit the run.

    Raises:
        BundleError: in place of the errors of a restore.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, NetworkError) as error:
        raise foreign(str(error)) from None


def foreign(what: str) -> BundleError:
    """The error of a checkpoint that is not of this student."""
    return BundleError(
        f"the checkpoint is not one of this student ({what}). Start over: the same command with --overwrite"
    )


# Whether the run to resume is this one.


def find_snapshot(
    bundle: Bundle, checkpoints: Checkpoints, identity: dict[str, Any], note: Callable[[str], None]
) -> tuple[bool, Snapshot | None]:
    """Prepare a bundle for resuming its run.

    Returns:
        Whether that run is complete; and the snapshot to resume, None to start over.

    Raises:
        BundleError: it holds another run, or one that cannot be resumed.
    """
    if not bundle.exists():
        return False, None
    bundle.tidy()
    checkpoints.tidy()
    if bundle.manifest_path.is_file():
        manifest = bundle.read()
        if manifest.status == "complete":
            theirs: dict[str, Any] = {
                "recipe": recipe_identity(manifest.recipe),
                "data": manifest.data.fingerprint,
                "network": manifest.teacher.spec.model_dump(mode="json"),
                "discriminator": manifest.discriminator_sha256,
            }
            if manifest.data.tokenizer is not None or "tokenizer" in identity:
                theirs["tokenizer"] = manifest.data.tokenizer
            if manifest.functions or "functions" in identity:
                theirs["functions"] = manifest.functions
            if "lineage" in identity:
                theirs["lineage"] = [each.sha256 for each in manifest.lineage]
            differing = differences(theirs, {key: identity.get(key) for key in theirs})
            if differing:
                raise BundleError(
                    f"{bundle.path}: holds another run, complete; it is kept:\n  "
                    + "\n  ".join(differing)
                    + "\nChoose another folder with --out, or --overwrite it."
                )
            note(f"{bundle.path}: the student is trained already")
            checkpoints.clear()
            return True, None
    saved = checkpoints.newest()
    if saved is None:
        if bundle.manifest_path.is_file() and bundle.read().run.epochs:
            raise BundleError(
                f"{bundle.path}: its training was interrupted, and there are no checkpoints to resume from. Start "
                "over: the same command with --overwrite."
            )
        note(f"{bundle.path}: no checkpoint was written yet; the run starts over")
        bundle.claim(overwrite=True, keep=bundle.chain_path.name)
        return False, None
    position = saved.facts.get("position", {})
    note(f"{bundle.path}: resuming after {position.get('epochs_done')} epochs and {position.get('step')} steps")
    return False, saved


def check_chain(bundle: Bundle, depths: tuple[int, ...]) -> None:
    """Check that a chain to be resumed began with these students, before the first is trained.

    Raises:
        BundleError: the folder holds another run.
    """
    before = [bundle.in_chain(depth) for depth in depths[:-1]]
    there = {path.name for path in bundle.chain_path.iterdir()} if bundle.chain_path.is_dir() else set()
    at_the_last = bundle.manifest_path.exists() or bundle.checkpoints_path.exists()
    lacking = [student.path.name for student in before if not student.manifest_path.exists()]
    if (lacking and at_the_last) or there - {student.path.name for student in before}:
        by_way = f"a chain by way of depth {', '.join(sorted(there))}" if there else "one that is no such chain"
        raise BundleError(
            f"{bundle.path}: holds another run, {by_way}; it is kept. Repeat that run's arguments, choose another "
            "folder with --out, or --overwrite it."
        )
