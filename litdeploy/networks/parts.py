"""The sections of a network of which more is known than its module, however few blocks they have."""

from __future__ import annotations

from litdeploy.errors import NetworkError
from litdeploy.networks.network import Network
from litdeploy.networks.registry import FAMILIES
from litdeploy.networks.sections import Section, find_sections, named_sections


def sections_of(network: Network) -> list[Section]:
    """The sections that `find_sections` finds, and those of a single block each that a student's plan or its family
    names; in the module's order.

    Raises:
        NetworkError: there are none.
    """
    module, example, family = network.module, network.example(), FAMILIES.get(network.spec.name)
    named = {*(network.spec.plan or ()), *(family.sections if family else ())}
    try:
        found = find_sections(module, example)
    except NetworkError:
        if not named:
            raise
        found = []
    if named <= {section.name for section in found}:
        return found
    # Of containers inside one another the outermost counts.
    inside = tuple(f"{name}." for name in named)
    named |= {section.name for section in found if not section.name.startswith(inside)}
    return named_sections(module, [name for name, _ in module.named_modules() if name in named], example)
