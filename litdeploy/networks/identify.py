"""Which network is this state dict? Recognised from names and shapes, other people's names too."""

from __future__ import annotations

import re

from litdeploy.errors import NetworkError
from litdeploy.networks.families.family import Arguments, Reading, Weights
from litdeploy.networks.registry import FAMILIES, Request


def readings(weights: Weights) -> list[tuple[str, Reading]]:
    """Every (family's name, reading) that fits."""
    return [(name, reading) for name, family in FAMILIES.items() for reading in family.read(weights)]


def identify(weights: Weights, source: str, asked: Request | None = None) -> tuple[str, Reading]:
    """The one network that fits.

    Args:
        weights: a state dict without wrappers' prefixes.
        source: what a message calls it.
        asked: narrows the readings to one family and to the arguments given.

    Raises:
        NetworkError: none fits, or more than one does.
    """
    found = readings(weights)
    if asked is not None:
        found = [
            (name, reading)
            for name, reading in found
            if name == asked.name and asked.arguments.items() <= reading.arguments.items()
        ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NetworkError(_not_recognised(weights, source))
    lines = [f"{source}: its names and shapes fit {len(found)} networks. Say which it is:"]
    lines += [f"  --network {describe(name, reading.arguments)}   ({reading.because})" for name, reading in found]
    raise NetworkError("\n".join(lines))


def describe(name: str, arguments: Arguments) -> str:
    """A network as `--network` takes it: `resnet,depth=56,classes=10,shortcut=A`."""
    values = ((key, str(value).lower() if isinstance(value, bool) else value) for key, value in arguments.items())
    return ",".join([name, *(f"{key}={value}" for key, value in values)])


def _not_recognised(weights: Weights, source: str) -> str:
    names = list(weights)
    message = (
        f"{source}: not a network that litdeploy recognises by names and shapes ({len(names)} tensors: "
        f"{', '.join(names[:3])}, …, {names[-1]}). Known families: "
        + ", ".join(family.title for family in FAMILIES.values())
        + "."
    )
    blocks = sum(bool(re.match(r"layer4\.\d+\.", name)) for name in names)
    hint = "timm:resnet50" if blocks else "timm:NAME, hf:NAME or package.module:function"
    return f"{message} Name the network that it belongs to: --network {hint}"
