"""Training on several devices and machines: one process each, started by a launcher and joined by torch.distributed.

A rank is one of these processes. Every rank runs the same program; they differ in what they train on:

- data-parallel: each rank takes its part of each batch, so that any number of ranks sees the batches that one would.
  Gradients are averaged between backward and update.
- by sections, in a phase whose sections do not depend on one another (β = 0): each rank trains its own sections on the
  whole batch. Only the trained sections are exchanged, once an epoch.

Evaluation, files and messages are the first rank's; the others wait for it. With one rank, torch.distributed is not
initialized and each method returns its argument.
"""

from __future__ import annotations

import atexit
import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from litdeploy.config.recipe import Recipe
from litdeploy.errors import DeviceError, LitdeployError, TrainingError
from litdeploy.runtime import resolve_device

# For one exchange, during which the first rank may evaluate. A dead rank is noticed sooner: its connections close.
_TIMEOUT = timedelta(minutes=30)

# (rank, number of ranks, rank on its own machine): torchrun's names, which other launchers share, and srun's.
_VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them. All ranks must call the exchanging methods in the same order.

    Attributes:
        rank: from 0, the first.
        size: number of ranks.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank evaluates, writes files and shows messages."""
        return self.rank == 0

    def part(self, whole_N: Tensor) -> Tensor:
        """This rank's part of a tensor for the whole batch. Parts are equal: N is divisible by the size."""
        each = len(whole_N) // self.size
        return whole_N[self.rank * each : (self.rank + 1) * each]

    def sum(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor with its sum over all ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            with self._together():
                dist.all_reduce(tensor)

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor with its mean over all ranks, in place; one exchange for each dtype."""
        if self.size > 1:
            for some in _by_type(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in some])
                self.sum(flat)
                _spread(flat.div_(self.size), some)

    @torch.no_grad()
    def copy(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Replace each tensor with that of the rank `source`, in place; one exchange for each dtype."""
        if self.size > 1:
            import torch.distributed as dist

            for some in _by_type(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in some])
                with self._together():
                    dist.broadcast(flat, source)
                _spread(flat, some)

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Each number's sum over all ranks."""
        found = torch.tensor(numbers, dtype=torch.float64)
        self.sum(found)
        return found.tolist()

    def gather(self, value: T) -> list[T]:
        """Each rank's value, on the first; nothing on the others."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self._together():
            dist.gather_object(value, found if self.first else None, 0)
        return found if self.first else []

    def on_first(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on the first rank while the others wait. All ranks get its result, or its error."""
        if self.size == 1:
            return function(*args, **kwargs)
        import torch.distributed as dist

        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = function(*args, **kwargs)
            except LitdeployError as error:
                answer[1] = error
        with self._together():
            dist.broadcast_object_list(answer, 0, device=torch.device("cpu"))
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Context of an exchange.

        Raises:
            TrainingError: another rank is gone. With more than two, it is unknown which one.
        """
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are
            others = [str(rank) for rank in range(self.size) if rank != self.rank]
            lost = f"rank {others[0]}" if len(others) == 1 else f"one of the ranks {', '.join(others)}"
            raise TrainingError(
                f"rank {self.rank}: the connection to {lost} was lost ({reason_of(error)}). That process "
                "ended or its machine is gone; see its own output, or the launcher's last lines."
            ) from error


ALONE = Ranks()


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank, size: see `Ranks`.
        local_rank: rank on its own machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def device(self, text: str) -> torch.device:
        """The device of this rank: as `runtime.resolve_device`, but with several CUDA devices each rank takes its own.

        Raises:
            DeviceError: the device does not exist.
        """
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.size == 1 or not count or text not in {"auto", "cuda"}:
            return resolve_device(text)
        if self.local_rank >= count:
            raise DeviceError(
                f"--device {text}: rank {self.rank} is number {self.local_rank + 1} on its machine, which has {count} "
                f"CUDA device{'s' * (count > 1)}. Start one process a device (torchrun --nproc-per-node {count}), or "
                "give --device cuda:0 if the launcher shows each process only its own device, or --device cpu."
            )
        return torch.device("cuda", self.local_rank)

    def join(self, device: torch.device) -> Ranks:
        """Connect to the other ranks, once a process: by gloo, and for CUDA tensors by NCCL.

        Raises:
            TrainingError: the ranks cannot connect.
        """
        if self.size == 1:
            return ALONE
        import torch.distributed as dist

        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
            if missing:
                raise TrainingError(
                    f"{' and '.join(missing)} not set: the address where {self.size} processes meet is missing. "
                    "torchrun sets it; "
                    'under srun: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
                    "MASTER_PORT=29500. For one process alone: export WORLD_SIZE=1"
                )
            # torch's optimizers import it. If it is imported after the ranks connect, it keeps their group alive
            # (observed with torch 2.13); the group's threads then outlive `destroy_process_group` and can abort the
            # process at exit.
            importlib.import_module("torch._dynamo")
            try:
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                    init_method="env://",
                    timeout=_TIMEOUT,
                    rank=self.rank,
                    world_size=self.size,
                )
            except (RuntimeError, ValueError) as error:
                raise TrainingError(
                    f"rank {self.rank} of {self.size} could not connect to the others at {os.environ['MASTER_ADDR']}:"
                    f"{os.environ['MASTER_PORT']} ({reason_of(error)}). Were all of them started, and can "
                    "their machines reach that address? Another port: export MASTER_PORT=29501"
                ) from error
            atexit.register(dist.destroy_process_group)
        return Ranks(self.rank, self.size)


def launched(variables: Mapping[str, str] = os.environ) -> Launch:
    """Read how this process was started from the launcher's variables: torchrun's, or else srun's.

    Raises:
        TrainingError: they are incomplete, or no numbers.
    """
    for names in _VARIABLES:
        size = names[1]
        if size not in variables:
            continue
        if variables[size] == "1":
            return Launch()
        try:
            rank, ranks, local_rank = (int(variables[name]) for name in names)
        except (KeyError, ValueError):
            found = ", ".join(f"{name}={variables.get(name, '')}" for name in names)
            raise TrainingError(
                f"a launcher says that this is one of several processes, but not which ({found}). Each needs these as "
                f"whole numbers; for one process alone: export {_VARIABLES[0][1]}=1"
            ) from None
        return Launch(rank, ranks, local_rank)
    return Launch()


def check_recipe(recipe: Recipe, ranks: Ranks, sections: Sequence[str] = (), keeps_features: bool = False) -> None:
    """Check that these ranks can train by a recipe.

    Args:
        sections: names of the student's sections.
        keeps_features: whether the user named a folder for the teacher's features.

    Raises:
        TrainingError: batch or sections cannot be divided, features are to be cached, or the step cannot be compiled
            as required.
    """
    if ranks.size == 1:
        return
    each, left = divmod(recipe.batch_size, ranks.size)
    if left or each < 2:
        raise TrainingError(
            f"--batch-size {recipe.batch_size}: it is divided among {ranks.size} ranks in equal parts of two images "
            f"or more. Give a multiple of {ranks.size}: --batch-size {ranks.size * max(2, each)}"
        )
    if recipe.parallel == "sections" and len(sections) < ranks.size:
        raise TrainingError(
            f"--parallel sections: the student has {len(sections)} ({', '.join(sections)}) for {ranks.size} ranks. "
            f"Start at most {len(sections)}, or divide the batches: --parallel data"
        )
    if keeps_features or isinstance(recipe.feature_cache, int):
        raise TrainingError(
            f"--feature-cache and --feature-cache-dir: features are not cached by {ranks.size} ranks. Leave both out, "
            "or train in one process."
        )
    if recipe.compile == "on" and recipe.batch_norm == "synchronised":
        raise TrainingError(
            "--compile on: a step with synchronized batch norms is not compiled. Leave it out, or give "
            "--batch-norm per-rank"
        )


def divide(costs: Mapping[str, int], ranks: Ranks) -> dict[str, int]:
    """Divide sections among ranks: the costliest first, each to the rank with the least cost so far.

    Args:
        costs: of each section, in any unit.

    Returns:
        Section → its rank, in the order of `costs`. Each rank gets at least one if there are enough.
    """
    load = [(0, 0, rank) for rank in range(ranks.size)]  # cost, sections, rank
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        cost, sections, rank = min(load)
        owners[name] = rank
        load[rank] = (cost + costs[name], sections + 1, rank)
    return {name: owners[name] for name in costs}


def reason_of(error: Exception) -> str:
    """First sentence of an error of torch.distributed, without its source location."""
    return re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0].rstrip(".")


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy each tensor's piece out of the flat one."""
    for tensor, piece in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view(tensor.shape))
