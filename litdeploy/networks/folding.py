"""Fold the batch norms of a network in eval mode into the convolutions and linear layers before them."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode

from litdeploy.batch import Batch, forward
from litdeploy.networks.network import Network
from litdeploy.networks.sections import Section

_Producer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
# Relative to the largest value. Float32 in another order differs by 1e-6, another function by far more.
_SAME = 1e-3


def folded(network: Network) -> nn.Module:
    """Copy a network's module for inference: in eval mode, without gradients, with batch norms folded."""
    module = copy.deepcopy(network.module).eval().requires_grad_(False)
    fold_batch_norms(module, network.example())
    return module


def fold_batch_norms(module: nn.Module, example: Batch, sections: Sequence[Section] = ()) -> int:
    """Fold, in place, each batch norm whose only input is a convolution or a linear layer; its `tail` stays.

    The module is run to trace which layer feeds which, and to check that the fused layer computes the same; so any
    module works, however it is written. A layer is left unchanged if another operation reads its output too, if it
    runs more than once, or if it computes something other than torch's own layer does.

    Args:
        module: in eval mode; any network.
        example: the batch to run it on.
        sections: whose outputs must not change: nothing is folded across the borders of their blocks.

    Returns:
        The number of batch norms folded.
    """
    pairs = [
        (producer, norm)
        for producer, norm in _pairs(module, example)
        if all(_is_inside(producer, section) == _is_inside(norm, section) for section in sections)
    ]
    if not pairs:
        return 0
    fused = {pair: _fuse(module, *pair) for pair in pairs}
    same = _computing_the_same(module, example, fused)
    for producer, norm in same:
        after = tail(module.get_submodule(norm))
        module.set_submodule(producer, fused[producer, norm])
        module.set_submodule(norm, after if len(after) else nn.Identity())
    return len(same)


def _is_inside(name: str, section: Section) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in section.paths)


def tail(norm: nn.Module) -> nn.Sequential:
    """The modules that a batch norm runs after normalizing: none, or those of another library's subclass, such as the
    activation in timm's `BatchNormAct2d`. In order, under their names, not copied."""
    return nn.Sequential(OrderedDict(norm.named_children()))


def _fuse(module: nn.Module, producer_name: str, norm_name: str) -> nn.Module:
    """A copy of the producer with the batch norm folded in."""
    producer, norm = module.get_submodule(producer_name), module.get_submodule(norm_name)
    assert isinstance(norm, _BatchNorm)
    if isinstance(producer, nn.Linear):
        return fuse_linear_bn_eval(producer, norm)
    assert isinstance(producer, _ConvNd)
    return fuse_conv_bn_eval(producer, norm)


def _computing_the_same(
    module: nn.Module, example: Batch, fused: dict[tuple[str, str], nn.Module]
) -> list[tuple[str, str]]:
    """The pairs whose fused layer, with the tail, computes the same as the two layers.

    A subclass may have another forward: convolutions that standardize their weights, norms with an activation.
    """
    expected: dict[str, Tensor] = {}  # name of a batch norm → output of the fused layer in its place
    same = []

    def at_producer(pair: tuple[str, str]) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # Run here, because later operations may overwrite the input.
            expected[pair[1]] = tail(module.get_submodule(pair[1]))(fused[pair](args[0]))

        return hook

    def at_norm(pair: tuple[str, str]) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found = expected.pop(pair[1])
            if found.shape == output.shape and (found - output).abs().max() <= _SAME * output.abs().max():
                same.append(pair)

        return hook

    handles = []
    for pair in fused:
        handles.append(module.get_submodule(pair[0]).register_forward_hook(at_producer(pair)))
        handles.append(module.get_submodule(pair[1]).register_forward_hook(at_norm(pair)))
    try:
        with torch.no_grad():
            forward(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return same


def _pairs(module: nn.Module, example: Batch) -> list[tuple[str, str]]:
    """(producer, batch norm) by name, for each pair that can be folded."""
    producers: dict[int, str] = {}  # id of an output → the layer that made it
    norms: list[tuple[int, str]] = []  # (id of the input, batch norm)
    runs: Counter[str] = Counter()
    alive: list[Tensor] = []  # ids are unique only while the tensors live

    def hook_for(name: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            runs[name] += 1
            alive.extend((args[0], output))
            if isinstance(child, _BatchNorm):
                norms.append((id(args[0]), name))
            else:
                producers[id(output)] = name

        return hook

    handles = [
        child.register_forward_hook(hook_for(name))
        for name, child in module.named_modules()
        if isinstance(child, _Producer) or (isinstance(child, _BatchNorm) and child.running_mean is not None)
    ]
    try:
        with torch.no_grad(), _Readers() as readers:
            forward(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (producers[source], norm)
        for source, norm in norms
        if source in producers and readers.count[source] == 1 and runs[producers[source]] == runs[norm] == 1
    ]


class _Readers(TorchFunctionMode):
    """Count the operations that read each tensor. One that returns no tensor (`x.dim()`) reads only the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self._alive: list[Tensor] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple | list):
            read = list(_tensors((*args, *(kwargs or {}).values())))
            self.count.update({id(tensor) for tensor in read})
            self._alive.extend(read)
        return result


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
