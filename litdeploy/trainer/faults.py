"""What stops a run before its end, and what it leaves then: a message, and what it can be gone on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from litdeploy.data import worker_died
from litdeploy.errors import DataError, InterruptedRun, LitdeployError
from litdeploy.trainer.live import Live
from litdeploy.trainer.memory import refuses_memory
from litdeploy.trainer.run import Run
from litdeploy.trainer.state import checkpoint


@contextmanager
def resumable(run: Run) -> Iterator[None]:
    """Whatever error a user meets in here tells how to go on."""
    if run.checkpoints is not None:
        run.checkpoints.begin(run.position.epochs_done, run.position.steps_done)
    try:
        yield
    except InterruptedRun:  # says so itself
        raise
    except LitdeployError as error:
        if run.checkpoints is not None and run.ranks.first:
            error.add_note(run.checkpoints.told())
        raise


def interrupted(run: Run, where: Path) -> InterruptedRun:
    """The error of a run that its user stopped."""
    position = run.position
    assert run.checkpoints is not None
    return InterruptedRun(
        f"{where}: interrupted after {position.epochs_done} of {run.epochs} epochs"
        + (f" and {position.step} steps" if position.step else "")
        + f". {run.checkpoints.told()}"
    )


def guarded(run: Run, live: Live, epoch: Callable[[Run, Live], None]) -> Literal["device", "host"] | None:
    """Trains an epoch. Where it is stopped and nothing is half done, a checkpoint is written.

    Returns:
        None; or where memory did not suffice.
    """
    try:
        epoch(run, live)
    except KeyboardInterrupt:
        if not run.interruption.twice and not live.passes.stepping:
            checkpoint(run, live)
        raise
    except DataError:
        if run.ranks.size == 1 and not live.passes.stepping:
            checkpoint(run, live)
            if run.interruption.asked:  # a terminal's Ctrl-C reaches the worker processes too
                raise KeyboardInterrupt from None
        raise
    except torch.OutOfMemoryError:
        return "device"
    except (MemoryError, RuntimeError) as error:
        # torch tells of a dead worker process from a signal's handler, which may be called in the midst of a step.
        if "DataLoader worker" in str(error):
            if run.interruption.asked:
                raise KeyboardInterrupt from None
            raise worker_died(error) from error
        if not refuses_memory(error):
            raise
        return "host"
    return None
