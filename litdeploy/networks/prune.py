"""Network slimming's surgery: channels with small batch norm scales are taken out of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from litdeploy.batch import Batch, forward
from litdeploy.errors import StudentError
from litdeploy.networks.network import logits_of


@dataclass(frozen=True)
class Slimmed:
    """What was taken out.

    Attributes:
        channels: that could have been, those that are added up or normalised together counted once.
        removed: of them.
        fixed: names of the layers whose channels could not be: something that is not followed uses them.
    """

    channels: int
    removed: int
    fixed: tuple[str, ...]


@dataclass(frozen=True)
class _Coupled:
    """Channels that can only be removed together: a layer's with all that adds to, normalises or reads them.

    Attributes:
        layer: whose output channels they are.
        scales: (channels), the mean of |γ| over the batch norms on them.
    """

    layer: nn.Module
    scales: Tensor


def scales_of(module: nn.Module) -> list[nn.Parameter]:
    """γ of every batch norm, in the network's order.

    Raises:
        StudentError: there is none.
    """
    found = [part.weight for part in module.modules() if isinstance(part, _BatchNorm) and part.weight is not None]
    if not found:
        raise StudentError(
            "--method slimming removes channels by the scales of their batch norms, and the network has none. Choose "
            "another method: --method lit"
        )
    return found


def slim(module: nn.Module, example: Batch, ratio: float) -> Slimmed:
    """Takes the share `ratio` of the channels out, in place: those of the smallest scales in the whole network (Liu et
    al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017). Each layer keeps one.

    torch-pruning follows channels through the network, residual additions and concatenations too, and cuts the layers.
    Where a layer with other channels adds to them (zeros padded for the missing ones), or one is in groups, they stay.

    Args:
        module: put in eval mode; its parameters need gradients.
        example: what it takes.

    Raises:
        StudentError: no channels can be removed.
    """
    graph = _graph(module, example)
    names = {part: name for name, part in module.named_modules()}
    coupled: list[_Coupled] = []
    fixed: list[str] = []
    for group in graph.get_all_groups(root_module_types=(_ConvNd, nn.Linear)):
        scales = _scales(group)
        if scales is not None and _can_be_cut(group, graph):
            coupled.append(_Coupled(group[0].dep.target.module, scales))
        elif scales is not None:
            fixed.append(names[group[0].dep.target.module])
    if not coupled:
        raise StudentError(
            "--method slimming: no layer of the network has channels that can be removed"
            + (f" ({', '.join(fixed)}: their channels are padded, or in groups)" if fixed else "")
            + ". Choose another method: --method lit"
        )
    whole = torch.cat([each.scales for each in coupled])
    # By rank and not by value: of equal scales no more go than are asked for.
    doomed = torch.zeros(len(whole), dtype=torch.bool)
    doomed[whole.argsort(stable=True)[: int(ratio * len(whole))]] = True
    removed = 0
    for each, goes in zip(coupled, torch.split(doomed, [len(each.scales) for each in coupled]), strict=True):
        if goes.all():
            goes = goes.index_fill(0, each.scales.argmax(), False)
        indices = goes.nonzero()[:, 0].tolist()
        if indices:
            pruner = graph.get_pruner_of_module(each.layer).prune_out_channels
            graph.get_pruning_group(each.layer, pruner, indices).prune()
        removed += len(indices)
    return Slimmed(len(whole), removed, tuple(fixed))


def _graph(module: nn.Module, example: Batch) -> Any:
    import torch_pruning

    with torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(
            module, example, forward_fn=forward, output_transform=logits_of, verbose=False
        )


def _can_be_cut(group: Any, graph: Any) -> bool:
    """Whether what is left is the network without those channels, and can be written down as sizes of its layers."""
    for dep, indices in group:
        layer, outputs = dep.target.module, graph.is_out_channel_pruning_fn(dep.handler)
        if outputs and not dep.target.outputs:
            return False  # they are the network's own output
        if isinstance(layer, _ConvNd):
            depthwise = layer.groups == layer.out_channels == layer.in_channels
            if layer.transposed or (layer.groups > 1 and not depthwise):
                return False
            if outputs and layer.out_channels != len(indices):
                return False  # a layer with other channels adds to them
        elif isinstance(layer, nn.Linear):
            if outputs and layer.out_features != len(indices):
                return False
        elif not isinstance(layer, nn.Module):
            return False  # a parameter of no layer
        elif any(True for _ in layer.parameters()) and not isinstance(layer, _BatchNorm):
            return False
    return True


def _scales(group: Any) -> Tensor | None:
    """|γ| of each of the group's channels, on the CPU; None where no batch norm is on them."""
    found = []
    for item in group:
        norm = item.dep.target.module
        if isinstance(norm, _BatchNorm) and norm.weight is not None:
            own = torch.zeros(len(group[0].idxs))
            own[list(item.root_idxs)] = norm.weight.detach().float().abs().cpu()[list(item.idxs)]
            found.append(own)
    return torch.stack(found).mean(0) if found else None
