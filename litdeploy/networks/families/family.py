"""A family of networks that litdeploy builds itself: one `FAMILY` in each network's file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from litdeploy.config.spec import AnyInput

Weights = Mapping[str, Tensor]
Arguments = dict[str, int | float | str | bool]


@dataclass(frozen=True)
class Reading:
    """One network that a state dict fits.

    Attributes:
        arguments: of the family's builder.
        weights: under the family's own names.
        because: the evidence for it in the file.
    """

    arguments: Arguments
    weights: dict[str, Tensor]
    because: str


@dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
        title: its usual name.
        build: arguments → newly initialized module.
        read: state dict → the readings that fit; empty if it belongs to another family.
        input: arguments → input spec that its published checkpoints take.
        layers_per_block: weighted layers in one block; the depth is this times the blocks, plus `layers_around`.
        layers_around: the layers counted outside the blocks; two if stem and head count.
        published: depth → blocks of each section, from a published table; empty if all sections are shortened alike.
        sections: their names, needed if each may have a single block; empty otherwise.
        classes: the builder's argument for the number of classes.
    """

    title: str
    build: Callable[..., nn.Module]
    read: Callable[[Weights], list[Reading]]
    input: Callable[[Arguments], AnyInput]
    layers_per_block: int
    layers_around: int = 2
    published: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    classes: str = "classes"

    def depth(self, blocks: int) -> int:
        """Number of weighted layers of a network with this many blocks in all sections together."""
        return self.layers_per_block * blocks + self.layers_around


def renamed(weights: Weights, rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Rewrite the names of weights by the rules (regular expressions), in order."""
    result = {}
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def fits(weights: Weights, dimensions: Mapping[str, int]) -> bool:
    """Whether these weights exist, each with this number of dimensions and none of them empty."""
    return all(
        name in weights and weights[name].dim() == count and weights[name].numel() > 0
        for name, count in dimensions.items()
    )


def block_counts(weights: Weights) -> list[int]:
    """Numbers of blocks in `layer1`, `layer2`, …, by the names; empty if the numbers have gaps."""
    found: dict[int, set[int]] = {}
    for name in weights:
        if match := re.match(r"layer([0-9]{1,5})\.([0-9]{1,5})\.", name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    if sorted(found) != list(range(1, len(found) + 1)):
        return []
    if any(blocks != set(range(len(blocks))) for blocks in found.values()):
        return []
    return [len(found[layer]) for layer in sorted(found)]
