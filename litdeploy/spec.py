"""What rebuilds a network: its name, arguments, input and, for a student, which of the teacher's blocks it kept."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, model_validator

from litdeploy.errors import SettingsError
from litdeploy.settings import Settings

# Channel mean and standard deviation of RGB / 255 on the training images.
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class InputSpec(Settings):
    """One image as the network takes it: float32, (value / 255 − mean) / std per channel, NCHW.

    Attributes:
        shape: (channels, height, width).
        mean, std: one value a channel, on the scale 0–1.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> InputSpec:
        if min(self.shape) < 1:
            raise ValueError("every size of an input shape is at least 1")
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise ValueError(f"mean and std need one value for each of the {self.shape[0]} channels")
        if min(self.std) <= 0:
            raise ValueError("a standard deviation is above 0")
        return self


# section → indices of the teacher's blocks that are kept, in order; a section named nowhere is kept whole.
DepthPlan = dict[str, tuple[int, ...]]


class NetworkSpec(Settings):
    """A network without its weights.

    Attributes:
        name: as the registry knows it: `resnet`, `resnext`, `timm:NAME`, `hf:NAME`, `package.module:function`.
        arguments: keyword arguments of the builder; those of the *teacher*, when there is a plan.
        input: what one image looks like.
        classes: names of the classes, in the order of the logits; empty where they are not known.
        plan: for a student, what distinguishes it from its teacher.
        widths: layer → shape of its weight, for layers that channels were taken out of.
    """

    name: str
    arguments: dict[str, int | float | str | bool] = Field(default_factory=dict)
    input: InputSpec
    classes: tuple[str, ...] = ()
    plan: DepthPlan | None = None
    widths: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    def with_(self, **changes: Any) -> NetworkSpec:
        """The same with some fields changed."""
        return self.model_copy(update=changes)


def parse_normalisation(text: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Reads `imagenet` or `m1,m2,m3:s1,s2,s3`.

    Named statistics of three channels are averaged for a network of one channel.

    Raises:
        SettingsError: an unknown name, or not one number a channel on each side.
    """
    if text in NORMALISATIONS:
        mean, std = NORMALISATIONS[text]
        if channels == len(mean):
            return mean, std
        if channels == 1:
            return (math.fsum(mean) / len(mean),), (math.fsum(std) / len(std),)
        raise SettingsError(
            f"--normalise {text} has {len(mean)} channels and the network takes {channels}. Give the numbers: "
            f"--normalise m1,…,m{channels}:s1,…,s{channels}."
        )
    try:
        mean, std = (tuple(float(number) for number in part.split(",")) for part in text.split(":"))
    except ValueError:
        raise SettingsError(
            f"--normalise {text}: neither a known name ({', '.join(NORMALISATIONS)}) nor means and standard deviations "
            "on the scale 0–1, as in 0.49,0.48,0.45:0.25,0.24,0.26."
        ) from None
    if not len(mean) == len(std) == channels or min(std) <= 0 or not all(map(math.isfinite, (*mean, *std))):
        raise SettingsError(
            f"--normalise {text}: needs {channels} means and {channels} standard deviations above 0, one a channel."
        )
    return mean, std


def override_input(
    spec: InputSpec, normalise: str | None, input_shape: tuple[int, int, int] | None, source: str
) -> InputSpec:
    """The input with what the user said over what was known.

    Raises:
        SettingsError: another number of channels, or no such normalisation.
    """
    shape = input_shape or spec.shape
    if shape[0] != spec.shape[0]:
        raise SettingsError(f"{source}: takes {spec.shape[0]} channels; --input-shape says {shape[0]}.")
    mean, std = parse_normalisation(normalise, shape[0]) if normalise else (spec.mean, spec.std)
    return InputSpec(shape=shape, mean=mean, std=std)
