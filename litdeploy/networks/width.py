"""Width: narrower students.

A narrower student of its own learns from channels of the teacher's sections (`match_sections`). Network slimming
removes channels with small batch norm scales (`slim`). A network that was narrowed is rebuilt from its layers' shapes
(`widths_of`, `narrow`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from litdeploy.batch import Batch, forward
from litdeploy.errors import NetworkError, StudentError
from litdeploy.networks.finding import find_sections
from litdeploy.networks.network import Network
from litdeploy.networks.output import answer_of
from litdeploy.networks.sections import Section, recording
from litdeploy.networks.student import own_sections


@dataclass(frozen=True)
class Match:
    """A section of a student, and the teacher's section that it learns from.

    Attributes:
        student, teacher: names of the two sections.
        dim: the dimension of the channels, counting the batch's.
        channels: indices of the teacher's channels that are kept, int64, ascending; None: all.
    """

    student: str
    teacher: str
    dim: int
    channels: Tensor | None


def match_sections(teacher: Network, student: Network) -> list[Match]:
    """Match the sections of two networks, by name or else in order.

    If the student's section is narrower, the channels with the largest L1 norm of their filters are kept: the filters
    of the convolution or linear layer that runs last in the teacher's section. Pruning that layer selects channels of
    the section's output and changes nothing before it, so the teacher's module itself is not changed.

    Raises:
        NetworkError: the teacher has no sections.
        StudentError: the student's sections do not match, or outputs differ in more than the number of channels.
    """
    sections = find_sections(teacher.module, teacher.example())
    own = _counterparts(sections, student)
    training = student.module.training
    with torch.no_grad(), recording(student.module, own) as calls:
        forward(student.module.eval(), student.example())
    student.module.train(training)
    return [
        _match(teacher, section, each.name, tuple(calls[each.name].output.shape[1:]))
        for section, each in zip(sections, own, strict=True)
    ]


def _counterparts(sections: list[Section], student: Network) -> list[Section]:
    """The student's sections of the same names; if it lacks one, its sections in order."""
    try:
        return own_sections(student.module, sections, None)
    except NetworkError:
        pass
    try:
        found = find_sections(student.module, student.example())
    except NetworkError:
        found = []
    if len(found) != len(sections):
        names = ", ".join(section.name for section in found) or "none"
        raise StudentError(
            f"the student {student.source} has {len(found)} sections ({names}), and the teacher "
            f"{len(sections)} ({', '.join(section.name for section in sections)}). Name a student with as many: "
            "--student-network resnet20,width=8"
        )
    return found


def _match(teacher: Network, section: Section, name: str, shape: tuple[int, ...]) -> Match:
    wide = section.output_shape
    differing = [dim for dim, (ours, theirs) in enumerate(zip(shape, wide, strict=False)) if ours != theirs]
    if len(shape) != len(wide) or len(differing) > 1 or any(shape[dim] > wide[dim] for dim in differing):
        raise StudentError(
            f"section '{name}' of the student has outputs {shape}, and the teacher's '{section.name}' {wide}: they may "
            "differ only in the number of channels, and the student may have fewer. Name another student with "
            "--student-network"
        )
    if not differing:
        return Match(name, section.name, 1, None)
    (dim,) = differing
    norms = _last_weight(teacher, section).abs().flatten(1).sum(1)
    if len(norms) != wide[dim]:
        raise StudentError(
            f"the teacher's section '{section.name}' gives {wide[dim]} channels, and its last layer has {len(norms)} "
            f"filters, so the filters of a channel are not known. Name a student as wide as the teacher with "
            "--student-network, or choose another method: --method kd"
        )
    return Match(name, section.name, dim + 1, norms.topk(shape[dim]).indices.sort().values)


def _last_weight(network: Network, section: Section) -> Tensor:
    """Weight of the convolution or linear layer that runs last in a section; empty if there is none."""
    ran: list[Tensor] = [torch.empty(0, 0)]

    def hook(layer: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(layer.weight, Tensor)
        ran.append(layer.weight.detach())

    blocks = nn.ModuleList(section.blocks_in(network.module))
    layers = [layer for layer in blocks.modules() if isinstance(layer, _ConvNd | nn.Linear)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        with torch.no_grad():
            forward(network.module, network.example())
    finally:
        for handle in handles:
            handle.remove()
    return ran[-1]


def widths_of(module: nn.Module, wide: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The argument with which `narrow` makes this module: layer → shape of its weight, for layers that changed.

    Args:
        wide: name → shape in the state dict before.
    """
    now = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    changed = [name for name, shape in now.items() if shape != wide[name]]
    return {name.removesuffix(".weight"): now[name] for name in changed if name.endswith(".weight")}


def narrow(module: nn.Module, widths: Mapping[str, tuple[int, ...]]) -> None:
    """Narrow layers in place to weights of these shapes; their values are meaningless until weights are loaded.

    Raises:
        NetworkError: the module has no layer of a name, or a narrower one.
    """
    layers = dict(module.named_modules())
    for name, shape in widths.items():
        layer = layers.get(name)
        weight = layer.weight if isinstance(layer, _ConvNd | nn.Linear | _BatchNorm) else None
        if isinstance(layer, _ConvNd) and layer.transposed:
            weight = None
        found = () if weight is None else tuple(weight.shape)
        fits = len(shape) == len(found) and all(1 <= size <= whole for size, whole in zip(shape, found, strict=True))
        if not found or not fits or shape[2:] != found[2:]:  # the kernel size does not change
            raise NetworkError(
                f"layer '{name}' cannot have a weight of shape {shape}: the network "
                + (f"has one of {found} there." if found else "has no such layer with a weight that can be narrowed.")
            )
        _narrow_layer(layer, shape)


def _narrow_layer(layer: Any, shape: tuple[int, ...]) -> None:
    layer.weight = nn.Parameter(layer.weight.detach()[tuple(slice(size) for size in shape)].clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[: shape[0]].clone())
    if isinstance(layer, _ConvNd):
        # In a depthwise convolution a group is a channel.
        layer.groups = shape[0] if layer.groups == layer.out_channels > 1 else layer.groups
        layer.out_channels, layer.in_channels = shape[0], shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    else:
        layer.num_features = shape[0]
        for statistic in ("running_mean", "running_var"):
            if getattr(layer, statistic) is not None:
                setattr(layer, statistic, getattr(layer, statistic)[: shape[0]].clone())


@dataclass(frozen=True)
class Slimmed:
    """The result of `slim`.

    Attributes:
        channels: channels that can be removed; those that are added or normalized together count once.
        removed: how many of them were removed.
        fixed: names of the layers whose channels cannot be removed.
    """

    channels: int
    removed: int
    fixed: tuple[str, ...]


@dataclass(frozen=True)
class _Coupled:
    """Channels that can only be removed together: a layer's, with everything that adds to, normalizes or reads them.

    Attributes:
        layer: the layer whose output channels they are.
        scales: (channels), the mean of |γ| over the batch norms on them.
    """

    layer: nn.Module
    scales: Tensor


def scales_of(module: nn.Module) -> list[nn.Parameter]:
    """γ of every batch norm, in the network's order.

    Raises:
        StudentError: the network has none.
    """
    found = [part.weight for part in module.modules() if isinstance(part, _BatchNorm) and part.weight is not None]
    if not found:
        raise StudentError(
            "--method slimming removes channels by the scales of their batch norms, and the network has none. Choose "
            "another method: --method lit"
        )
    return found


def slim(module: nn.Module, example: Batch, ratio: float) -> Slimmed:
    """Remove the share `ratio` of the channels, in place: those with the smallest scales in the whole network (Liu et
    al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017). Each layer keeps one or more.

    torch-pruning traces channels through the network, including residual additions and concatenations, and cuts the
    layers. Channels are kept if a layer with fewer channels is added to them (padded with zeros), or if a layer on them
    is grouped.

    Args:
        module: in eval mode; its parameters need gradients.
        example: a batch to run it on.

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
    # By rank and not by value, so that equal scales do not remove more channels than requested.
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
            module,
            example,
            forward_fn=forward,
            output_transform=partial(answer_of, task="classification"),
            verbose=False,
        )


def _can_be_cut(group: Any, graph: Any) -> bool:
    """Whether the channels can be removed with nothing else changed, and the result described by its layers' sizes."""
    for dep, indices in group:
        layer, outputs = dep.target.module, graph.is_out_channel_pruning_fn(dep.handler)
        if outputs and not dep.target.outputs:
            return False  # the network's own output
        if isinstance(layer, _ConvNd):
            depthwise = layer.groups == layer.out_channels == layer.in_channels
            if layer.transposed or (layer.groups > 1 and not depthwise):
                return False
            if outputs and layer.out_channels != len(indices):
                return False  # a layer with other channels is added to them
        elif isinstance(layer, nn.Linear):
            if outputs and layer.out_features != len(indices):
                return False
        elif not isinstance(layer, nn.Module):
            return False  # a parameter outside any layer
        elif any(True for _ in layer.parameters()) and not isinstance(layer, _BatchNorm):
            return False
    return True


def _scales(group: Any) -> Tensor | None:
    """|γ| of each of the group's channels, on the CPU; None if no batch norm is on them."""
    found = []
    for item in group:
        norm = item.dep.target.module
        if isinstance(norm, _BatchNorm) and norm.weight is not None:
            own = torch.zeros(len(group[0].idxs))
            own[list(item.root_idxs)] = norm.weight.detach().float().abs().cpu()[list(item.idxs)]
            found.append(own)
    return torch.stack(found).mean(0) if found else None
