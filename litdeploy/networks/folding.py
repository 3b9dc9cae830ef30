"""Batch norms of a network in eval mode, folded into the convolutions and linear layers before them."""

from __future__ import annotations

import copy
from collections import Counter
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

_Producer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def folded(network: Network) -> nn.Module:
    """A copy of a network's module for inference: in eval mode, without gradients, its batch norms folded."""
    module = copy.deepcopy(network.module).eval().requires_grad_(False)
    fold_batch_norms(module, network.example())
    return module


def fold_batch_norms(module: nn.Module, example: Batch, sections: Sequence[str] = ()) -> int:
    """Folds, in place, each batch norm that a convolution or a linear layer alone feeds, and leaves an identity there.

    The module is run once to see who feeds whom, so that nothing need be known of how it is written. A layer whose
    output something else reads too, or that runs more than once, stays as it is.

    Args:
        module: in eval mode; any network.
        example: what it is run on.
        sections: names of containers whose outputs must stay what they are: nothing is folded across their borders.

    Returns:
        How many batch norms were folded.
    """
    pairs = [
        (producer, norm)
        for producer, norm in _pairs(module, example)
        if all(producer.startswith(f"{name}.") == norm.startswith(f"{name}.") for name in sections)
    ]
    for producer_name, norm_name in pairs:
        producer, norm = module.get_submodule(producer_name), module.get_submodule(norm_name)
        assert isinstance(norm, _BatchNorm)
        if isinstance(producer, nn.Linear):
            folded: nn.Module = fuse_linear_bn_eval(producer, norm)
        else:
            assert isinstance(producer, _ConvNd)
            folded = fuse_conv_bn_eval(producer, norm)
        module.set_submodule(producer_name, folded)
        module.set_submodule(norm_name, nn.Identity())
    return len(pairs)


def _pairs(module: nn.Module, example: Batch) -> list[tuple[str, str]]:
    """(producer, batch norm) by name, for each pair that can be folded."""
    producers: dict[int, str] = {}  # id of an output → who made it
    norms: list[tuple[int, str]] = []  # (id of the input, batch norm)
    runs: Counter[str] = Counter()
    alive: list[Tensor] = []  # an id is a tensor's only while the tensor lives

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
    """Counts how many operations read each tensor. One that gives no tensor (`x.dim()`) reads its shape only."""

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
