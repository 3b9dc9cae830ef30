"""Networks by name, and names of networks: our own families, `timm:NAME`, `hf:NAME`, `package.module:function`.

A name is resolved to a builder (`request`); a state dict is recognized by the names and shapes of its tensors
(`identify`).
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litdeploy.config.spec import INPUTS, AnyInput, InputSpec
from litdeploy.errors import LitdeployError, NetworkError, import_library
from litdeploy.networks.families import resnet, resnext, stargan, vdcnn
from litdeploy.networks.families.family import Arguments, Family, Reading, Weights
from litdeploy.networks.hub import absolute, hub_builder, hub_input, is_hub

FAMILIES: dict[str, Family] = {
    "resnet": resnet.FAMILY,
    "resnext": resnext.FAMILY,
    "stargan": stargan.FAMILY,
    "stargan-discriminator": stargan.DISCRIMINATOR,
    "vdcnn": vdcnn.FAMILY,
}

_TIMM = "timm:"
# Arguments that make timm and transformers read other files, or run code in them.
_REACHING = {
    *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "model_args"),
    *("trust_remote_code", "code_revision", "revision", "token", "use_auth_token", "subfolder", "proxies", "gguf_file"),
    *("force_download", "local_files_only", "return_unused_kwargs", "auto_map", "architecture", "backbone"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "use_kernels", "quantization_config"),
    *("use_timm_backbone", "use_pretrained_backbone", "_configuration_file", "_from_auto"),
}

# The user's own code is run only if the caller names it in this way; a file cannot name it.
NetworkName = str | Callable[..., nn.Module] | nn.Module


@dataclass(frozen=True)
class Request:
    """A network that the caller named.

    Attributes:
        name: the name that a spec stores.
        arguments: those given; the builder's defaults apply to the others.
        builder: arguments → module.
        initialises: whether the builder makes new weights (a module that was passed in keeps its own).
    """

    name: str
    arguments: Arguments
    builder: Callable[..., nn.Module]
    initialises: bool = True

    @property
    def family(self) -> Family | None:
        return FAMILIES.get(self.name)

    def sized(self, classes: int, channels: int | None) -> Arguments:
        """Its arguments, plus the number of classes and, for images, of channels, unless they are given or the names of
        these arguments are not known."""
        if self.family:
            known = {self.family.classes: classes}
            if channels is not None and self.family.input({**known, **self.arguments}).images:
                known["in_channels"] = channels
        elif self.name.startswith(_TIMM):
            known = {"num_classes": classes} | ({} if channels is None else {"in_chans": channels})
        else:
            known = {"num_labels": classes} if is_hub(self.name) else {}
        return {**known, **self.arguments}

    def over(self, name: str, arguments: Arguments) -> Arguments:
        """The arguments to build a stored network with: its own and the request's, or the request's alone if that names
        other code for it.
        """
        return {**arguments, **self.arguments} if self.name == name else self.arguments

    def build(
        self, arguments: Arguments | None = None, seed: int = 0, within: AbstractContextManager[Any] | None = None
    ) -> nn.Module:
        """Build the module; the same for the same seed, whatever ran before.

        Args:
            arguments: None: those of the request.
            within: the limit for a network that a file describes, which may have any arguments.

        Raises:
            NetworkError: the builder does not take the arguments, or its result is not a module.
        """
        any_failure = within is not None and not is_code(self.name)
        with torch.random.fork_rng(devices=[]), within or nullcontext():
            torch.manual_seed(seed)
            try:
                module = self.builder(**(self.arguments if arguments is None else arguments))
            except LitdeployError:
                raise
            except Exception as error:
                if not any_failure and not isinstance(error, TypeError):
                    raise
                raise NetworkError(f"{self.name}: {error}.") from None
        if not isinstance(module, nn.Module):
            raise NetworkError(f"{self.name}: returns a {type(module).__name__}, not an nn.Module.")
        return module

    def input(self, module: nn.Module, arguments: Arguments) -> AnyInput | None:
        """The network's input; None if it is not known."""
        if self.family:
            return self.family.input(arguments)
        return _declared_input(module, arguments)


def is_code(name: str) -> bool:
    """Whether a stored name is that of the user's own code."""
    return ":" in name and not name.startswith((_TIMM, "hf:"))


def check_stored(name: str, arguments: Arguments, asked: Request | None, source: str) -> None:
    """Check that a network named by a file runs no code and reads no other file.

    Args:
        asked: the network that the user named, whose arguments are trusted.
        source: the file, for messages.

    Raises:
        NetworkError: the file names the user's code, or makes a library read other files, and the user did not name it.
    """
    if is_code(name) and (asked is None or not is_code(asked.name)):
        typed = f"--network {shlex.quote(name)}, or in Python network=" + name.rpartition(":")[2].rpartition(".")[2]
        raise NetworkError(
            f"{source} holds the network {name!r}, which is your code. It is run only if you name it: "
            + (typed if "<" not in name else "network=… in Python, a function that builds it or the network itself")
        )
    if is_code(name) and asked is not None and asked.name != name:
        return  # its arguments are not used
    if "," in name:
        raise NetworkError(f"{source}: holds the network {name!r}, which is not a name. It is damaged or made up.")
    named = asked is not None and asked.name == name
    if name.startswith(_TIMM) and not named and not re.fullmatch(r"timm:[\w.]+", name):
        raise NetworkError(
            f"{source} holds the network {name!r}, which timm reads from elsewhere. Name it yourself if you trust it: "
            f"--network {shlex.quote(name)}"
        )
    given = asked.arguments if asked is not None and named else {}
    for key, value in arguments.items():
        if key in given and given[key] == value:
            continue
        reaches = key in _REACHING or (isinstance(value, str) and not re.fullmatch(r"[\w .+-]*", value))
        if reaches and name not in FAMILIES:
            raise NetworkError(
                f"{source}: gives {name!r} the argument {key}={value!r}, by which a file may be read or code be run. "
                f"Name it yourself if you trust it: --network {shlex.quote(f'{name},{key}={value}')}"
            )


def request(network: NetworkName, folder: Path | None = None) -> Request:
    """Resolve a network's name. A folder, `hf:FOLDER`, becomes absolute.

    Args:
        folder: the folder of an `hf:` network's configuration, in place of the one in its name.
        network: `resnet`, `resnet56`, `resnet,depth=56,shortcut=B`, `timm:NAME`, `hf:NAME`, `package.module:function`,
            each with `,key=value` arguments; in Python also anything that returns a module when it is called (a class,
            a function, a `functools.partial`), or a module.

    Raises:
        NetworkError: the name is unknown.
        DependencyError: the library in the name is not installed.
    """
    if isinstance(network, nn.Module):
        template = network
        return Request(_code_name(type(network)), {}, lambda **_: copy.deepcopy(template), initialises=False)
    if isinstance(network, functools.partial):
        plain = not network.args and all(isinstance(value, int | float | str) for value in network.keywords.values())
        if plain:  # with arguments that a file can hold, the function's own name builds it again
            return Request(_code_name(network.func), network.keywords, network.func)
        complete = network
        return Request(_code_name(network.func), {}, lambda **_: complete())
    if not isinstance(network, str):
        if not callable(network):
            raise NetworkError(
                f"network={network!r}: is a {type(network).__name__}. Give a name, a module, or what builds one when "
                "it is called: network=Net, network=lambda: Net(3)."
            )
        return Request(_code_name(network), {}, network)
    name, *pairs = network.split(",")
    arguments = dict(_argument(pair, network) for pair in pairs)
    if name.startswith(_TIMM):
        return Request(name, arguments, _timm_builder(name.removeprefix(_TIMM)))
    if is_hub(name):
        name = absolute(name)
        return Request(name, arguments, hub_builder(name, folder))
    if ":" in name:
        return Request(name, arguments, _user_builder(name))
    if match := re.fullmatch(r"([a-z]+)(\d+)", name):
        name, arguments = match[1], {"depth": int(match[2]), **arguments}
    if name not in FAMILIES:
        raise NetworkError(
            f"no network '{network}'. Known: {', '.join(FAMILIES)} (as in resnet56 or resnet,depth=56,shortcut=B), "
            "timm:NAME, hf:NAME, package.module:function."
        )
    return Request(name, arguments, FAMILIES[name].build)


def _code_name(code: Any) -> str:
    """`package.module:function` of the user's code; it may be a name that cannot be imported, as that of a lambda."""
    named = code if hasattr(code, "__qualname__") else type(code)
    return f"{named.__module__}:{named.__qualname__}"


def _argument(pair: str, network: str) -> tuple[str, int | float | str | bool]:
    key, equals, value = pair.partition("=")
    if not equals or not key.isidentifier():
        raise NetworkError(
            f"{network}: '{pair}' is not an argument; write key=value, as in resnet,depth=56,shortcut=B."
        )
    if value in ("true", "false"):
        return key, value == "true"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def _timm_builder(name: str) -> Callable[..., nn.Module]:
    timm: Any = import_library("timm", f"timm:{name}", "pip install timm")

    def build(**arguments: Any) -> nn.Module:
        try:
            module: nn.Module = timm.create_model(name, pretrained=False, **arguments)
        except RuntimeError as error:
            raise NetworkError(f"timm:{name}: {error}.") from None
        return module

    return build


def _user_builder(name: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.partition(":")
    try:
        with _working_folder_importable():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise NetworkError(
            f"{name}: no module '{error.name}' here or installed. The part before the colon is what `import` takes."
        ) from None
    builder = getattr(module, attribute, None)
    if not callable(builder):
        raise NetworkError(f"{name}: {module_name} has no function or class '{attribute}'.")
    result: Callable[..., nn.Module] = builder
    return result


@contextmanager
def _working_folder_importable() -> Any:
    """Search the working folder first for modules, as `python -m` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _declared_input(module: nn.Module, arguments: Arguments) -> AnyInput | None:
    """The input that a module declares: timm's in `pretrained_cfg`, transformers' in `config`, the user's in
    `input_spec`."""
    own = getattr(module, "input_spec", None)
    if isinstance(own, INPUTS):
        return own
    declared = getattr(module, "pretrained_cfg", None)
    if isinstance(declared, dict) and "input_size" in declared:
        return _timm_input(declared, arguments)
    return hub_input(module)


def _timm_input(declared: dict[str, Any], arguments: Arguments) -> InputSpec:
    """The input of the published weights, which is all that timm declares, with the requested channels and size."""
    channels, height, width = declared["input_size"]
    mean, std = tuple(declared["mean"]), tuple(declared["std"])
    asked = arguments.get("in_chans", channels)
    if asked != channels and isinstance(asked, int):
        # Each channel, also that of a gray image, is some mixture of the three.
        channels = asked
        mean, std = (math.fsum(mean) / len(mean),) * asked, (math.fsum(std) / len(std),) * asked
    size = arguments.get("img_size")
    if isinstance(size, int):
        height = width = size
    return InputSpec(shape=(channels, height, width), mean=mean, std=std)


def readings(weights: Weights) -> list[tuple[str, Reading]]:
    """Every (family's name, reading) that fits the weights."""
    return [(name, reading) for name, family in FAMILIES.items() for reading in family.read(weights)]


def identify(weights: Weights, source: str, asked: Request | None = None) -> tuple[str, Reading]:
    """The one network that fits the weights.

    Args:
        weights: a state dict without wrappers' prefixes.
        source: its origin, for messages.
        asked: restricts the readings to one family and to given arguments.

    Raises:
        NetworkError: no network fits, or more than one.
    """
    found = readings(weights)
    if asked is not None:
        found = [
            (name, reading)
            for name, reading in found
            if name == asked.name and asked.arguments.items() <= reading.arguments.items()
        ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NetworkError(_not_recognized(weights, source))
    lines = [f"{source}: its names and shapes fit {len(found)} networks. Say which it is:"]
    lines += [f"  --network {describe(name, reading.arguments)}   ({reading.because})" for name, reading in found]
    raise NetworkError("\n".join(lines))


def describe(name: str, arguments: Arguments) -> str:
    """A network in the form of `--network`: `resnet,depth=56,classes=10,shortcut=A`."""
    values = ((key, str(value).lower() if isinstance(value, bool) else value) for key, value in arguments.items())
    return ",".join([name, *(f"{key}={value}" for key, value in values)])


def _not_recognized(weights: Weights, source: str) -> str:
    names = list(weights)
    message = (
        f"{source}: not a network that litdeploy recognizes by names and shapes ({len(names)} tensors: "
        f"{', '.join(names[:3])}, …, {names[-1]}). Known families: "
        + ", ".join(family.title for family in FAMILIES.values())
        + "."
    )
    blocks = sum(bool(re.match(r"layer4\.\d+\.", name)) for name in names)
    hint = "timm:resnet50" if blocks else "timm:NAME, hf:NAME or package.module:function"
    return f"{message} Name the network that it belongs to: --network {hint}"
