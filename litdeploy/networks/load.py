"""From a file (or a module of the user's) to a Network."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from litdeploy.checkpoint import Checkpoint, load_weights, read_checkpoint
from litdeploy.errors import NetworkError
from litdeploy.networks.identify import describe, identify
from litdeploy.networks.network import Network
from litdeploy.networks.registry import NetworkName, Request, is_code, request
from litdeploy.networks.student import shorten
from litdeploy.networks.width import narrow
from litdeploy.spec import InputSpec, NetworkSpec, override_input, parse_normalisation


def load(
    source: str | Path | Checkpoint | nn.Module,
    *,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
) -> Network:
    """Loads a network with its weights.

    Args:
        source: a file of weights (`.pt .pth .th .bin .safetensors`), one that was read, or a module.
        network: the network, where the file does not tell or tells two: see `registry.request`.
        normalise: `imagenet`, `cifar10`, …, or `m1,m2,m3:s1,s2,s3`; None: what the file or the family says.
        input_shape: (channels, height, width) of one image; None: likewise.

    Returns:
        The network in eval mode, in float32, on the CPU.

    Raises:
        CheckpointError: the file is no whole checkpoint, or does not fit the network.
        NetworkError: the network is not recognised, ambiguous, or its input is not known.
    """
    if isinstance(source, nn.Module):
        asked = request(source)
        spec = _spec(asked, source, {}, normalise, input_shape, asked.name)
        return Network(source.eval(), spec, asked.name)
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    asked_for = None if network is None else request(network)
    if checkpoint.spec is not None:
        return _rebuilt(checkpoint, checkpoint.spec, asked_for, normalise, input_shape)
    if asked_for is None or asked_for.family is not None:
        return _recognised(checkpoint, asked_for, normalise, input_shape)
    module = asked_for.build()
    spec = _spec(asked_for, module, asked_for.arguments, normalise, input_shape, str(checkpoint.path))
    load_weights(module, checkpoint.weights, str(checkpoint.path), describe(asked_for.name, asked_for.arguments))
    return Network(module.eval(), spec, str(checkpoint.path))


def new(
    network: NetworkName, *, normalise: str | None, input_shape: tuple[int, int, int], classes: int, seed: int
) -> Network:
    """A newly initialised network. One of our own families takes the channels and classes where it is not told others.

    Raises:
        NetworkError: unknown.
    """
    asked = request(network)
    arguments = dict(asked.arguments)
    if asked.family:
        arguments = {"classes": classes, "in_channels": input_shape[0], **arguments}
    module = asked.build(arguments, seed)
    return Network(module, _spec(asked, module, arguments, normalise, input_shape, asked.name), asked.name)


def new_like(network: NetworkName, other: Network, seed: int) -> Network:
    """A newly initialised network for the images and classes of another.

    Raises:
        NetworkError: unknown, or it does not take these images or tell these classes apart.
    """
    asked = request(network)
    arguments = dict(asked.arguments)
    classes, shape = other.class_count(), other.spec.input.shape
    if asked.family:
        arguments = {"classes": classes, "in_channels": shape[0], **arguments}
    name = describe(asked.name, arguments)
    made = Network(
        asked.build(arguments, seed), other.spec.with_(name=asked.name, arguments=arguments, plan=None), name
    )
    try:
        found = made.class_count()
    except RuntimeError as error:
        raise NetworkError(f"{name} does not take images of {shape}: {str(error).splitlines()[0]}.") from None
    if found != classes:
        raise NetworkError(f"{name} tells {found} classes apart, and {other.source} {classes}.")
    return made


def build(spec: NetworkSpec, asked: Request | None, source: str, seed: int = 0) -> nn.Module:
    """A newly initialised module of the spec, shortened and narrowed as the spec says.

    Args:
        asked: the network that the user named; needed where the spec names the user's code.
        source: what a message calls the spec's origin.

    Raises:
        NetworkError: the spec names code that the user did not name, or layers that the network does not have.
    """
    if is_code(spec.name) and (asked is None or asked.name != spec.name):
        raise NetworkError(
            f"{source} is of the network {spec.name}, which is code of yours. It is run only when you name it: "
            f"--network {spec.name}"
        )
    builder = asked if asked is not None and is_code(spec.name) else request(spec.name)
    module = builder.build(spec.arguments, seed)
    if spec.plan is not None:
        shorten(module, spec.plan)
    narrow(module, spec.widths)
    return module


def _rebuilt(
    checkpoint: Checkpoint,
    spec: NetworkSpec,
    asked: Request | None,
    normalise: str | None,
    input_shape: tuple[int, int, int] | None,
) -> Network:
    source = str(checkpoint.path)
    if asked is not None and (asked.name != spec.name or not asked.arguments.items() <= spec.arguments.items()):
        raise NetworkError(
            f"{source} says that it is {describe(spec.name, spec.arguments)}; --network asks for "
            f"{describe(asked.name, asked.arguments)}. Leave --network out."
        )
    module = build(spec, asked, source)
    load_weights(module, checkpoint.weights, source, describe(spec.name, spec.arguments))
    return Network(module.eval(), spec.with_(input=override_input(spec.input, normalise, input_shape, source)), source)


def _recognised(
    checkpoint: Checkpoint,
    asked: Request | None,
    normalise: str | None,
    input_shape: tuple[int, int, int] | None,
) -> Network:
    source = str(checkpoint.path)
    name, reading = identify(checkpoint.weights, source, asked)
    found = request(name)
    module = found.build(reading.arguments)
    spec = _spec(found, module, reading.arguments, normalise, input_shape, source)
    load_weights(module, reading.weights, source, describe(name, reading.arguments))
    return Network(module.eval(), spec, source)


def _spec(
    asked: Request,
    module: nn.Module,
    arguments: dict[str, int | float | str | bool],
    normalise: str | None,
    input_shape: tuple[int, int, int] | None,
    source: str,
) -> NetworkSpec:
    known = asked.input(module, arguments)
    if known is None:
        if input_shape is None or normalise is None:
            lacking = " and ".join(
                name for name, value in (("input_shape", input_shape), ("normalise", normalise)) if value is None
            )
            raise NetworkError(
                f"{source}: nothing says what images the network {asked.name} takes; {lacking} must be given, as in "
                "--input-shape 3,32,32 --normalise imagenet."
            )
        mean, std = parse_normalisation(normalise, input_shape[0])
        known = InputSpec(shape=input_shape, mean=mean, std=std)
    return NetworkSpec(
        name=asked.name, arguments=dict(arguments), input=override_input(known, normalise, input_shape, source)
    )
