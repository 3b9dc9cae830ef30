"""From a depth to a plan of kept blocks, and from a plan to the student with the teacher's weights.

Depths and plans are computed from sections alone, by pure functions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from litdeploy.batch import Batch, forward
from litdeploy.config.spec import DepthPlan
from litdeploy.errors import StudentError
from litdeploy.networks.families.family import Family
from litdeploy.networks.sections import PassThrough, Section, children_of, container, hidden_of, whole, without_caches

# Blocks of the teacher in each section of a stack that is divided.
_BLOCKS_OF_A_SECTION = 3


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
    totals = range(min(whole, max(1, sum(section.least for section in sections))), whole + 1, step)
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


def chosen(section: Section, count: int, influence: Sequence[float] | None = None) -> tuple[int, ...]:
    """Which blocks of a section to keep: evenly spaced, or those of the most influence.

    If kinds of blocks alternate, the student keeps their proportion, and at least one of each kind if it keeps so many:
    evenly spaced blocks of a ModernBERT alone could all be those of global attention.

    Args:
        count: how many.
        influence: of each block; see `block_influence`.
    """
    kinds = section.kinds or ("",) * section.blocks
    of_kind = {kind: [index for index, each in enumerate(kinds) if each == kind] for kind in dict.fromkeys(kinds)}
    if influence is None and len(of_kind) == 1:
        return spaced(count, section.blocks) if count else ()
    exact = {kind: count * len(indices) / section.blocks for kind, indices in of_kind.items()}
    shares = {kind: max(int(share), int(count >= len(of_kind))) for kind, share in exact.items()}
    while sum(shares.values()) != count:
        step = 1 if sum(shares.values()) < count else -1
        open_kinds = [kind for kind in shares if step == 1 or shares[kind] > 1 or count < len(of_kind)]
        shares[max(open_kinds, key=lambda kind: step * (exact[kind] - shares[kind]))] += step
    first = kinds[0] if count and not section.free else None
    if first is not None and not shares[first]:  # the first block has to stay
        shares[max(shares, key=lambda kind: shares[kind])] -= 1
        shares[first] += 1
    kept: set[int] = set()
    for kind, indices in of_kind.items():
        share = shares[kind]
        if influence is not None:
            ranked = sorted(indices, key=lambda index: (not (index == 0 and not section.free), -influence[index]))
            kept |= set(ranked[:share])
        elif share == 1 and kind != first:
            kept.add(indices[len(indices) // 2])
        else:
            kept |= {indices[place] for place in (spaced(share, len(indices)) if share else ())}
    return tuple(sorted(kept))


@torch.no_grad()
def block_influence(
    module: nn.Module, sections: Sequence[Section], batches: Iterable[Batch]
) -> dict[str, tuple[float, ...]]:
    """Section → influence of each block: 1 − the mean cosine similarity of its input and output (Men et al., "ShortGPT:
    Layers in Large Language Models are More Redundant Than You Expect", arXiv:2403.03853, section 3.2).

    A block of little influence hardly changes what passes through it. The similarity is that of the vectors of each
    position, padding too: all blocks see the same. A block that changes its input's shape cannot be compared, and has
    the most.

    Args:
        module: in eval mode.
        batches: at least one.
    """
    similar: dict[str, list[float]] = {path: [] for section in sections for path in section.paths}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            before, after = args[0], hidden_of(output)
            if before.shape == after.shape:
                dim = 1 if before.dim() > 3 else -1  # (N, C, H, W), or (N, positions, C)
                similar[path].append(float(cosine_similarity(before.float(), after.float(), dim=dim).mean()))

        return hook

    with without_caches(module), ExitStack() as hooks:
        for path in similar:
            hooks.callback(module.get_submodule(path).register_forward_hook(hook_for(path)).remove)
        for batch in batches:
            forward(module, batch)
    return {
        section.name: tuple(
            1 - sum(similar[path]) / len(similar[path]) if similar[path] else math.inf for path in section.paths
        )
        for section in sections
    }


def divided(sections: Sequence[Section], plan: DepthPlan, wanted: int | Literal["auto"]) -> list[Section]:
    """Divide a long uniform stack into sections, so that each learns on the teacher's own input.

    As equal as possible, of at least two blocks, and each with a block that the student keeps.

    Args:
        sections: the teacher's.
        plan: the student's.
        wanted: how many; `auto`: one for each three blocks, if the network has a single section.

    Raises:
        StudentError: it cannot be divided into so many.
    """
    stacks = [each for each in sections if each.input_shape == each.output_shape and each.container == each.name]
    if wanted == "auto" and (len(sections) != 1 or not stacks):
        return list(sections)
    if wanted == 1:
        return list(sections)
    if len(sections) != 1 or not stacks:
        names = ", ".join(section.name for section in sections)
        why = (
            f"the network has {len(sections)} sections already ({names})"
            if len(sections) > 1
            else f"section '{names}' is not uniform: its blocks take {sections[0].input_shape} and give "
            f"{sections[0].output_shape}, or are in no container of their own"
        )
        raise StudentError(f"--sections {wanted}: divides one stack of uniform blocks, and {why}. Leave it out.")
    (stack,) = stacks
    kept = kept_of(stack, plan)
    most = min(stack.blocks // 2, len(kept))
    if wanted != "auto" and wanted > most:
        raise StudentError(
            f"--sections {wanted}: section '{stack.name}' has {stack.blocks} blocks, of which the student keeps "
            f"{len(kept)}. A section needs two of them or more, and one that is kept. Give --sections {max(1, most)} "
            "or fewer."
        )
    count = min(most, stack.blocks // _BLOCKS_OF_A_SECTION) if wanted == "auto" else wanted
    if count < 2:
        return [stack]
    ends = _borders(stack.blocks, kept, count)
    return [
        replace(
            stack,
            name=f"{stack.name}[{start}:{stop}]",
            paths=stack.paths[start:stop],
            among=stack.blocks,
            free=stack.free or start > 0,
            kinds=stack.kinds[start:stop],
        )
        for start, stop in pairwise((0, *ends))
    ]


def _borders(blocks: int, kept: Sequence[int], count: int) -> list[int]:
    """Find the ends of `count` runs of blocks: each with a kept one, and as near as possible to one size.

    >>> _borders(6, (0, 2, 5), 3)
    [2, 4, 6]
    """

    def cost(start: int, stop: int) -> float:
        if not any(start <= index < stop for index in kept):
            return math.inf
        # A run of one block, which is kept, has nothing to learn; better a larger one elsewhere.
        return (stop - start - blocks / count) ** 2 + (blocks**2 if stop - start < 2 else 0)

    # Where the runs so far end → their least cost, and all their ends.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(count):
        longer: dict[int, tuple[float, list[int]]] = {}
        for start, (before, ends) in best.items():
            for stop in range(start + 1, blocks + 1):
                found = (before + cost(start, stop), [*ends, stop])
                longer[stop] = min(longer.get(stop, found), found)
        best = longer
    return best[blocks][1]


def make_plan(
    sections: Sequence[Section], kept: Mapping[str, int], influence: Mapping[str, Sequence[float]] | None = None
) -> DepthPlan:
    """The plan that keeps `kept[name]` blocks of each named section, and the other sections whole.

    Args:
        influence: of each section's blocks; None: keep evenly spaced ones.

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
        least = 0 if known[name].free else 1
        if not least <= count <= known[name].blocks:
            raise StudentError(
                f"section '{name}' has {known[name].blocks} blocks; the student can keep {least} to "
                f"{known[name].blocks} of them, not {count}."
            )
    scores = influence or {}
    return merged({known[name]: chosen(known[name], count, scores.get(name)) for name, count in kept.items()}, sections)


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


def plan_for_depth(
    sections: Sequence[Section],
    depth: int,
    family: Family | None,
    influence: Mapping[str, Sequence[float]] | None = None,
) -> DepthPlan:
    """The plan of a student of this depth, with every section.

    Args:
        influence: see `make_plan`.

    Raises:
        StudentError: no student has this depth; the message lists the possible depths.
    """
    depths = depths_of(family, sections)
    if depth in depths and family and family.published:
        names = [section.name for section in sections]
        return make_plan(sections, dict(zip(names, family.published[depth], strict=True)), influence)
    if depth in depths:
        return make_plan(sections, share_out(depths[depth], sections), influence)
    deepest = max(depths, default=0)
    what = "layers" if family else "blocks in all"
    wrong = (
        f"the teacher has depth {deepest}, and a student is no deeper than its teacher"
        if depth > deepest
        else f"no student of this teacher has depth {depth} ({what})"
    )
    raise StudentError(f"--student-depth {depth}: {wrong}. Possible: {', '.join(map(str, depths)) or 'none'}.")


def share_out(total: int, sections: Sequence[Section]) -> dict[str, int]:
    """Distribute `total` blocks over the sections in proportion to the teacher's, the least that each needs or more."""
    whole = sum(section.blocks for section in sections)
    exact = {section.name: total * section.blocks / whole for section in sections}
    least = {section.name: section.least for section in sections}
    shares = {name: max(least[name], int(share)) for name, share in exact.items()}
    # Largest remainder first; a section with the fewest blocks can give none.
    while sum(shares.values()) != total:
        step = 1 if sum(shares.values()) < total else -1
        open_names = [name for name in shares if step == 1 or shares[name] > least[name]]
        name = max(open_names, key=lambda name: step * (exact[name] - shares[name]))
        shares[name] += step
    return shares


def shorten(module: nn.Module, plan: DepthPlan) -> None:
    """Remove the blocks that the plan does not keep from `module`, in place.

    Raises:
        StudentError: the plan keeps blocks that the module does not have.
    """
    for name, kept in plan.items():
        in_none = "+" in name.rpartition(".")[2]
        paths = whole(module, name).paths
        if list(kept) != sorted(set(kept)) or not set(kept) <= set(range(len(paths))):
            raise StudentError(f"the plan keeps blocks {list(kept[:8])} of section '{name}', which has {len(paths)}.")
        for index in reversed(range(len(paths))):
            if index in kept:
                continue
            if in_none:
                module.set_submodule(paths[index], PassThrough(), strict=True)
            else:
                del container(module, name)[index]


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
        in_none = section.container is None
        children = section.paths if in_none else children_of(section.key, container(student, section.key))
        inside = range(section.start, section.start + section.blocks)
        if plan is not None and section.key in plan:
            places = [
                (index if in_none else place, index) for place, index in enumerate(plan[section.key]) if index in inside
            ]
        elif section.name == section.key:  # as a whole, however many blocks the student has of it
            places = list(enumerate(spaced(len(children), section.blocks)))
        else:
            places = [(index, index) for index in inside]
        kept = tuple(index - section.start for _, index in places)
        found.append(replace(section, paths=tuple(children[place] for place, _ in places), kept=kept))
    return found
