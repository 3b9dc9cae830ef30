"""Name → builder: our own families, `timm:NAME`, `hf:NAME` and `package.module:function`."""

from __future__ import annotations

import copy
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

from litdeploy.config.spec import INPUTS, AnyInput, InputSpec, TokenInput
from litdeploy.errors import LitdeployError, NetworkError, import_library
from litdeploy.networks.families import resnet, resnext, stargan, vdcnn
from litdeploy.networks.families.family import Arguments, Family, Reading, Weights
from litdeploy.networks.hub import absolute, hub_builder, is_hub

FAMILIES: dict[str, Family] = {
    "resnet": resnet.FAMILY,
    "resnext": resnext.FAMILY,
    "stargan": stargan.FAMILY,
    "stargan-discriminator": stargan.DISCRIMINATOR,
    "vdcnn": vdcnn.FAMILY,
}

_TIMM = "timm:"
# Arguments by which timm and transformers read further files, or run what is in them.
_REACHING = {
    *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "model_args"),
    *("trust_remote_code", "code_revision", "revision", "token", "use_auth_token", "subfolder", "proxies", "gguf_file"),
    *("force_download", "local_files_only", "return_unused_kwargs", "auto_map", "architecture", "backbone"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "use_kernels", "quantization_config"),
    *("use_timm_backbone", "use_pretrained_backbone", "_configuration_file", "_from_auto"),
}

# What a caller may name a network by. Code of the user's is run only when it was named like this, never by a file.
NetworkName = str | Callable[..., nn.Module] | nn.Module


@dataclass(frozen=True)
class Request:
    """A network as it was asked for.

    Attributes:
        name: as a spec stores it.
        arguments: those that were given; the builder's defaults hold for the others.
        builder: makes a module of those arguments.
        initialises: whether the builder gives new weights (a module that was passed in does not).
    """

    name: str
    arguments: Arguments
    builder: Callable[..., nn.Module]
    initialises: bool = True

    @property
    def family(self) -> Family | None:
        return FAMILIES.get(self.name)

    def sized(self, classes: int, channels: int | None) -> Arguments:
        """Its arguments, with the number of classes and, of images, of channels, where they are not among them and the
        builder's names for them are known."""
        if self.family:
            known = {self.family.classes: classes}
            if channels is not None and self.family.input({**known, **self.arguments}).images:
                known["in_channels"] = channels
        elif self.name.startswith(_TIMM):
            known = {"num_classes": classes} | ({} if channels is None else {"in_chans": channels})
        else:
            known = {"num_labels": classes} if is_hub(self.name) else {}
        return {**known, **self.arguments}

    def build(
        self, arguments: Arguments | None = None, seed: int = 0, within: AbstractContextManager[Any] | None = None
    ) -> nn.Module:
        """Makes the module; the same for the same seed, whatever ran before.

        Args:
            arguments: None: those that were asked for.
            within: the limit of a network that a file describes; any arguments may be in a file.

        Raises:
            NetworkError: arguments that the builder does not take, or something that is no module.
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
            raise NetworkError(f"{self.name}: gives a {type(module).__name__}, not an nn.Module.")
        return module

    def input(self, module: nn.Module, arguments: Arguments) -> AnyInput | None:
        """The input that the network is known to take; None where nothing says so."""
        if self.family:
            return self.family.input(arguments)
        return _declared_input(module, arguments)


def is_code(name: str) -> bool:
    """Whether a stored name stands for the user's own code."""
    return ":" in name and not name.startswith((_TIMM, "hf:"))


def check_stored(name: str, arguments: Arguments, asked: Request | None, source: str) -> None:
    """Holds a network that a file names against what may be built by a file's word: nothing that runs or reads more.

    Args:
        asked: the network that the user named; what is in it was the user's word.
        source: what a message calls the file.

    Raises:
        NetworkError: it names code of the user's, or makes a library read other files, and the user did not.
    """
    if is_code(name) and (asked is None or asked.name != name):
        raise NetworkError(
            f"{source} is of the network {name!r}, which is code of yours. It is run only when you name it: "
            f"--network {shlex.quote(name)}"
        )
    if "," in name:
        raise NetworkError(f"{source}: is of the network {name!r}, which is no name of one. It is damaged or made up.")
    named = asked is not None and asked.name == name
    if name.startswith(_TIMM) and not named and not re.fullmatch(r"timm:[\w.]+", name):
        raise NetworkError(
            f"{source} is of the network {name!r}, which timm reads from elsewhere. Name it yourself if you trust it: "
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
    """Resolves a network's name. That of a folder, `hf:FOLDER`, becomes absolute.

    Args:
        folder: where the configuration of an `hf:` network is, in place of the one that its name says.
        network: `resnet`, `resnet56`, `resnet,depth=56,shortcut=B`, `timm:NAME`, `hf:NAME`, `package.module:function`,
            each with `,key=value` arguments; in Python also a function or class that makes a module, or a module.

    Raises:
        NetworkError: an unknown name.
        DependencyError: the library that it names is not installed.
    """
    if isinstance(network, nn.Module):
        template = network
        kind = type(network)
        return Request(f"{kind.__module__}:{kind.__qualname__}", {}, lambda: copy.deepcopy(template), initialises=False)
    if not isinstance(network, str):
        return Request(f"{network.__module__}:{network.__qualname__}", {}, network)
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
    """As `python -m` does: a script's own folder is where its modules are looked for first."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _declared_input(module: nn.Module, arguments: Arguments) -> AnyInput | None:
    """What a timm module (`pretrained_cfg`), a transformers one (`config`) or the user's (`input_spec`) says of it."""
    own = getattr(module, "input_spec", None)
    if isinstance(own, INPUTS):
        return own
    declared = getattr(module, "pretrained_cfg", None)
    if isinstance(declared, dict) and "input_size" in declared:
        return _timm_input(declared, arguments)
    config = getattr(module, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if isinstance(size, int) and isinstance(channels, int):
        return InputSpec(shape=(channels, size, size), mean=(0.5,) * channels, std=(0.5,) * channels)
    vocabulary, positions = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if isinstance(vocabulary, int) and isinstance(positions, int):
        pad = getattr(config, "pad_token_id", None)
        length = positions - _reserved_positions(module)
        return TokenInput(length=length, vocabulary=vocabulary, pad=pad if isinstance(pad, int) and pad >= 0 else 0)
    return None


def _timm_input(declared: dict[str, Any], arguments: Arguments) -> InputSpec:
    """What the published weights take, which is all that timm tells, with the channels and size that were asked for."""
    channels, height, width = declared["input_size"]
    mean, std = tuple(declared["mean"]), tuple(declared["std"])
    asked = arguments.get("in_chans", channels)
    if asked != channels and isinstance(asked, int):
        # Each of its channels, as of those of a grey image, is some mixture of the three.
        channels = asked
        mean, std = (math.fsum(mean) / len(mean),) * asked, (math.fsum(std) / len(std),) * asked
    size = arguments.get("img_size")
    if isinstance(size, int):
        height = width = size
    return InputSpec(shape=(channels, height, width), mean=mean, std=std)


def _reserved_positions(module: nn.Module) -> int:
    """Rows of a table of positions that no token takes: RoBERTa's kin count from the one behind the padding's."""
    tables = [
        child
        for name, child in module.named_modules()
        if name.endswith("position_embeddings") and isinstance(child, nn.Embedding)
    ]
    return max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)


def readings(weights: Weights) -> list[tuple[str, Reading]]:
    """Every (family's name, reading) that fits."""
    return [(name, reading) for name, family in FAMILIES.items() for reading in family.read(weights)]


def identify(weights: Weights, source: str, asked: Request | None = None) -> tuple[str, Reading]:
    """The one network that fits.

    Args:
        weights: a state dict without wrappers' prefixes.
        source: what a message calls it.
        asked: narrows the readings to one family and to the arguments given.

    Raises:
        NetworkError: none fits, or more than one does.
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
        raise NetworkError(_not_recognised(weights, source))
    lines = [f"{source}: its names and shapes fit {len(found)} networks. Say which it is:"]
    lines += [f"  --network {describe(name, reading.arguments)}   ({reading.because})" for name, reading in found]
    raise NetworkError("\n".join(lines))


def describe(name: str, arguments: Arguments) -> str:
    """A network as `--network` takes it: `resnet,depth=56,classes=10,shortcut=A`."""
    values = ((key, str(value).lower() if isinstance(value, bool) else value) for key, value in arguments.items())
    return ",".join([name, *(f"{key}={value}" for key, value in values)])


def _not_recognised(weights: Weights, source: str) -> str:
    names = list(weights)
    message = (
        f"{source}: not a network that litdeploy recognises by names and shapes ({len(names)} tensors: "
        f"{', '.join(names[:3])}, …, {names[-1]}). Known families: "
        + ", ".join(family.title for family in FAMILIES.values())
        + "."
    )
    blocks = sum(bool(re.match(r"layer4\.\d+\.", name)) for name in names)
    hint = "timm:resnet50" if blocks else "timm:NAME, hf:NAME or package.module:function"
    return f"{message} Name the network that it belongs to: --network {hint}"
