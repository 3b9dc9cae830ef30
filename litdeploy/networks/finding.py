"""Find the sections of any `nn.Module`. It is run once; hooks record which module was called on whose output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, forward
from litdeploy.errors import NetworkError
from litdeploy.networks.network import Network
from litdeploy.networks.registry import FAMILIES
from litdeploy.networks.sections import Section, children_of, recording, whole

# Attributes of a block, or of a module in it, by which blocks with the same parameters differ.
_KINDS = ("attention_type", "layer_type", "block_type", "sliding_window", "is_sliding", "shift_size")

_ORDER = "its modules do not run once each in order"
_CHAIN = "its modules do not each run on the output of the one before"
_SHAPES = "its modules have different output shapes"
_ALIKE = "its modules are not built alike"
# Why modules are no section → what would make them one.
_REMEDIES = {
    "its modules were not run": "call them in forward, or remove them",
    _ORDER: "call each of them once, in order",
    "its modules do not pass on tensors": "let each take and return a tensor, or return a tuple that starts with one",
    _CHAIN: "let each run on the very output of the one before; move what is done in between into the blocks",
    _SHAPES: "at least two modules in a row with one output shape, of one class",
    _ALIKE: "at least two modules in a row of one class, with parameters of the same names and shapes",
    "its modules have no parameters": "none: there is nothing to train in them",
    "they return tuples": "let them return tensors, or put them into an nn.ModuleList",
}


@dataclass(frozen=True)
class Candidate:
    """Modules that are no section.

    Attributes:
        name: of their container, or of the modules: `stage.b1+b2`.
        blocks: how many they are.
        reason: why they are none.
        remedy: what would make them one.
    """

    name: str
    blocks: int
    reason: str
    remedy: str


@dataclass(frozen=True)
class _Call:
    """One call of a module: its name in its parent, its first argument, and what it returned."""

    name: str
    module: nn.Module
    input: Any
    result: Any

    @property
    def output(self) -> Any:
        """The result, or its first element if it is a tuple."""
        return self.result[0] if isinstance(self.result, tuple | list) and self.result else self.result


def find_sections(module: nn.Module, example: Batch) -> list[Section]:
    """Find the sections of a network by running it once.

    A section is a run of at least two blocks that run once each, each on the output of the one before; that all have
    the same output shape (the first may have another input shape: it downsamples); and that are built alike from the
    second on (same class, same parameter names and shapes), with parameters. It is a whole `nn.Sequential` or
    `nn.ModuleList`, a part of one, or modules in none. If containers are nested, the outermost one counts.

    Args:
        module: any network.
        example: the batch to run it on.

    Raises:
        NetworkError: there are none; the message says what was looked for and what came nearest.
    """
    sections, candidates = survey(module, example)
    if not sections:
        looked = "\n".join(f"  {each.name}: {each.reason}" for each in candidates[:6])
        raise NetworkError(
            "the network has no repeated blocks to leave out. Looked for modules in an nn.Sequential or nn.ModuleList, "
            "or next to each other, that are built alike, run in order and all have the same output shape; found:\n"
            + (looked or "  it has no nn.Sequential or nn.ModuleList of two or more modules at all.")
        )
    return sections


def survey(module: nn.Module, example: Batch) -> tuple[list[Section], list[Candidate]]:
    """The sections of a network in its order, and the modules that are none, with the reason. See `find_sections`."""
    places = dict(module.named_modules())
    calls = _calls(module, example)
    containers = [
        name for name, each in places.items() if isinstance(each, nn.Sequential | nn.ModuleList) and len(each) > 1
    ]
    sections: list[Section] = []
    for name in containers:
        if not _meets(name, sections) and _why_not(list(places[name].children()), calls[name]) is None:
            sections.append(_section(name, children_of(name, places[name]), calls[name]))
    for name in containers:
        if not _meets(name, sections):
            sections += _parts(name, places[name], calls[name])
    for name in calls:
        if name not in containers:
            sections += [
                each for each in _beside(name, calls[name]) if not any(_meets(path, sections) for path in each.paths)
            ]
    candidates = []
    for name in calls:
        if name not in containers:
            groups = _groups(name, places[name], calls[name])
        elif len(places[name]) > 1:
            groups = {name or "(the network itself)": list(places[name].named_children())}
        for title, children in groups.items():
            if any(_meets(f"{name}.{child}".removeprefix("."), sections) for child, _ in children):
                continue
            named = {child for child, _ in children}
            ran = [call for call in calls[name] if call.name in named]
            reason = _why_not([block for _, block in children], ran) or "they return tuples"
            remedy = _REMEDIES.get(reason) or _REMEDIES[_ALIKE]
            candidates.append(Candidate(title, len(children), reason, remedy))
    order = {name: number for number, name in enumerate(places)}
    return sorted(sections, key=lambda section: order[section.paths[0]]), candidates


def _meets(name: str, sections: Sequence[Section]) -> bool:
    """Whether a module contains a section's block, or is in one."""
    inside = f"{name}." if name else ""
    return any(
        path == name or path.startswith(inside) or name.startswith(f"{path}.")
        for each in sections
        for path in each.paths
    )


def _parts(name: str, modules: nn.Module, calls: Sequence[_Call]) -> list[Section]:
    """Sections of a part of a container."""
    children = [child for child, _ in modules.named_children()]
    found = []
    for run in _runs(calls):
        start = children.index(run[0].name)
        stop = start + len(run)
        if children[start:stop] == [call.name for call in run]:
            paths = children_of(name, modules)[start:stop]
            found.append(replace(_section(f"{name}[{start}:{stop}]", paths, run), among=len(children)))
    return found


def _beside(name: str, calls: Sequence[_Call]) -> list[Section]:
    """Sections of modules in no container. One that is left out is replaced by a module that passes its input on, so
    they must return tensors."""
    found = []
    for run in _runs([call for call in calls if isinstance(call.result, Tensor)]):
        title = "+".join(call.name for call in run)
        paths = tuple(f"{name}.{call.name}".removeprefix(".") for call in run)
        found.append(_section(f"{name}.{title}".removeprefix("."), paths, run))
    return found


def _runs(calls: Sequence[_Call]) -> Iterator[list[_Call]]:
    """The longest runs of alike blocks, in the order of their calls. Single layers are no blocks here."""
    times = Counter(call.name for call in calls)
    run: list[_Call] = []
    for call in calls:
        block = times[call.name] == 1 and any(call.module.children()) and _passes_on(call.module, call)
        if run and not (block and _continues(run, call)):
            if len(run) > 1:
                yield run
            run = []
        if block:
            run.append(call)
    if len(run) > 1:
        yield run


def _continues(run: Sequence[_Call], call: _Call) -> bool:
    before = run[-1]
    if call.input is not before.output or type(call.module) is not type(before.module):
        return False
    if _shape(call.output) != _shape(before.output):
        return False
    # The first block may be built otherwise, as one that downsamples is. A bare container says nothing of what it is.
    lenient = len(run) == 1 and type(call.module) is not nn.Sequential
    return lenient or _signature(call.module) == _signature(before.module)


def _section(name: str, paths: tuple[str, ...], calls: Sequence[_Call]) -> Section:
    first, second = calls[0], calls[1]
    shapes = _shape(first.input), _shape(first.output)
    free = shapes[0] == shapes[1] and _signature(first.module) == _signature(second.module)
    kinds = tuple(_kind(call.module) for call in calls)
    return Section(name, paths, *shapes, free=free, kinds=kinds if len(set(kinds)) > 1 else ())


def _groups(name: str, parent: nn.Module, calls: Sequence[_Call]) -> dict[str, list[tuple[str, nn.Module]]]:
    """Two or more modules of one class next to each other."""
    ran = {call.name for call in calls}
    by_class: dict[type[nn.Module], list[tuple[str, nn.Module]]] = {}
    for child, block in parent.named_children():
        if child in ran:
            by_class.setdefault(type(block), []).append((child, block))
    return {
        f"{name}.{'+'.join(child for child, _ in group)}".removeprefix("."): group
        for group in by_class.values()
        if len(group) > 1
    }


def _calls(module: nn.Module, example: Batch) -> dict[str, list[_Call]]:
    """Parent → the calls of its children, for containers and for modules of several layers."""
    calls: dict[str, list[_Call]] = {}
    handles = []

    def hook_for(parent: str, name: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            calls[parent].append(_Call(name, child, given, output))

        return hook

    for parent, each in module.named_modules():
        contains = isinstance(each, nn.Sequential | nn.ModuleList)
        for name, child in each.named_children():
            composite = any(child.children()) and any(True for _ in child.parameters())
            if contains or (composite and not isinstance(child, nn.ModuleList)):
                calls.setdefault(parent, [])
                handles.append(child.register_forward_hook(hook_for(parent, name), with_kwargs=True))
    try:
        with _evaluating(module), torch.no_grad():
            forward(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def _why_not(blocks: Sequence[nn.Module], calls: Sequence[_Call]) -> str | None:
    """Why these modules are no section; None if they are one."""
    if not calls:
        return "its modules were not run"
    if [call.module for call in calls] != list(blocks):
        return _ORDER
    if not all(isinstance(value, Tensor) for call in calls for value in (call.input, call.output)):
        return "its modules do not pass on tensors"
    if any(before.output is not after.input for before, after in pairwise(calls)):
        return _CHAIN
    if len({_shape(call.output) for call in calls}) > 1:
        return _SHAPES
    kinds = {type(block) for block in blocks}
    if len(kinds) > 1 or len({_signature(block) for block in blocks[1:]}) > 1:
        return f"{_ALIKE} ({', '.join(sorted(kind.__name__ for kind in kinds))})"
    if not all(_passes_on(call.module, call) for call in calls):
        return "its modules have no parameters"
    return None


def _passes_on(block: nn.Module, call: _Call) -> bool:
    tensors = isinstance(call.input, Tensor) and isinstance(call.output, Tensor)
    return tensors and any(True for _ in block.parameters())


def _kind(block: nn.Module) -> str:
    """What a block is besides its class and parameters: the kind of its attention, for example."""
    own = {(name, str(getattr(part, name))) for part in block.modules() for name in _KINDS if _says(part, name)}
    return ", ".join(f"{name} {value}" for name, value in sorted(own))


def _says(part: nn.Module, name: str) -> bool:
    return isinstance(vars(part).get(name), str | int | tuple | list)


def _signature(block: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(value.shape)) for name, value in block.state_dict().items())


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape[1:])


def named_sections(module: nn.Module, names: Sequence[str], example: Batch) -> list[Section]:
    """The sections of these names that have blocks, even a single one, as a student may have.

    Args:
        module: in eval mode.
        example: the batch to run it on.

    Raises:
        NetworkError: the module has no container of one of the names.
    """
    named = [section for section in (whole(module, name) for name in names) if section.blocks]
    with torch.no_grad(), recording(module, named) as calls:
        forward(module, example)
    return [
        replace(each, input_shape=_shape(calls[each.name].input), output_shape=_shape(calls[each.name].output))
        for each in named
    ]


def sections_of(network: Network) -> list[Section]:
    """The sections that `find_sections` finds, and sections of a single block that the network's plan or family names;
    in the module's order.

    Raises:
        NetworkError: there are none.
    """
    module, example, family = network.module, network.example(), FAMILIES.get(network.spec.name)
    named = [*(network.spec.plan or ()), *(family.sections if family else ())]
    try:
        found = find_sections(module, example)
    except NetworkError:
        if not named:
            raise
        found = []
    known = {section.key for section in found}
    lacking = named_sections(module, [name for name in dict.fromkeys(named) if name not in known], example)
    # If containers are nested, the outermost one counts.
    found = [each for each in found if not any(_meets(path, lacking) for path in each.paths)]
    order = {name: number for number, (name, _) in enumerate(module.named_modules())}
    return sorted([*found, *lacking], key=lambda section: order[section.paths[0]])
