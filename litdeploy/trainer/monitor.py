"""The watch over a run's losses: their sums, and the end of a run that diverges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from litdeploy.config.recipe import Recipe
from litdeploy.errors import TrainingError
from litdeploy.trainer.distributed import ALONE, Ranks
from litdeploy.trainer.methods import TrainingPhase
from litdeploy.trainer.resume import Position

# Steps between two looks at the losses. Meanwhile they stay on the device: reading them waits for all queued work.
INTERVAL = 20

# A loss larger than what the phase began with (or 1) by this factor does not recover.
_DIVERGED = 1000.0


class LossMonitor:
    """Sum up the losses of a phase, and stop a run that diverges. All ranks look at the same steps.

    Args:
        position: receives the sums.
        ranks: of the run.
        parts: number of ranks that share a batch.
        owners: section → its rank, if sections are divided; else empty.
    """

    def __init__(
        self,
        position: Position,
        phase: TrainingPhase,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks = ALONE,
        parts: int = 1,
        owners: Mapping[str, int] | None = None,
    ) -> None:
        self._position = position
        self._phase = phase
        self._optimizer = optimizer
        self._ranks = ranks
        self._parts = parts
        self._owners = owners or {}
        self._names: list[str] = []
        self._rows: list[Tensor] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of one step, on the device."""
        self._names = list(losses)
        self._rows.append(torch.stack(list(losses.values())))

    @property
    def full(self) -> bool:
        """Whether it is time to look."""
        return len(self._rows) >= INTERVAL

    def look(self, *flags: bool) -> list[bool]:
        """Read the losses and add them to the position's sums. All ranks call it at once.

        Args:
            flags: of this rank.

        Returns:
            For each flag, whether it is set on any rank.

        Raises:
            TrainingError: a loss is not finite, or diverges.
        """
        names = ["loss", *(f"section/{name}" for name in self._owners)] if self._owners else self._names
        rows = torch.stack(self._rows).double().tolist() if self._rows else []
        self._rows.clear()
        mine = [dict(zip(self._names, row, strict=True)) for row in rows]
        numbers = [row.get(name, 0.0) for row in mine for name in names]
        totals = iter(self._ranks.totals([*numbers, *map(float, flags)]))
        # Means over the parts of a batch; for divided sections each owner's loss, and the sum.
        table = [{name: next(totals) / self._parts for name in names} for _ in mine]
        self._check(table)
        sums = self._position.sums
        for row in table:
            for name, loss in row.items():
                sums[name] = sums.get(name, 0.0) + loss
        return [next(totals) > 0 for _ in flags]

    def _check(self, table: Sequence[Mapping[str, float]]) -> None:
        position = self._position
        for step, losses in enumerate(table, position.step - len(table) + 1):
            strange = [f"{name} ({loss})" for name, loss in losses.items() if not math.isfinite(loss)]
            if strange:
                raise self._error(step, f"{', '.join(strange)} is not a finite number")
        if table:
            mean = sum(losses["loss"] for losses in table) / len(table)
            if position.first_loss is None:
                position.first_loss = mean
            if mean > _DIVERGED * max(position.first_loss, 1.0):
                parts = {name: loss for name, loss in table[-1].items() if name != "loss"}
                largest = f"; its largest part is {max(parts, key=lambda name: parts[name])}" if parts else ""
                raise self._error(
                    position.step, f"the loss diverges: {mean:.3g}, and {position.first_loss:.3g} at first{largest}"
                )

    def _error(self, step: int, what: str) -> TrainingError:
        rate = float(self._optimizer.param_groups[0]["lr"])
        return TrainingError(
            f"epoch {self._position.epochs_done + 1}, step {step} ({self._phase.name}): {what}, at a learning rate of "
            f"about {rate:.3g}. Try a lower one, in a new run: --learning-rate "
            f"{self._phase.settings.rate / 3:.2g} --overwrite"
        )


def no_longer_finite(position: Position, weights: Sequence[str], recipe: Recipe) -> TrainingError:
    """The error of weights that are NaN or infinite; none are named if they are another rank's."""
    return TrainingError(
        f"epoch {position.epochs_done + 1}, step {position.step}: weights are no longer finite numbers "
        f"({', '.join(weights[:3]) or 'of another rank'}). Try a lower learning rate: --learning-rate "
        f"{recipe.main.rate / 3:.2g} --overwrite"
    )
