"""Several devices and machines: one process each, started by a launcher (`launch`), joined by torch.distributed.

A rank is one of these processes. Every rank runs the same program; they differ in what they train on:

- data-parallel: each takes its part of each batch, so that any number of ranks sees the batches that one sees;
  gradients are averaged between backward and update.
- by sections, in a phase whose sections do not depend on one another (β = 0): each trains its own sections on the whole
  batch. Nothing is exchanged but the trained sections, once an epoch.

Evaluating, writing and telling are the first rank's; the others wait for it. With one rank there is nothing of this:
torch.distributed is not initialised, and each method gives back what it was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from litdeploy.config.recipe import Recipe
from litdeploy.errors import LitdeployError, TrainingError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them. What a method exchanges, every rank must exchange in the same order.

    Attributes:
        rank: 0 is the first.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this one evaluates, writes and tells."""
        return self.rank == 0

    def part(self, whole_N: Tensor) -> Tensor:
        """This rank's part of what was drawn for a whole batch. Parts are equal: N is divisible by the size."""
        each = len(whole_N) // self.size
        return whole_N[self.rank * each : (self.rank + 1) * each]

    def sum(self, tensor: Tensor) -> None:
        """Makes a contiguous tensor the sum over all ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            with self._together():
                dist.all_reduce(tensor)

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Makes each tensor its mean over all ranks, in place; one exchange for all of a type."""
        if self.size > 1:
            for some in _by_type(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in some])
                self.sum(flat)
                _spread(flat.div_(self.size), some)

    @torch.no_grad()
    def copy(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Makes each tensor what it is on the rank `source`, in place; one exchange for all of a type."""
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
        """Calls it on the first rank, for which the others wait. Gives its result on all of them, or its error."""
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
        """An exchange.

        Raises:
            TrainingError: another rank is gone. Which one, nobody else can tell where there are more than two.
        """
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are
            others = [str(rank) for rank in range(self.size) if rank != self.rank]
            lost = f"rank {others[0]}" if len(others) == 1 else f"one of the ranks {', '.join(others)}"
            raise TrainingError(
                f"rank {self.rank}: the connection to {lost} was lost ({reason_of(error)}). That process "
                "ended or its machine is gone; its own output, or the launcher's last lines, say why."
            ) from error


ALONE = Ranks()


def check_recipe(recipe: Recipe, ranks: Ranks, sections: Sequence[str] = (), keeps_features: bool = False) -> None:
    """Whether so many ranks can train so.

    Args:
        sections: names of the student's.
        keeps_features: the user named a folder for the teacher's features.

    Raises:
        TrainingError: batch or sections cannot be shared out, features are to be kept, or a step is to be compiled that
            cannot be.
    """
    if ranks.size == 1:
        return
    each, left = divmod(recipe.batch_size, ranks.size)
    if left or each < 2:
        raise TrainingError(
            f"--batch-size {recipe.batch_size}: it is shared out among {ranks.size} ranks in equal parts of two images "
            f"or more. Give a multiple of {ranks.size}: --batch-size {ranks.size * max(2, each)}"
        )
    if recipe.parallel == "sections" and len(sections) < ranks.size:
        raise TrainingError(
            f"--parallel sections: the student has {len(sections)} ({', '.join(sections)}) for {ranks.size} ranks. "
            f"Start {len(sections)} at the most, or divide the batches: --parallel data"
        )
    if keeps_features or isinstance(recipe.feature_cache, int):
        raise TrainingError(
            f"--feature-cache and --feature-cache-dir: features are not kept by {ranks.size} ranks. Leave both out, or "
            "train in one process."
        )
    if recipe.compile == "on" and recipe.batch_norm == "synchronised":
        raise TrainingError(
            "--compile on: a step whose batch norms are synchronised is not compiled. Leave it out, or give "
            "--batch-norm per-rank"
        )


def divide(costs: Mapping[str, int], ranks: Ranks) -> dict[str, int]:
    """Shares sections out among ranks: the costliest first, each to the rank with the least to do.

    Args:
        costs: of each section, in any unit.

    Returns:
        Section → its rank, in the order of `costs`. Each rank gets one at least, if there are as many.
    """
    load = [(0, 0, rank) for rank in range(ranks.size)]  # cost, sections, rank
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        cost, sections, rank = min(load)
        owners[name] = rank
        load[rank] = (cost + costs[name], sections + 1, rank)
    return {name: owners[name] for name in costs}


def reason_of(error: Exception) -> str:
    """What torch.distributed says: its first sentence, without the place in its source."""
    return re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0].rstrip(".")


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Writes to each tensor its piece of the flat one."""
    for tensor, piece in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view(tensor.shape))
