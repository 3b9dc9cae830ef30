"""Load a network from a file or from a module of the user's, or build a new one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from litdeploy.config.spec import (
    MOST_VALUES,
    AnyInput,
    InputSpec,
    NetworkSpec,
    TaskName,
    TensorInput,
    TokenInput,
    image_shape,
    parse_normalisation,
)
from litdeploy.errors import CheckpointError, LitdeployError, NetworkError, SettingsError
from litdeploy.networks.embedder import SentenceEmbedder
from litdeploy.networks.families.family import Arguments
from litdeploy.networks.hub import as_classifier, declared_classes, fill, is_hub, published
from litdeploy.networks.network import Network
from litdeploy.networks.output import check_task, detect_task
from litdeploy.networks.registry import NetworkName, Request, check_stored, describe, identify, is_code, request
from litdeploy.networks.student import shorten
from litdeploy.networks.width import narrow
from litdeploy.storage.bundle import CONFIG, carried_by
from litdeploy.storage.checkpoint import Checkpoint, load_weights, read_checkpoint

# Added to the message for a file that describes its own input.
_MADE_UP = "; else it is damaged or made up"


@dataclass(frozen=True)
class _Said:
    """The caller's settings of the input, which override what is known of it."""

    normalise: str | None = None
    input_shape: tuple[int, ...] | None = None
    input: AnyInput | Callable[[nn.Module], AnyInput] | None = None
    task: TaskName | None = None

    def over(self, known: AnyInput | None, name: str, source: str, module: nn.Module | None = None) -> AnyInput:
        """The input with these settings. Raises as `load`.

        Args:
            module: the network, if nothing may be known of its input.
        """
        if callable(self.input):
            known = self.input(module) if known is None and module is not None and self.input_shape is None else known
        else:
            known = self.input or known
        if known is not None:
            return known.override(self.normalise, self.input_shape, source)
        shape = self.input_shape
        if shape is None or (len(shape) == 3 and self.normalise is None):
            raise NetworkError(
                f"{source}: nothing says what the network {name} takes. "
                + (
                    "Give the shape of one sample, and of images their normalization"
                    if shape is None
                    else f"--input-shape {','.join(map(str, shape))} is of an image: give its normalization too"
                )
                + ", as in --input-shape 3,32,32 --normalise imagenet for images, or --input-shape 1,16000 for a "
                "signal. In Python, describe it: input=TensorInput.of((3, 32, 32)), or an attribute `input_spec` of "
                "the module (see litdeploy.config.spec)."
            )
        if len(shape) != 3 and self.normalise is None:
            if not shape or min(shape) < 1 or math.prod(shape) > MOST_VALUES:
                raise SettingsError(
                    f"{source}: --input-shape {','.join(map(str, shape))}: every size is at least 1, and a sample "
                    f"has at most {MOST_VALUES:,} values."
                )
            first = None if module is None else next(iter(inspect.signature(module.forward).parameters), None)
            return TensorInput.of(shape, first or "inputs")
        shape = image_shape(shape, source)
        mean, std = parse_normalisation(self.normalise or "", shape[0])
        return InputSpec(shape=shape, mean=mean, std=std)


def load(
    source: str | Path | Checkpoint | nn.Module,
    *,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    input: AnyInput | Callable[[nn.Module], AnyInput] | None = None,
    folder: Path | None = None,
    task: TaskName | None = None,
) -> Network:
    """Load a network with its weights.

    Args:
        source: a weights file (`.pt .pth .th .ckpt .bin .safetensors`), a checkpoint that was read, a folder that
            transformers saved, or a module.
        network: the network, needed if the file fits none or several: see `registry.request`.
        normalise: normalization of images: `imagenet`, `cifar10`, …, or `m1,m2,m3:s1,s2,s3`; None: as in the file or
            the family.
        input_shape: of one sample: (channels, height, width) of an image, (length,) of a text, any of another tensor;
            None: likewise.
        input: the complete input, in place of all that is known of it; or a function that finds it from the module if
            nothing is known.
        folder: the folder of an `hf:` network's configuration, in place of the one in its name; None: for weights in a
            bundle, the bundle's own, unless a network is named.
        task: what its output means; None: as in the file, else detected from one run (see `output.detect_task`).

    Returns:
        The network in eval mode, in float32, on the CPU.

    Raises:
        CheckpointError: the file is not a whole checkpoint, or does not fit the network.
        NetworkError: the network is not recognized, ambiguous, or its input is not known; or its output is not that of
            the task.
        SettingsError: the settings of the input do not fit the network.
    """
    said = _Said(normalise, input_shape, input, task)
    if isinstance(source, nn.Module):
        asked = request(source)
        made = Network(source.eval(), _spec(asked, source, {}, said, asked.name), asked.name)
        return _running(made, task)
    if not isinstance(source, Checkpoint):
        source, network = published(source, network)
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    asked_for = None if network is None else request(network, folder)
    if checkpoint.spec is not None:
        return _rebuilt(checkpoint, checkpoint.spec, asked_for, said, folder)
    if asked_for is None or asked_for.family is not None:
        return _recognized(checkpoint, asked_for, said)
    source, arguments = str(checkpoint.path), asked_for.arguments
    if is_hub(asked_for.name):
        module, arguments = _filled(asked_for, checkpoint.weights, source)
    else:
        module = asked_for.build()
        load_weights(module, checkpoint.weights, source, describe(asked_for.name, arguments))
    spec = _spec(asked_for, module, arguments, said, source)
    return _running(Network(module.eval(), spec, source), task)


def new(
    network: NetworkName,
    *,
    normalise: str | None,
    classes: int,
    seed: int,
    input_shape: tuple[int, ...] | None = None,
    data_shape: tuple[int, ...] | None = None,
    task: TaskName | None = None,
) -> Network:
    """Build a newly initialized network with this number of classes, and the data's channels unless it names others.

    Args:
        input_shape: as for `load`.
        data_shape: the data's, used if `input_shape` is None and the network takes this kind of input.
        task: as for `load`.

    Raises:
        NetworkError: the network is unknown.
        SettingsError: it does not take this input.
    """
    asked = request(network)
    shape = input_shape or data_shape
    arguments = asked.sized(classes, shape[0] if shape is not None and len(shape) == 3 else None)
    module = asked.build(arguments, seed)
    known = asked.input(module, arguments)
    # The network decides how many tokens a text has; its data are opened after it.
    other = data_shape is not None and known is not None and len(known.shape) != len(data_shape)
    if input_shape is None and (other or isinstance(known, TokenInput)):
        shape = None
    spec = _spec(asked, module, arguments, _Said(normalise, shape), asked.name)
    return _running(Network(module, spec.with_(classes=()), asked.name), task)


def new_like(network: NetworkName, other: Network, seed: int) -> Network:
    """Build a newly initialized network for the images and classes of another.

    Raises:
        NetworkError: the network is unknown, or does not take these images or have these classes.
    """
    asked = request(network)
    classes, shape = other.class_count(), other.spec.input.shape
    arguments = asked.sized(classes, shape[0] if len(shape) == 3 else None)
    name = describe(asked.name, arguments)
    made = Network(
        asked.build(arguments, seed), other.spec.with_(name=asked.name, arguments=arguments, plan=None), name
    )
    try:
        found = made.class_count()
    except (RuntimeError, TypeError, ValueError) as error:
        raise NetworkError(f"{name} does not take images of {shape}: {str(error).splitlines()[0]}.") from None
    if found != classes:
        raise NetworkError(f"{name} has {found} classes, and {other.source} {classes}.")
    return made


def build(
    spec: NetworkSpec,
    asked: Request | None,
    source: str,
    seed: int = 0,
    within: AbstractContextManager[Any] | None = None,
    folder: Path | None = None,
) -> nn.Module:
    """Build a newly initialized module of a spec, shortened and narrowed as the spec says.

    Args:
        asked: the network that the user named; needed if the spec names the user's code.
        source: the spec's origin, for messages.
        within: see `Request.build`.
        folder: see `request`.

    Raises:
        NetworkError: the spec names code that the user did not name (see `check_stored`), or layers that the network
            does not have.
    """
    check_stored(spec.name, spec.arguments, asked, source)
    if asked is not None and is_code(spec.name):
        module = asked.build(asked.over(spec.name, spec.arguments), seed, within)
    else:
        module = request(spec.name, folder).build(spec.arguments, seed, within)
    if spec.plan is not None:
        shorten(module, spec.plan)
    narrow(module, spec.widths)
    return module


def _answers(asked: Request, spec: NetworkSpec) -> bool:
    """Whether a request can build the network of a spec. The user's code is known by its weights, whatever its name."""
    agrees = all(spec.arguments.get(key, value) == value for key, value in asked.arguments.items())
    if is_code(spec.name) and is_code(asked.name):
        return asked.name != spec.name or agrees
    return asked.name == spec.name and asked.arguments.items() <= spec.arguments.items()


def _filled(asked: Request, weights: Mapping[str, Tensor], source: str) -> tuple[nn.Module, Arguments]:
    """A network of transformers with its weights, and its arguments.

    Weights that do not fit the class of the configuration may be a classifier's, whose folder holds the configuration
    of the network that it was fine-tuned from.
    """
    name, arguments = describe(asked.name, asked.arguments), dict(asked.arguments)
    limit = BuildLimit(weights, source)  # the folder may be a stranger's
    module = asked.build(within=limit)
    if isinstance(module, SentenceEmbedder):
        arguments["pooling"] = module.embedding.pooling  # stated, also where it is the default
    try:
        return fill(module, weights, source, name), arguments
    except CheckpointError:
        classifier = as_classifier(asked.arguments, module)
        if classifier is None:
            raise
        try:
            return fill(asked.build(classifier, within=limit), weights, source, name), classifier
        except LitdeployError:
            pass
        raise


def _rebuilt(
    checkpoint: Checkpoint, spec: NetworkSpec, asked: Request | None, said: _Said, folder: Path | None
) -> Network:
    source = str(checkpoint.path)
    if asked is not None and is_hub(asked.name) and is_hub(spec.name):
        spec = spec.with_(name=asked.name)  # with its folder's present path
    elif folder is None and is_hub(spec.name):
        folder = carried_by(checkpoint.path, CONFIG)
    if asked is not None and not _answers(asked, spec):
        raise NetworkError(
            f"{source} describes itself as {describe(spec.name, spec.arguments)}; --network asks for "
            f"{describe(asked.name, asked.arguments)}. Leave --network out."
        )
    limit = BuildLimit(checkpoint.weights, source)
    module = build(spec, asked, source, within=limit, folder=folder)
    try:
        load_weights(module, checkpoint.weights, source, describe(spec.name, spec.arguments))
    except CheckpointError:
        classifier = as_classifier(spec.arguments, module) if is_hub(spec.name) else None
        if classifier is None:
            raise
        spec = spec.with_(arguments=classifier)
        module = build(spec, asked, source, within=limit, folder=folder)
        load_weights(module, checkpoint.weights, source, describe(spec.name, spec.arguments))
    made = Network(module.eval(), spec.with_(input=said.over(spec.input, spec.name, source)), source)
    return _running(made, said.task or spec.task, _MADE_UP, detects=False)


def _running(network: Network, task: TaskName | None, otherwise: str = "", detects: bool = True) -> Network:
    """Check that a network runs, since weights may fit the arguments, and layers not each other or the input; and give
    it its task.

    Args:
        task: None: detect it, or keep that of its spec if not `detects`.
    """
    spec, example = network.spec, network.example(2)
    try:
        output = network.output(example)
        if task is not None:
            check_task(task, example, spec.input, output, network.source)
        elif detects:
            task = detect_task(network.module, example, spec.input, output, network.source)
        network = replace(network, spec=spec.with_(task=None if task == spec.input.task else task))
        network.classes_in(output)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        widths = "the layer widths in its header do not fit together, or " if network.spec.widths else ""
        raise NetworkError(
            f"{network.source}: {widths}it does not run on its stated input, {network.spec.input.summary()} "
            f"({(str(error) or type(error).__name__).splitlines()[0]}). Give its input: --input-shape{otherwise}."
        ) from None
    return network


def _recognized(checkpoint: Checkpoint, asked: Request | None, said: _Said) -> Network:
    source = str(checkpoint.path)
    name, reading = identify(checkpoint.weights, source, asked)
    found = request(name)
    module = found.build(reading.arguments, within=BuildLimit(checkpoint.weights, source))
    spec = _spec(found, module, reading.arguments, said, source)
    load_weights(module, reading.weights, source, describe(name, reading.arguments))
    return _running(Network(module.eval(), spec, source), said.task, _MADE_UP)


def _spec(
    asked: Request,
    module: nn.Module,
    arguments: dict[str, int | float | str | bool],
    said: _Said,
    source: str,
) -> NetworkSpec:
    known = asked.input(module, arguments) if said.input is None or callable(said.input) else None
    return NetworkSpec(
        name=asked.name,
        arguments=dict(arguments),
        input=said.over(known, asked.name, source, module),
        classes=declared_classes(module),
    )


# A student's file has the arguments of its teacher, which may be several times as large.
_TIMES_WEIGHTS, _ALWAYS_ALLOWED = 64, 2**30
# A ResNet-1202, the deepest one published, takes 17,000.
_MOST_CALLS = 60_000
_LONGEST_TENSOR = torch.iinfo(torch.int32).max
_BYTES = 8
_MAKERS = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "new_empty", "new_zeros")
}


class BuildLimit(TorchDispatchMode):
    """Limit, while it is open, the tensors that are made to what weights of this size can need: a file's sizes may be
    made up.

    Args:
        weights: the weights to be loaded.
        source: their origin, for messages.
    """

    def __init__(self, weights: Mapping[str, Tensor], source: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = sum(tensor.numel() for tensor in weights.values()) * _BYTES
        self._left, self._calls_left, self._source = _TIMES_WEIGHTS * held + _ALWAYS_ALLOWED, _MOST_CALLS, source

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls_left -= 1
        if func.overloadpacket in _MAKERS:
            sizes = next((each for each in args if isinstance(each, list | tuple)), ())
            count = math.prod(sizes)
            self._left -= count * _BYTES
            if count > _LONGEST_TENSOR:
                self._left = -1
        if self._left < 0 or self._calls_left < 0:
            raise NetworkError(
                f"{self._source}: describes a network far larger than its weights. It is damaged or made up."
            )
        return func(*args, **(kwargs or {}))
