"""The losses of a run: summed up, and looked at often enough that a run that went astray does not go on for long."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from litdeploy.errors import TrainingError
from litdeploy.trainer.run import Run, Share

# Steps between two looks. Meanwhile the losses stay on the device: reading them waits for all that is queued there.
INTERVAL = 20

# A loss that many times what the phase began with, and one, does not come back.
_DIVERGED = 1000.0


class Watch:
    """The losses of a phase's steps since the last look. Of several ranks, each looks at the same steps."""

    def __init__(self, run: Run, share: Share, optimiser: torch.optim.Optimizer) -> None:
        self._position = run.position
        self._ranks = run.ranks
        self._share = share
        self._optimiser = optimiser
        self._names: list[str] = []
        self._rows: list[Tensor] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        """Those of one step, on the device."""
        self._names = list(losses)
        self._rows.append(torch.stack(list(losses.values())))

    @property
    def full(self) -> bool:
        """Whether it is time to look."""
        return len(self._rows) >= INTERVAL

    def look(self, *flags: bool) -> list[bool]:
        """Adds the steps to the position's sums. Of several ranks, all look at once.

        Args:
            flags: of this rank.

        Returns:
            Each flag: whether any rank has it.

        Raises:
            TrainingError: a loss is not a finite number, or diverges.
        """
        owners = self._share.owners
        names = ["loss", *(f"section/{name}" for name in owners)] if owners else self._names
        mine = [dict(zip(self._names, row, strict=True)) for row in self._read()]
        numbers = [row.get(name, 0.0) for row in mine for name in names]
        totals = iter(self._ranks.totals([*numbers, *map(float, flags)]))
        # Means over the ranks' parts of the batches; of divided sections each owner's, and the sum.
        table = [{name: next(totals) / self._share.ranks.size for name in names} for _ in mine]
        self._check(table)
        sums = self._position.sums
        for row in table:
            for name, loss in row.items():
                sums[name] = sums.get(name, 0.0) + loss
        return [next(totals) > 0 for _ in flags]

    def _read(self) -> list[list[float]]:
        rows = torch.stack(self._rows).double().tolist() if self._rows else []
        self._rows.clear()
        return rows

    def _check(self, table: Sequence[Mapping[str, float]]) -> None:
        position = self._position
        for step, losses in enumerate(table, position.step - len(table) + 1):
            strange = [f"{name} ({loss})" for name, loss in losses.items() if not math.isfinite(loss)]
            if strange:
                raise self._astray(step, f"{', '.join(strange)} is not a finite number")
        if table:
            mean = sum(losses["loss"] for losses in table) / len(table)
            if position.first_loss is None:
                position.first_loss = mean
            if mean > _DIVERGED * max(position.first_loss, 1.0):
                parts = {name: loss for name, loss in table[-1].items() if name != "loss"}
                largest = f"; its largest part is {max(parts, key=lambda name: parts[name])}" if parts else ""
                raise self._astray(
                    position.step, f"the loss diverges: {mean:.3g}, and {position.first_loss:.3g} at first{largest}"
                )

    def _astray(self, step: int, what: str) -> TrainingError:
        phase = self._share.phase
        rate = float(self._optimiser.param_groups[0]["lr"])
        return TrainingError(
            f"epoch {self._position.epochs_done + 1}, step {step} ({phase.name}): {what}, at a learning rate of about "
            f"{rate:.3g}. Try a lower one, in a new run: --learning-rate {phase.settings.learning_rate / 3:.2g} "
            "--overwrite"
        )
