"""Sections: runs of blocks in a network that are built alike and have the same output shape. Found in any `nn.Module`.

The module is run once; hooks record the input and the output of each child of each `nn.Sequential` and `nn.ModuleList`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, forward
from litdeploy.errors import NetworkError
from litdeploy.networks.network import Network
from litdeploy.networks.registry import FAMILIES

# Other positional and keyword arguments of a block: an attention mask, a rotary embedding.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """A chain of blocks that can be shortened. A student's has the name of its teacher's and paths of its own.

    Attributes:
        name: the container in the teacher, as in `named_modules`: `layer1`, `bert.encoder.layer`.
        paths: of its blocks, in order, in the network that it was found in.
        input_shape, output_shape: without the batch dimension.
        among: how many blocks its container has; None: no more than the section.
        kept: for a student's, which of the teacher's blocks its blocks are copies of; None: of all.
    """

    name: str
    paths: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    among: int | None = None
    kept: tuple[int, ...] | None = None

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return len(self.paths)

    @property
    def key(self) -> str:
        """What a `DepthPlan` calls it: the container's name if its blocks are in one, or else its own."""
        return self.name.rpartition("[")[0] if self.name.endswith("]") else self.name

    @property
    def start(self) -> int:
        """What a `DepthPlan` calls its first block."""
        return int(self.name.rpartition("[")[2].partition(":")[0]) if self.name.endswith("]") else 0

    def blocks_in(self, module: nn.Module) -> list[nn.Module]:
        """Its blocks in a network.

        Raises:
            NetworkError: the network has no block of one of the paths.
        """
        try:
            return [module.get_submodule(path) for path in self.paths]
        except AttributeError as error:
            raise NetworkError(f"the network has no section '{self.name}': {error}.") from None

    def own(self, arguments: Sequence[Arguments]) -> Sequence[Arguments]:
        """Of the arguments of the teacher's blocks, those for this section's blocks."""
        return arguments if self.kept is None else [arguments[index] for index in self.kept]


@dataclass
class SectionCall:
    """Input and output of a section in one forward pass of its network.

    Attributes:
        input: the first block's first argument.
        arguments: of each block, all but the first, for replay. They differ if layers alternate: ModernBERT changes its
            mask and rotary embedding from layer to layer.
        output: the last block's output; if a block returns a tuple, its first element.
    """

    input: Tensor
    arguments: Sequence[Arguments]
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


def run_section(blocks: Sequence[nn.Module], hidden: Tensor, arguments: Sequence[Arguments]) -> Tensor:
    """Run blocks one after the other, each with its own other arguments."""
    for block, (args, kwargs) in zip(blocks, arguments, strict=True):
        hidden = hidden_of(block(hidden, *args, **kwargs))
    return hidden


@contextmanager
def recording(module: nn.Module, sections: Sequence[Section]) -> Iterator[dict[str, SectionCall]]:
    """Record, while open, each forward pass of `module`: a `SectionCall` for each section with blocks, by name.

    Caches of keys and values are off meanwhile: a replayed block would add to them.
    """
    calls: dict[str, SectionCall] = {}
    inputs: dict[str, list[tuple[Tensor, Arguments]]] = {}

    def on_input(name: str, first: bool) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if first:
                inputs[name] = []
            inputs[name].append(_split_arguments(args, kwargs))

        return hook

    def on_output(name: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = inputs[name][0][0]
            calls[name] = SectionCall(hidden, [arguments for _, arguments in inputs[name]], hidden_of(output))

        return hook

    with without_caches(module), ExitStack() as hooks:
        for section in sections:
            blocks = section.blocks_in(module)
            for block in blocks:
                before = on_input(section.name, first=block is blocks[0])
                hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            for block in blocks[-1:]:
                hooks.callback(block.register_forward_hook(on_output(section.name)).remove)
        yield calls


@contextmanager
def without_caches(module: nn.Module) -> Iterator[None]:
    """Switch off, while open, caches of keys and values, which the configurations of transformers' decoders ask for."""
    configs = {id(config): config for each in module.modules() if (config := getattr(each, "config", None)) is not None}
    with ExitStack() as restored:
        for config in configs.values():
            if getattr(config, "use_cache", False) is True:
                config.use_cache = False
                restored.callback(setattr, config, "use_cache", True)
        yield


def _split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """The hidden state, which must be the first positional argument, and the other arguments, without caches.

    Raises:
        NetworkError: the block takes the hidden state by keyword.
    """
    if args:
        return args[0], (
            tuple(None if _is_cache(value) else value for value in args[1:]),
            {name: None if _is_cache(value) else value for name, value in kwargs.items()},
        )
    raise NetworkError("a block takes its hidden state by keyword; it must be the first positional argument.")


def _is_cache(value: Any) -> bool:
    """Whether it is transformers' cache of keys and values, recognized without importing transformers."""
    return any(kind.__name__ == "Cache" for kind in type(value).__mro__)


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
            paths = children_of(name, trace.container)
            sections.append(Section(name, paths, _shape(trace.inputs[0]), _shape(trace.outputs[0])))
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
    named = [whole(module, name) for name in names]
    with torch.no_grad(), recording(module, named) as calls:
        forward(module, example)
    return [
        replace(each, input_shape=_shape(calls[each.name].input), output_shape=_shape(calls[each.name].output))
        for each in named
    ]


def whole(module: nn.Module, name: str) -> Section:
    """All blocks of the container of this name, as a section; the module is not run, and the shapes are not known.

    Raises:
        NetworkError: the module has no such container.
    """
    return Section(name, children_of(name, container(module, name)), (), ())


def children_of(name: str, container: nn.Module) -> tuple[str, ...]:
    """Paths of a container's blocks."""
    return tuple(f"{name}.{child}".removeprefix(".") for child, _ in container.named_children())


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
