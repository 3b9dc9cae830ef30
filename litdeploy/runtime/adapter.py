"""Adapt a runner's batch to the input of an exported file, as the file's metadata describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor

from litdeploy.batch import Batch, cast, mapped
from litdeploy.config.spec import AnyInput
from litdeploy.errors import RunnerError
from litdeploy.files import parse_json
from litdeploy.runtime.device import DTYPES
from litdeploy.tasks import TASKS, Task, task_of

_NUMBERS = TypeAdapter(list[float], config=ConfigDict(strict=True, allow_inf_nan=False))
_NAMES = TypeAdapter(list[str], config=ConfigDict(strict=True))


@dataclass(frozen=True)
class InputAdapter:
    """Converts a batch to what an exported file takes.

    Attributes:
        precision: of the file's arithmetic.
        dtype: of its floating-point inputs; uint8 if the file normalizes pixels itself and takes (N, H, W, C).
        mean, std: one value per channel, on the scale 0–1; empty if the file does not state them.
    """

    precision: str = "fp32"
    dtype: torch.dtype = torch.float32
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def adapt(self, batch: Batch) -> Batch:
        """Convert a runner's batch, float32 or integers, to the file's types and layout; contiguous."""
        return mapped(self._adapt, batch)

    def _adapt(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if self.dtype is not torch.uint8 or not tensor.is_floating_point():
            # A batch of one channel in channels-last format counts as contiguous but has other strides than the package
            # was compiled for. AOTInductor does not check strides and computes wrong values (torch 2.13, CPU).
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.to(dtype).contiguous().flatten().view(tensor.shape)
        channels = tensor.shape[1]
        if not len(self.mean) == len(self.std) == channels:
            raise RunnerError(
                f"the file takes pixels and states the normalization of {len(self.mean)} channels, but the batch has "
                f"{channels}. Export it again: litdeploy export --embed-preprocessing"
            )
        mean_C11, std_C11 = (_of_pixels(values, tensor.device) for values in (self.mean, self.std))
        pixels_NCHW = (tensor * std_C11 + mean_C11).round_().clamp_(0, 255).to(torch.uint8)
        return pixels_NCHW.permute(0, 2, 3, 1).contiguous()


# Cached on the device: copying from the host for each batch would synchronize with it.
@lru_cache(maxsize=16)
def _of_pixels(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return 255 * torch.tensor(values, device=device).view(-1, 1, 1)


def read_adapter(metadata: Mapping[str, str], source: str = "the exported file") -> InputAdapter:
    """Read the adapter from an exported file's metadata; plain float32 if `litdeploy export` did not write the file.

    Args:
        source: the file's name in messages.

    Raises:
        RunnerError: the metadata is damaged.
    """
    embedded = metadata.get("preprocessing") == "embedded"
    return InputAdapter(
        precision=metadata.get("precision", "fp32"),
        dtype=torch.uint8 if embedded else DTYPES.get(metadata.get("io_precision", "fp32"), torch.float32),
        mean=read_numbers(metadata, "mean", source),
        std=read_numbers(metadata, "std", source),
    )


def answer(tensors: Mapping[str, Tensor], task: Task[Any]) -> Batch:
    """The answer of a task in a file's outputs, float32."""
    if task.several:
        return cast(dict(tensors), torch.float32)
    return next(iter(tensors.values())).float()


def read_task(metadata: Mapping[str, str], spec: AnyInput | None, source: str) -> Task[Any]:
    """Read the task from an exported file's metadata; its input's own if they do not state one.

    Raises:
        RunnerError: there is no task of that name.
    """
    stated = metadata.get("task")
    if stated is None:
        return task_of(spec)
    if stated not in TASKS:
        raise RunnerError(
            f"{source}: its metadata state the task '{stated}', and the tasks are {', '.join(TASKS)}. The file is "
            "damaged or not from litdeploy. Export it again: litdeploy export"
        )
    return TASKS[stated]


def read_numbers(metadata: Mapping[str, str], key: str, source: str) -> tuple[float, ...]:
    """Read a list of numbers from an exported file's metadata; empty if there is none.

    Raises:
        RunnerError: the value is not a list of numbers.
    """
    try:
        return tuple(_NUMBERS.validate_python(parse_json(metadata.get(key, "[]"))))
    except ValueError:
        raise RunnerError(
            f"{source}: its metadata under '{key}' is not a list of numbers. The file is damaged or not from "
            "litdeploy. Export it again: litdeploy export"
        ) from None


def read_names(metadata: Mapping[str, str], source: str) -> tuple[str, ...]:
    """Read the class names from an exported file's metadata; empty if there are none.

    Raises:
        RunnerError: the value is not a list of names.
    """
    try:
        return tuple(_NAMES.validate_python(parse_json(metadata.get("classes", "[]"))))
    except ValueError:
        raise RunnerError(
            f"{source}: its metadata under 'classes' is not a list of names. The file is damaged or not from "
            "litdeploy. Export it again: litdeploy export"
        ) from None
