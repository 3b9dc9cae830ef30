"""Depth, parameters and floating-point operations of a network, in total and by section."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from litdeploy.batch import forward
from litdeploy.networks import FAMILIES, Network, Section
from litdeploy.networks.network import counting
from litdeploy.profiler.schema import REMAINDER, Breakdown, Part


def break_down(network: Network, sections: Sequence[Section]) -> Breakdown:
    """Count depth, parameters and FLOPs of a network.

    Args:
        network: in eval mode.
        sections: its own. A student's are those of its teacher; see `own_sections`.
    """
    module = network.module
    with torch.no_grad(), counting() as counter:
        forward(module, network.example(1))
    flops = {name: int(sum(by_operation.values())) for name, by_operation in counter.get_flop_counts().items()}
    root = type(module).__name__

    parts = []
    for section in sections:
        blocks = nn.ModuleList(section.blocks_in(module))
        # Block by block: an nn.ModuleList is never called itself, so nothing is counted under its own name.
        counted = sum(flops.get(f"{root}.{path}", 0) for path in section.paths)
        parts.append(Part(name=section.name, blocks=section.blocks, parameters=_parameters(blocks), flops=counted))
    parameters, total = _parameters(module), int(counter.get_total_flops())
    rest = Part(
        name=REMAINDER,
        blocks=None,
        parameters=parameters - sum(part.parameters for part in parts),
        flops=total - sum(part.flops for part in parts),
    )
    family = FAMILIES.get(network.spec.name)
    blocks_in_all = sum(part.blocks or 0 for part in parts)
    return Breakdown(
        depth=family.depth(blocks_in_all) if family else blocks_in_all,
        depth_unit="layers" if family else "blocks",
        parameters=parameters,
        flops=total,
        parts=(*parts, rest),
    )


def depth_ratio(teacher: Breakdown, student: Breakdown) -> float:
    """Teacher over student; 1 for networks without sections, which have no depth."""
    return teacher.depth / student.depth if student.depth else 1.0


def name_of(network: Network, breakdown: Breakdown) -> str:
    """The network's display name: `ResNet-20`; `my.Net of 4 blocks` outside the families."""
    name = network.spec.name
    if name in FAMILIES:
        return f"{type(network.module).__name__}-{breakdown.depth}"
    return f"{name} of {breakdown.depth} blocks"


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
