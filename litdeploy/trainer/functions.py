"""The user's own loss and metric, in the place of the task's: checked on one batch before anything is written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litdeploy.batch import Batch, cast, device_of, forward, mapped, moved, tensors_of
from litdeploy.config.spec import NetworkSpec
from litdeploy.data import ObjectStore
from litdeploy.data.structure import Structure
from litdeploy.errors import SettingsError, first_line
from litdeploy.networks import Network
from litdeploy.networks.output import answer_of
from litdeploy.storage.records import Measures

# (student's output, teacher's output, batch) → scalar tensor.
OwnLoss = Callable[[Any, Any, Any], Tensor]
# (output, batch) → number; the larger is the better.
OwnMetric = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Functions:
    """The user's functions, and how to make the batches that they take.

    Attributes:
        functions: `loss` and `metric`, those that are given.
        structure: of a batch as the user's data have it; of named data (inputs, labels).
    """

    functions: dict[str, Callable[..., Any]]
    structure: Structure

    @property
    def measures(self) -> bool:
        """Whether there is a metric."""
        return "metric" in self.functions

    @property
    def names(self) -> dict[str, str]:
        """Role → name, for the manifest: a function itself cannot be stored."""
        return {role: name_of(function) for role, function in self.functions.items()}

    def loss(self, student: Batch, teacher: Batch, labels: Tensor, inputs: Batch) -> Tensor:
        """The user's loss of a student's answer, in the place of L_KD."""
        found: Tensor = self.functions["loss"](student, teacher, self.structure.rebuilt(inputs, labels))
        return found.float()

    def evaluate(
        self, run: Callable[[Batch], Batch], batches: Iterable[tuple[Batch, Tensor]], spec: NetworkSpec
    ) -> Measures:
        """Mean of the user's metric over the samples of all batches."""
        total, samples = 0.0, 0
        for inputs, labels in batches:
            value = self.functions["metric"](run(inputs), self.structure.rebuilt(inputs, labels))
            total += float(value) * len(labels)
            samples += len(labels)
        name = name_of(self.functions["metric"]).rpartition(".")[2]
        name = "metric" if "<" in name else name
        return Measures(task=spec.task_name, values={name: total / samples}, images=samples)


def own_functions(
    loss: OwnLoss | None, metric: OwnMetric | None, teacher: Network, store: ObjectStore | None
) -> Functions | None:
    """The user's functions, tried on one batch; None if there are none.

    Args:
        store: the user's own data; None: the data are named.

    Raises:
        SettingsError: one is no function, fails, or returns something else than its role needs.
    """
    given = {"loss": loss, "metric": metric}
    functions = {role: function for role, function in given.items() if function is not None}
    if not functions:
        return None
    for role, function in functions.items():
        if not callable(function):
            raise SettingsError(f"{role}: is a {type(function).__name__}. Give a function: {_SIGNATURES[role]}.")
    if store is None:
        names = [each.name for each in teacher.spec.input.tensors]
        places = {name: (0, name) if len(names) > 1 else (0,) for name in names}
        inputs, labels = teacher.example(), torch.zeros(2, dtype=torch.int64)
        found = Functions(functions, Structure(dict(places), (1,)))
    else:
        inputs, labels = store.first_batch()
        found = Functions(functions, store.structure)
    _try(found, teacher, inputs, labels)
    return found


_SIGNATURES = {
    "loss": "loss(student_output, teacher_output, batch), which returns a scalar tensor with a gradient",
    "metric": "metric(output, batch), which returns a number, larger for a better network",
}


def _try(functions: Functions, teacher: Network, inputs: Batch, labels: Tensor) -> None:
    training = teacher.module.training
    with torch.no_grad():
        output = forward(teacher.module.eval(), moved(inputs, next(teacher.module.parameters()).device))
    teacher.module.train(training)
    answer = cast(answer_of(output, teacher.spec.task_name), torch.float32)
    batch = functions.structure.rebuilt(moved(inputs, device_of(answer)), labels.to(device_of(answer)))
    if "loss" in functions.functions:
        # Near to the teacher's output: a loss may have no gradient where both are equal.
        noise = torch.Generator().manual_seed(0)
        student = mapped(lambda tensor: _moved_a_little(tensor, noise), answer)
        value = _called(functions, "loss", student, answer, batch)
        if not isinstance(value, Tensor) or value.dim():
            raise _unfit(functions, "loss", _described(value))
        leaves = [tensor for tensor in tensors_of(student) if tensor.requires_grad]
        found = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else ()
        if not any(gradient is not None for gradient in found):
            raise _unfit(functions, "loss", "a tensor without a gradient to the student's output (is it detached?)")
        if not value.isfinite():
            raise _unfit(functions, "loss", f"{value.item()}")
    if "metric" in functions.functions:
        value = _called(functions, "metric", answer, batch)
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(number, int | float):
            raise _unfit(functions, "metric", _described(value))
        if not torch.isfinite(torch.tensor(float(number))):
            raise _unfit(functions, "metric", f"{number}")


def _moved_a_little(tensor: Tensor, noise: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    step = torch.randn(tensor.shape, generator=noise).to(tensor.device)
    return (tensor + 0.01 * step).requires_grad_()


def _called(functions: Functions, role: str, *args: Any) -> Any:
    try:
        return functions.functions[role](*args)
    except Exception as error:  # the user's code may raise any
        raise SettingsError(
            f"{role}={functions.names[role]}: raised {type(error).__name__} on the first batch ({first_line(error)}). "
            f"It is called as {_SIGNATURES[role]}."
        ) from error


def _unfit(functions: Functions, role: str, what: str) -> SettingsError:
    return SettingsError(
        f"{role}={functions.names[role]}: returned {what} for the first batch. Give {_SIGNATURES[role]}."
    )


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def name_of(function: Any) -> str:
    """A function's name for people: `package.module.function`."""
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
