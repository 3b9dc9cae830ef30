"""From a depth to a plan of kept blocks, and from a plan to the student with the teacher's weights.

Depths and plans are computed from sections alone, by pure functions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from litdeploy.config.spec import DepthPlan
from litdeploy.errors import StudentError
from litdeploy.networks.families.family import Family
from litdeploy.networks.sections import Section, children_of, container


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
    return merged({known[name]: spaced(count, known[name].blocks) for name, count in kept.items()}, sections)


def merged(kept: Mapping[Section, Sequence[int]], sections: Sequence[Section]) -> DepthPlan:
    """The plan that keeps these blocks of each section, counted in the section, and the rest of their containers."""
    plan: dict[str, set[int]] = {}
    for section, indices in kept.items():
        whole = plan.setdefault(section.key, set(range(section.among or section.blocks)))
        whole -= {section.start + index for index in range(section.blocks)} - {section.start + each for each in indices}
    return {section.key: tuple(sorted(plan[section.key])) for section in sections if section.key in plan}


def whole_plan(sections: Sequence[Section]) -> DepthPlan:
    """The plan that keeps all blocks."""
    return merged({section: range(section.blocks) for section in sections}, sections)


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


def make_student(
    teacher: nn.Module, plan: DepthPlan, fresh: nn.Module | None = None, sections: Sequence[Section] = ()
) -> nn.Module:
    """Make the student: stem and head are the teacher's, blocks are copies of the teacher's or new.

    Args:
        teacher: not changed.
        plan: the blocks that are kept.
        fresh: a newly initialized module of the teacher's shape, for the blocks of `sections`; None: copies.

    Returns:
        A student that shares no tensor with the teacher. With copied blocks and a plan that keeps all, it computes
        exactly what the teacher computes.
    """
    student = copy.deepcopy(teacher)
    if fresh is not None:
        for section in sections:
            for copied, new in zip(section.blocks_in(student), section.blocks_in(fresh), strict=True):
                copied.load_state_dict(new.state_dict())
    shorten(student, plan)
    return student.requires_grad_(True).train()


def kept_of(section: Section, plan: DepthPlan) -> tuple[int, ...]:
    """Which blocks of the teacher's section a plan keeps, counted in the section."""
    if section.key not in plan:
        return tuple(range(section.blocks))
    inside = range(section.start, section.start + section.blocks)
    return tuple(index - section.start for index in plan[section.key] if index in inside)


def own_sections(student: nn.Module, sections: Sequence[Section], plan: DepthPlan | None) -> list[Section]:
    """A student's sections: the teacher's names, and paths of the student's own blocks.

    Args:
        sections: the teacher's.
        plan: the student's; None: it has all of the teacher's blocks, or is a network of its own with like containers.

    Raises:
        NetworkError: the student has no container of a section.
    """
    found = []
    for section in sections:
        children = children_of(section.key, container(student, section.key))
        inside = range(section.start, section.start + section.blocks)
        if plan is not None and section.key in plan:
            places = [(place, index) for place, index in enumerate(plan[section.key]) if index in inside]
        elif section.name == section.key:  # as a whole, however many blocks the student has of it
            places = list(enumerate(spaced(len(children), section.blocks)))
        else:
            places = [(index, index) for index in inside]
        kept = tuple(index - section.start for _, index in places)
        found.append(replace(section, paths=tuple(children[place] for place, _ in places), kept=kept))
    return found
