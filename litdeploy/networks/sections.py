"""Sections: runs of blocks in a network that are built alike and have the same output shape; recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from litdeploy.errors import NetworkError

# Other positional and keyword arguments of a block: an attention mask, a rotary embedding.
BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """A chain of blocks that can be shortened. A student's has the name of its teacher's and paths of its own.

    Attributes:
        name: the container in the teacher, as in `named_modules`: `layer1`, `bert.encoder.layer`; of a part of it
            `encoder.layer[0:4]`; of modules in no container `stage.b1+b2+b3`.
        paths: of its blocks, in order, in the network that it was found in.
        input_shape, output_shape: without the batch dimension.
        among: how many blocks its container has; None: no more than the section.
        free: whether the first block can be left out too: it is built as the others and keeps its input's shape.
        kinds: of each block, if they alternate (global and local attention); empty if all are alike.
        kept: for a student's, which of the teacher's blocks its blocks are copies of; None: of all.
    """

    name: str
    paths: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    among: int | None = None
    free: bool = False
    kinds: tuple[str, ...] = ()
    kept: tuple[int, ...] | None = None

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return len(self.paths)

    @property
    def least(self) -> int:
        """How many blocks a student of a given depth keeps: one of a whole container, though it may be free."""
        return 0 if self.free and self.name != self.container else 1

    @property
    def container(self) -> str | None:
        """The `nn.Sequential` or `nn.ModuleList` that its blocks are in; None if they are in none."""
        return None if "+" in self.name.rpartition(".")[2] else self.key

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

    def own(self, arguments: Sequence[BlockArguments]) -> Sequence[BlockArguments]:
        """Select, from the arguments of the teacher's blocks, those for this section's blocks."""
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
    arguments: Sequence[BlockArguments]
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


def run_section(blocks: Sequence[nn.Module], hidden: Tensor, arguments: Sequence[BlockArguments]) -> Tensor:
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
    inputs: dict[str, list[tuple[Tensor, BlockArguments]]] = {}

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


@contextmanager
def results_of(module: nn.Module, sections: Sequence[Section]) -> Iterator[dict[str, int]]:
    """Record, while open, how many elements the tuple has that each block returns: path → number, 0 for a tensor."""
    found: dict[str, int] = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[path] = len(output) if isinstance(output, tuple | list) else 0

        return hook

    with ExitStack() as hooks:
        for path in (path for section in sections for path in section.paths):
            hooks.callback(module.get_submodule(path).register_forward_hook(hook_for(path)).remove)
        yield found


class LastBlock(Exception):
    """A forward pass has come to the last block of the sections, and ends there."""


@contextmanager
def passing_on(
    module: nn.Module, sections: Sequence[Section], results: Mapping[str, int]
) -> Iterator[dict[str, list[BlockArguments]]]:
    """Record, while open, the further arguments of each section's blocks, which pass their input on instead of running.

    A forward pass raises `LastBlock` after the last one.

    Args:
        results: see `results_of`.
    """
    found: dict[str, list[BlockArguments]] = {section.name: [] for section in sections}
    blocks = sum(section.blocks for section in sections)

    def forward_for(name: str, path: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, others = _split_arguments(args, kwargs)
            found[name].append(others)
            if sum(map(len, found.values())) == blocks:
                raise LastBlock
            return (hidden, *[None] * (results[path] - 1)) if results[path] else hidden

        return forward

    with ExitStack() as restored:
        for section in sections:
            for path, block in zip(section.paths, section.blocks_in(module), strict=True):
                block.forward = forward_for(section.name, path)
                restored.callback(delattr, block, "forward")
        yield found


def _split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockArguments]:
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


def whole(module: nn.Module, name: str) -> Section:
    """The section that a plan calls so: all blocks of a container, or modules in none without those left out. The
    module is not run, and the shapes are not known.

    Raises:
        NetworkError: the module has no such container or modules.
    """
    if "+" not in name.rpartition(".")[2]:
        return Section(name, children_of(name, container(module, name)), (), ())
    section = Section(name, siblings(name), (), ())
    kept = [not isinstance(block, PassThrough) for block in section.blocks_in(module)]
    return replace(section, paths=tuple(path for path, there in zip(section.paths, kept, strict=True) if there))


def siblings(name: str) -> tuple[str, ...]:
    """Paths of the modules in a section that is in no container.

    >>> siblings("stage.b1+b2")
    ('stage.b1', 'stage.b2')
    """
    parent, dot, children = name.rpartition(".")
    return tuple(f"{parent}{dot}{child}" for child in children.split("+"))


def children_of(name: str, container: nn.Module) -> tuple[str, ...]:
    """Paths of a container's blocks."""
    return tuple(f"{name}.{child}".removeprefix(".") for child, _ in container.named_children())


class PassThrough(nn.Module):
    """In the place of a block that is left out and is in no container: returns its first argument."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden
