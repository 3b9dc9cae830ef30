"""From a depth to a plan of kept blocks, and from a plan to the student with the teacher's weights.

Depths and plans are computed from sections alone, by pure functions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from litdeploy.config.spec import DepthPlan
from litdeploy.errors import StudentError
from litdeploy.networks.families.family import Family
from litdeploy.networks.sections import Section, container


def depths_of(family: Family | None, sections: Sequence[Section]) -> dict[int, int]:
    """Possible depths of a student → number of blocks in all sections together, shallowest first.

    In a family the depth counts weighted layers. Its depths are the published ones, or else those that shorten all
    sections alike, if the teacher's are alike. In any other network the depth is the number of blocks.
    """
    if family and family.published:
        own = [section.blocks for section in sections]
        return {
            depth: sum(blocks)
            for depth, blocks in family.published.items()
            if len(blocks) == len(own) and all(few <= many for few, many in zip(blocks, own, strict=True))
        }
    whole = sum(section.blocks for section in sections)
    alike = len({section.blocks for section in sections}) == 1
    step = len(sections) if family and alike else 1
    totals = range(len(sections), whole + 1, step)
    return {(family.depth(total) if family else total): total for total in totals}


def depth_of(family: Family | None, sections: Sequence[Section]) -> int:
    """Depth of a network with these sections: weighted layers as its family counts them, or else the blocks."""
    blocks = sum(section.blocks for section in sections)
    return family.depth(blocks) if family else blocks


def spaced(kept: int, blocks: int) -> tuple[int, ...]:
    """Indices of `kept` of `blocks` blocks, evenly spaced, with the first, which may downsample.

    >>> spaced(3, 9)
    (0, 4, 8)
    """
    if kept == 1:
        return (0,)
    return tuple(round(index * (blocks - 1) / (kept - 1)) for index in range(kept))


def make_plan(sections: Sequence[Section], kept: Mapping[str, int]) -> DepthPlan:
    """The plan that keeps `kept[name]` blocks of each named section, and the other sections whole.

    Raises:
        StudentError: an unknown section, no block left, or more blocks than the teacher has.
    """
    known = {section.name: section for section in sections}
    for name, count in kept.items():
        if name not in known:
            raise StudentError(
                f"the teacher has no section '{name}'. Its sections: "
                + ", ".join(f"{section.name} ({section.blocks} blocks)" for section in sections)
                + "."
            )
        if not 1 <= count <= known[name].blocks:
            raise StudentError(
                f"section '{name}' has {known[name].blocks} blocks; the student can keep 1 to {known[name].blocks} "
                f"of them, not {count}."
            )
    return {name: spaced(count, known[name].blocks) for name, count in kept.items()}


def compose(first: DepthPlan, second: DepthPlan) -> DepthPlan:
    """The plan equal to `first` and then `second`, whose indices count the blocks that `first` kept.

    >>> compose({"layer1": (0, 2, 4)}, {"layer1": (0, 2)})
    {'layer1': (0, 4)}
    """
    return {
        name: tuple(kept[index] for index in second[name]) if name in second else kept for name, kept in first.items()
    }


def plan_for_depth(sections: Sequence[Section], depth: int, family: Family | None) -> DepthPlan:
    """The plan of a student of this depth, with every section.

    Raises:
        StudentError: no student has this depth; the message lists the possible depths.
    """
    depths = depths_of(family, sections)
    if depth in depths and family and family.published:
        names = [section.name for section in sections]
        return make_plan(sections, dict(zip(names, family.published[depth], strict=True)))
    if depth in depths:
        return make_plan(sections, share_out(depths[depth], sections))
    deepest = max(depths, default=0)
    what = "layers" if family else "blocks in all"
    wrong = (
        f"the teacher has depth {deepest}, and a student is no deeper than its teacher"
        if depth > deepest
        else f"no student of this teacher has depth {depth} ({what})"
    )
    raise StudentError(f"--student-depth {depth}: {wrong}. Possible: {', '.join(map(str, depths)) or 'none'}.")


def share_out(total: int, sections: Sequence[Section]) -> dict[str, int]:
    """Distribute `total` blocks over the sections in proportion to the teacher's, at least one each."""
    whole = sum(section.blocks for section in sections)
    exact = {section.name: total * section.blocks / whole for section in sections}
    shares = {name: max(1, int(share)) for name, share in exact.items()}
    # Largest remainder first; a section with a single block can give none.
    while sum(shares.values()) != total:
        step = 1 if sum(shares.values()) < total else -1
        open_names = [name for name in shares if step == 1 or shares[name] > 1]
        name = max(open_names, key=lambda name: step * (exact[name] - shares[name]))
        shares[name] += step
    return shares


def shorten(module: nn.Module, plan: DepthPlan) -> None:
    """Remove the blocks that the plan does not keep from `module`, in place.

    Raises:
        StudentError: the plan keeps blocks that the module does not have.
    """
    for name, kept in plan.items():
        blocks = container(module, name)
        if not kept or list(kept) != sorted(set(kept)) or kept[0] != 0 or kept[-1] >= len(blocks):
            raise StudentError(f"the plan keeps blocks {list(kept[:8])} of section '{name}', which has {len(blocks)}.")
        for index in reversed(range(len(blocks))):
            if index not in kept:
                del blocks[index]


def make_student(teacher: nn.Module, plan: DepthPlan, fresh: nn.Module | None = None) -> nn.Module:
    """Make the student: stem and head are the teacher's, blocks are copies of the teacher's or new.

    Args:
        teacher: not changed.
        plan: the blocks that are kept.
        fresh: a newly initialized module of the teacher's shape, for the blocks of the planned sections; None: copies.

    Returns:
        A student that shares no tensor with the teacher. With copied blocks and a plan that keeps all, it computes
        exactly what the teacher computes.
    """
    student = copy.deepcopy(teacher)
    if fresh is not None:
        for name in plan:
            container(student, name).load_state_dict(container(fresh, name).state_dict())
    shorten(student, plan)
    return student.requires_grad_(True).train()
