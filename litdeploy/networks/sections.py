"""Sections: runs of blocks in a network that are built alike and have the same output shape. Found in any `nn.Module`.

The module is run once; hooks record the input and the output of each child of each `nn.Sequential` and `nn.ModuleList`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, forward
from litdeploy.errors import NetworkError
from litdeploy.networks.network import Network
from litdeploy.networks.registry import FAMILIES


@dataclass(frozen=True)
class Section:
    """A chain of blocks that can be shortened.

    Attributes:
        name: of the container, as in `named_modules`: `layer1`, `bert.encoder.layer`.
        blocks: how many blocks it has.
        input_shape, output_shape: without the batch dimension.
    """

    name: str
    blocks: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass
class SectionCall:
    """Input and output of a section in one forward pass of its network.

    Attributes:
        input: the first block's first argument.
        arguments: the other positional and keyword arguments of the first block (an attention mask, for example), for
            replay.
        output: the last block's output; if a block returns a tuple, its first element.
    """

    input: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    output: Tensor


def container(module: nn.Module, name: str) -> nn.Sequential | nn.ModuleList:
    """The container of this name.

    Raises:
        NetworkError: the module has none.
    """
    try:
        found = module.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Sequential | nn.ModuleList):
        raise NetworkError(f"the network has no section '{name}' (an nn.Sequential or nn.ModuleList of that name).")
    return found


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a block's output: the output itself, or the first element of a tuple."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise NetworkError(
            f"a block returns a {type(hidden).__name__}; a tensor, or a tuple that starts with one, is needed."
        )
    return hidden


def run_section(
    blocks: Sequence[nn.Module], hidden: Tensor, arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> Tensor:
    """Run blocks one after the other, each with the other arguments that were recorded."""
    args, kwargs = arguments
    for block in blocks:
        hidden = hidden_of(block(hidden, *args, **kwargs))
    return hidden


@contextmanager
def recording(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, SectionCall]]:
    """Record, while open, each forward pass of `module`: a `SectionCall` for each section, by name."""
    calls: dict[str, SectionCall] = {}
    inputs: dict[str, tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    handles = []

    def on_input(name: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest, named = _split_arguments(args, kwargs)
            inputs[name] = (hidden, (rest, named))

        return hook

    def on_output(name: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden, arguments = inputs[name]
            calls[name] = SectionCall(hidden, arguments, hidden_of(output))

        return hook

    for name in names:
        blocks = container(module, name)
        handles.append(blocks[0].register_forward_pre_hook(on_input(name), with_kwargs=True))
        handles.append(blocks[-1].register_forward_hook(on_output(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden state, which must be the first positional argument, and the other arguments.

    Raises:
        NetworkError: the block takes the hidden state by keyword.
    """
    if args:
        return args[0], args[1:], dict(kwargs)
    raise NetworkError("a block takes its hidden state by keyword; it must be the first positional argument.")


@dataclass
class _Trace:
    """Calls of one container's children, in order."""

    container: nn.Sequential | nn.ModuleList
    order: list[int] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


def find_sections(module: nn.Module, example: Batch) -> list[Section]:
    """Find the sections of a network by running it once.

    A section is an `nn.Sequential` or `nn.ModuleList` of at least two blocks that run once each, in order, each on the
    output of the one before; that all have the same output shape (the first may have another input shape: it
    downsamples); and that are built alike from the second on (same class, same parameter names and shapes), with
    parameters. If containers are nested, the outermost one counts.

    Args:
        module: any network.
        example: the batch to run it on.

    Raises:
        NetworkError: there are none; the message says what was looked for and what came nearest.
    """
    candidates = {
        name: _Trace(child)
        for name, child in module.named_modules()
        if isinstance(child, nn.Sequential | nn.ModuleList) and len(child) >= 2
    }
    _run_traced(module, candidates, example)
    sections: list[Section] = []
    reasons: list[str] = []
    for name, trace in candidates.items():
        if any(name.startswith(f"{found.name}.") for found in sections):
            continue
        reason = _why_not(trace)
        if reason is None:
            sections.append(Section(name, len(trace.container), _shape(trace.inputs[0]), _shape(trace.outputs[0])))
        else:
            reasons.append(f"  {name or '(the network itself)'}: {reason}")
    if not sections:
        looked = "\n".join(reasons[:6]) or "  it has no nn.Sequential or nn.ModuleList of two or more modules at all."
        raise NetworkError(
            "the network has no repeated blocks to leave out. Looked for an nn.Sequential or nn.ModuleList whose "
            f"blocks are built alike, run in order and all have the same output shape; found:\n{looked}"
        )
    return sections


def named_sections(module: nn.Module, names: Sequence[str], example: Batch) -> list[Section]:
    """The sections of these names, even of a single block, as a student may have.

    Args:
        module: in eval mode.
        example: the batch to run it on.

    Raises:
        NetworkError: the module has no container of one of the names.
    """
    with torch.no_grad(), recording(module, names) as calls:
        forward(module, example)
    return [
        Section(name, len(container(module, name)), _shape(calls[name].input), _shape(calls[name].output))
        for name in names
    ]


def _run_traced(module: nn.Module, candidates: dict[str, _Trace], example: Batch) -> None:
    handles = []

    def hook_for(trace: _Trace, index: int) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            trace.order.append(index)
            trace.inputs.append(args[0] if args else next(iter(kwargs.values()), None))
            trace.outputs.append(output[0] if isinstance(output, tuple | list) and output else output)

        return hook

    for trace in candidates.values():
        for index, child in enumerate(trace.container):
            handles.append(child.register_forward_hook(hook_for(trace, index), with_kwargs=True))
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            forward(module, example)
    finally:
        for handle in handles:
            handle.remove()
        for child, mode in modes.items():
            child.training = mode


def _why_not(trace: _Trace) -> str | None:
    """Why the container is not a section; None if it is one."""
    if not trace.order:
        return "its modules were not run"
    if trace.order != list(range(len(trace.container))):
        return "its modules do not run once each in order"
    if not all(isinstance(value, Tensor) for value in (*trace.inputs, *trace.outputs)):
        return "its modules do not pass on tensors"
    if any(before is not after for before, after in zip(trace.outputs, trace.inputs[1:], strict=False)):
        return "its modules do not each run on the output of the one before"
    if len({_shape(output) for output in trace.outputs}) > 1:
        return "its modules have different output shapes"
    signatures = {_signature(block) for block in list(trace.container)[1:]}
    kinds = {type(block) for block in trace.container}
    if len(kinds) > 1 or len(signatures) > 1:
        return f"its modules are not built alike ({', '.join(sorted(kind.__name__ for kind in kinds))})"
    if not all(any(True for _ in block.parameters()) for block in trace.container):
        return "its modules have no parameters"
    return None


def _signature(block: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(value.shape)) for name, value in block.state_dict().items())


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape[1:])


def sections_of(network: Network) -> list[Section]:
    """The sections that `find_sections` finds, and sections of a single block that the network's plan or family names;
    in the module's order.

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
    # If containers are nested, the outermost one counts.
    inside = tuple(f"{name}." for name in named)
    named |= {section.name for section in found if not section.name.startswith(inside)}
    return named_sections(module, [name for name, _ in module.named_modules() if name in named], example)
