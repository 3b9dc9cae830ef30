"""What `test_parallel.py` has each of two processes do, under torchrun: python -m tests.trainer.two_ranks TEACHER OUT

Its functions are also what one process alone is compared by.
"""

from __future__ import annotations

import copy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litdeploy.config.recipe import Recipe
from litdeploy.errors import BundleError, InterruptedRun
from litdeploy.storage.bundle import Bundle
from litdeploy.trainer import Progress, compress, train
from litdeploy.trainer.batch_norm import average_statistics, synchronized
from litdeploy.trainer.distributed import Ranks, launched
from litdeploy.trainer.objectives import Lit
from litdeploy.trainer.step import Step
from litdeploy.trainer.teacher import Teacher
from tests import sections
from tests.trainer.test_golden import ALPHA, BETA, LR, TAU, WEIGHT, batches, networks

CPU = torch.device("cpu")
NAMES = ("one", "two", "three")
DIGITS: dict[str, Any] = {
    "data": {"source": "digits"},
    "device": "cpu",
    "student_depth": 8,
    "precision": "fp32",
    "augmentation": {"padding": 1, "flip": False},
}
SECTIONS: dict[str, Any] = {
    **DIGITS,
    "beta": 0.0,
    "parallel": "sections",
    "main": {"epochs": 2, "learning_rate": 0.05},
    "finetune": {"epochs": 0, "learning_rate": 0.01},
}
NEW: dict[str, Any] = {"recipe": "digits-resnet-teacher", "device": "cpu", "batch_norm": "synchronised"}
DATA: dict[str, Any] = {
    **DIGITS,
    "batch_norm": "synchronised",
    "main": {"epochs": 1, "learning_rate": 0.05},
    "finetune": {"epochs": 1, "learning_rate": 0.01},
}


# Stopped in the middle of an epoch: each rank has statistics, or sections, that the other has not.
STOPPED: dict[str, dict[str, Any]] = {
    "parts": {**DIGITS, "batch_size": 32, "main": DATA["main"], "finetune": SECTIONS["finetune"]},
    "divided": {**SECTIONS, "batch_size": 32, "main": DATA["main"]},
}


class Stopping(Progress):
    """Sends a signal to this process, the first rank, in the third step."""

    def __init__(self) -> None:
        self.calls = 0

    def on_train_batch_end(self, samples: int, losses: object) -> None:
        self.calls += 1
        if self.calls == 3:
            signal.raise_signal(signal.SIGTERM)


def stopped(teacher: str, out: Path, given: dict[str, Any]) -> None:
    """A run that one rank's signal stops on both, and that both go on with."""
    with pytest.raises(InterruptedRun, match="0 of 1 epochs and 20 steps"):
        compress(teacher, out=out, progress=Stopping(), **given)
    compress(teacher, out=out, resume=True, **given)


def ten_steps(ranks: Ranks) -> dict[str, Tensor]:
    """The golden test's ten steps, each rank on its part of each batch: `losses` of the whole batches, and student."""
    teacher, student = networks()
    keys = list(student.state_dict())
    objective = Lit(Recipe(alpha=ALPHA, beta=BETA, temperature=TAU, section_weight=WEIGHT), NAMES)
    frozen = Teacher(teacher, sections.of(teacher, NAMES), torch.zeros(1, 3, 16, 16), CPU)
    own = sections.of_student(student, teacher, dict.fromkeys(NAMES, (0, 1)))
    losses = []
    with synchronized(student, ranks), Step(student, objective, own, ranks=ranks) as step:
        assert list(student.state_dict()) == keys
        optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], LR, 0.9, weight_decay=1e-4)
        for images, labels in batches():
            part = ranks.part(images)
            losses.append(step(optimiser, part, ranks.part(labels), frozen(part))["loss"].item())
    means = [total / ranks.size for total in ranks.totals(losses)]
    return {"losses": torch.tensor(means), **student.state_dict()}


def exchanges(ranks: Ranks) -> None:
    """What each rank must find to be so."""
    mine = float(ranks.rank + 1)
    tensors = [torch.full((2, 3, 1, 2), mine).to(memory_format=torch.channels_last), torch.tensor(mine).double()]
    ranks.average(tensors)
    assert all((tensor == 1.5).all() for tensor in tensors)
    ranks.copy(counted := [torch.tensor([ranks.rank]), torch.full((3,), mine)], source=1)
    assert counted[0].item() == 1
    assert counted[1].tolist() == [2, 2, 2]
    assert ranks.on_first(lambda: ranks.rank) == 0
    assert ranks.on_first(copy.copy, {"a": 1}) == {"a": 1}
    norm = nn.Sequential(nn.BatchNorm1d(1, momentum=1.0))
    norm(torch.tensor([[mine], [3 * mine]]))
    average_statistics(norm, ranks)
    torch.testing.assert_close(norm[0].running_mean, torch.tensor([3.0]))  # of 2 and 4


def normalise(ranks: Ranks, shape: tuple[int, ...]) -> None:
    """A synchronised batch norm on parts gives what an ordinary one gives on the whole, forward and backward."""
    generator = torch.Generator().manual_seed(5)
    whole, upstream = (3 + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    ordinary = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], dtype=torch.float64)
    held = nn.Sequential(copy.deepcopy(ordinary))
    whole.requires_grad_()
    part = ranks.part(whole.detach()).clone().requires_grad_()
    expected = ordinary(whole)
    (expected * upstream).sum().backward()
    with synchronized(held, ranks):
        found = held(part)
        (found * ranks.part(upstream)).sum().backward()
    norm = held[0]
    assert type(norm) is type(ordinary)
    for parameter in norm.parameters():
        ranks.average([parameter.grad])
        parameter.grad *= ranks.size  # of the sum, not the mean
    pairs = [(found, ranks.part(expected)), (part.grad, ranks.part(whole.grad))]
    pairs += [(mine.grad, other.grad) for mine, other in zip(norm.parameters(), ordinary.parameters(), strict=True)]
    pairs += zip(norm.buffers(), ordinary.buffers(), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


class Telling(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def main(teacher: str, out: Path) -> None:
    launch = launched()
    ranks = launch.join(launch.device("cpu"))
    exchanges(ranks)
    normalise(ranks, (6, 3))
    normalise(ranks, (4, 3, 2, 5))
    torch.save(ten_steps(ranks), out / f"steps-{ranks.rank}.pt")
    told = Telling()
    compress(teacher, out=out / "sections", progress=told, **SECTIONS)
    assert bool(told.notes) is ranks.first
    assert ("feature cache: none; it is not kept by several ranks, and there are 2" in told.notes) is ranks.first
    bundle: Bundle = compress(teacher, out=out / "data", **DATA)
    assert bundle.read_complete().run.ranks == 2  # written before any rank goes on
    train("resnet8,width=4", out=out / "new.safetensors", epochs=1, **NEW)
    assert (out / "new.safetensors").is_file()
    for name, given in STOPPED.items():
        compress(teacher, out=out / f"whole-{name}", **given)
        stopped(teacher, out / f"stopped-{name}", given)
    try:
        compress(teacher, out=out / "data", **DATA)
    except BundleError:
        (out / f"refused-{ranks.rank}").touch()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
