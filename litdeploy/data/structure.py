"""The structure of the user's batches: which of their parts a network takes, and which is the label."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from litdeploy.batch import Batch
from litdeploy.config.spec import AnyInput
from litdeploy.errors import DataError

LABELS = ("labels", "label")

# Keys and positions that lead to a tensor of a batch.
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Structure:
    """Where a batch has what the network takes, and the label.

    Attributes:
        inputs: tensor of the network's input → its place in the batch.
        label: place of the label; None: batches have none.
    """

    inputs: dict[str, Place]
    label: Place | None

    @classmethod
    def of(cls, batch: Any, module: nn.Module, spec: AnyInput | None) -> Structure:
        """Match a batch with the parameters of the network's forward.

        Args:
            spec: the network's input; None: it is not known.

        Raises:
            DataError: they do not match.
        """
        forwards = inspect.signature(module.forward).parameters.values()
        parameters = [each.name for each in forwards if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        required = [each.name for each in forwards if each.name in parameters and each.default is each.empty]
        names = [each.name for each in spec.tensors] if spec else []
        inside: Any = batch
        at: Place = ()
        label: Place | None = None
        if isinstance(batch, tuple | list) and batch and not isinstance(batch[0], Tensor):
            inside, at = batch[0], (0,)
            label = (1,) if len(batch) > 1 and isinstance(batch[1], Tensor) else None
        if isinstance(inside, Tensor):
            found = {(names or parameters or ["inputs"])[0]: at}
        elif isinstance(inside, tuple | list):
            wanted = names or required or parameters[:1]
            count = len(wanted) if len(wanted) > 1 and len(inside) >= len(wanted) else 1
            found = {name: (*at, place) for place, name in enumerate(wanted[:count])}
            if not at and len(inside) > count and isinstance(inside[count], Tensor):
                label = (count,)
        elif isinstance(inside, Mapping):
            key = next((key for key in LABELS if isinstance(inside.get(key), Tensor)), None)
            label = label if key is None else (*at, key)
            others = [key for key, value in inside.items() if isinstance(value, Tensor) and key not in LABELS]
            known = [name for name in names or parameters if name in others]
            if len(names) == 1 and not known:  # a single tensor is forward's first argument, whatever it is called
                known = [key for key in others if key in parameters[:1]] or (others if len(others) == 1 else [])
                found = {name: (*at, key) for name, key in zip(names, known, strict=False)}
            else:
                found = {name: (*at, name) for name in known}
        else:
            found = {}
        lacking = [name for name in names or required if name not in found and name not in LABELS]
        if not found or lacking or not all(isinstance(_at(batch, place), Tensor) for place in found.values()):
            raise not_taken(batch, module, f"{', '.join(lacking) or 'its input'} is not in them")
        return cls(found, label)

    def read(self, batch: Any) -> tuple[Batch, Tensor | None]:
        """What the network takes of a batch, and the labels.

        Floating-point numbers become float32, and whole ones int64, but pixels (uint8).
        """
        inputs = {name: _converted(_at(batch, place)) for name, place in self.inputs.items()}
        label = None if self.label is None else _converted(_at(batch, self.label))
        if label is not None and label.dtype is torch.uint8:
            label = label.long()
        return inputs if len(inputs) > 1 else next(iter(inputs.values())), label

    def rebuilt(self, inputs: Batch, labels: Tensor) -> Any:
        """A batch as the user's data have it, for the user's own functions."""
        given = inputs if isinstance(inputs, dict) else {next(iter(self.inputs)): inputs}
        places = {place: given[name] for name, place in self.inputs.items()}
        if self.label is not None:
            places[self.label] = labels
        return _assembled(places)


def _at(batch: Any, place: Place) -> Any:
    for key in place:
        batch = batch[key]
    return batch


def _converted(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype is torch.uint8 else tensor.long()


def _assembled(places: Mapping[Place, Tensor]) -> Any:
    if () in places:
        return places[()]
    keys = list(dict.fromkeys(place[0] for place in places))
    parts = {key: _assembled({place[1:]: value for place, value in places.items() if place[0] == key}) for key in keys}
    return tuple(parts[key] for key in sorted(parts)) if isinstance(keys[0], int) else parts


def described(batch: Any) -> str:
    """A batch's structure in words: `(float32 (32, 1, 16000), int64 (32))`."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {described(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(map(described, batch[:8])) + (", …)" if len(batch) > 8 else ")")
    return type(batch).__name__


def not_taken(batch: Any, module: nn.Module, why: str) -> DataError:
    """The error of batches that a network does not take: their structure and the signature side by side."""
    signature = ", ".join(map(str, inspect.signature(module.forward).parameters.values()))
    return DataError(
        f"data: the network does not take these batches: {why}.\n  a batch:  {described(batch)}\n"
        f"  forward:  {type(module).__name__}.forward({signature})\nA batch is a tensor, (input, label), the inputs in "
        "forward's order with the label last, or a dict with the names of forward's parameters and `labels`."
    )


def tensors(batch: Any) -> Any:
    """A batch with tensors in place of arrays."""
    return each(lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value, batch)


def each(function: Callable[[Any], Any], batch: Any) -> Any:
    """Apply a function to each part of a batch that is neither a dict nor a list."""
    if isinstance(batch, Mapping):
        return {key: each(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(each(function, value) for value in batch)
    return function(batch)


def leaves(batch: Any) -> list[Any]:
    """The parts of a batch that are neither dicts nor lists."""
    found: list[Any] = []
    each(found.append, batch)
    return found


def held(batch: Any) -> list[Tensor]:
    """The tensors of a batch that have a first dimension."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
