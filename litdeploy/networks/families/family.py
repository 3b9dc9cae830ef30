"""What litdeploy knows of a family of networks that it builds itself: one `FAMILY` in each network's file."""

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
        because: what in the file spoke for it.
    """

    arguments: Arguments
    weights: dict[str, Tensor]
    because: str


@dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
        title: as people call it.
        build: arguments → newly initialised module.
        read: state dict → the readings that fit; empty where it is of another family.
        input: arguments → input spec that its published checkpoints take.
        layers_per_block: weighted layers in one block; the depth is this times the blocks, plus `layers_around`.
        layers_around: those counted outside the blocks; two where stem and head count.
        published: depth → blocks of each section, where a table says it; empty where all sections are shortened alike.
        sections: their names, by which they are known where each has a single block; empty where that does not occur.
        classes: the builder's argument for how many classes there are.
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
        """Weighted layers of a network with that many blocks in all sections together."""
        return self.layers_per_block * blocks + self.layers_around


def renamed(weights: Weights, rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The weights with each name rewritten by the rules (regular expressions), in order."""
    result = {}
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def fits(weights: Weights, dimensions: Mapping[str, int]) -> bool:
    """Whether these weights are there, with as many dimensions, none of them empty."""
    return all(
        name in weights and weights[name].dim() == count and weights[name].numel() > 0
        for name, count in dimensions.items()
    )


def block_counts(weights: Weights) -> list[int]:
    """Numbers of blocks in `layer1`, `layer2`, …, by the names; empty where they are not numbered without gaps."""
    found: dict[int, set[int]] = {}
    for name in weights:
        if match := re.match(r"layer([0-9]{1,5})\.([0-9]{1,5})\.", name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    if sorted(found) != list(range(1, len(found) + 1)):
        return []
    if any(blocks != set(range(len(blocks))) for blocks in found.values()):
        return []
    return [len(found[layer]) for layer in sorted(found)]
