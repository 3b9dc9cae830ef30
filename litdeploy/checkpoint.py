"""Weights in (`.pt .pth .th .ckpt .bin .safetensors`; never code), weights out (`.safetensors`)."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from litdeploy.bundle import sha256_of, write_whole
from litdeploy.errors import CheckpointError
from litdeploy.spec import NetworkSpec

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "ema", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.")
_METADATA_KEY = "litdeploy"


@dataclass(frozen=True)
class Checkpoint:
    """Weights as they were found.

    Attributes:
        path: the file.
        sha256: of the whole file.
        weights: name → tensor on the CPU; floating-point tensors in float32, prefixes removed.
        spec: the network, where the file says it (those written by litdeploy do).
    """

    path: Path
    sha256: str
    weights: dict[str, Tensor]
    spec: NetworkSpec | None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a file of weights.

    Takes a bare state dict or one wrapped under `state_dict`, `model`, `model_state_dict`, `net` or `ema`, keys with or
    without `module.` and `_orig_mod.`, saved on any device, in any floating-point type.

    Raises:
        CheckpointError: missing, empty, torn, no checkpoint, or a pickle that would have to run code.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file.")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; a file of weights is needed ({' '.join(SUFFIXES)}).")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes). Copy or save it again.")
    if path.suffix == ".safetensors":
        weights, spec = _read_safetensors(path)
    elif path.suffix in SUFFIXES:
        weights, spec = _state_dict(_unpickle(path), path), None
    else:
        raise CheckpointError(
            f"{path}: the ending '{path.suffix}' is not one of a file of weights ({' '.join(SUFFIXES)})."
        )
    return Checkpoint(path, sha256_of(path), _normalised(weights, path), spec)


def write_checkpoint(path: Path, weights: Mapping[str, Tensor], spec: NetworkSpec) -> str:
    """Writes `.safetensors` whose header rebuilds the network. Returns the file's SHA-256."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with write_whole(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", _METADATA_KEY: spec.model_dump_json()})
    return sha256_of(path)


def load_weights(module: Any, weights: Mapping[str, Tensor], source: str, network: str) -> None:
    """Loads `weights` into `module`, all of them or none.

    Raises:
        CheckpointError: names the missing and unexpected keys and the shapes that differ.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    extra = [key for key in weights if key not in own and not key.endswith("num_batches_tracked")]
    differing = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or extra or differing:
        lines = [f"{source}: these are not the weights of {network}."]
        if missing:
            lines.append(f"  missing: {_some(missing)}")
        if extra:
            lines.append(f"  unexpected: {_some(extra)}")
        lines += [
            f"  {key}: shape {tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the network"
            for key in differing[:3]
        ]
        lines.append("Name the network that they belong to with --network, or see `litdeploy inspect`.")
        raise CheckpointError("\n".join(lines))
    module.load_state_dict({key: value for key, value in weights.items() if key in own}, strict=False)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], NetworkSpec | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}). Copy or save it again.") from None
    if _METADATA_KEY not in metadata:
        return weights, None
    try:
        return weights, NetworkSpec.model_validate_json(metadata[_METADATA_KEY])
    except (ValidationError, json.JSONDecodeError):
        raise CheckpointError(
            f"{path}: its header's description of the network is damaged, or of another litdeploy version. Name the "
            "network with --network after removing that metadata, or compress again."
        ) from None


def _unpickle(path: Path) -> object:
    import torch

    _refuse_torchscript(path)
    if _first_byte(path) not in (b"P", pickle.PROTO):  # a zip archive (PK…), or the pickle of the old format
        raise _not_weights(path, "")
    try:
        with warnings.catch_warnings():
            # torch warns of pickles that it did not write itself; whether it could read them is what counts here.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_weights(path, str(error)) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: a truncated or damaged checkpoint ({first}). Copy or save it again.") from None


def _not_weights(path: Path, reason: str) -> CheckpointError:
    """What to say of a file that the weights-only reader refused, for the reason it gave."""
    named = re.search(r"(?:GLOBAL|class) ([\w.]+)", reason)
    if named or "Unsupported operand" in reason:
        held = f" ({named[1]})" if named else ""
        return CheckpointError(
            f"{path} holds a pickled object{held}, which runs code when opened. litdeploy opens weights only. Save its "
            'weights instead: torch.save(model.state_dict(), "teacher.pt").'
        )
    return CheckpointError(
        f"{path}: not a checkpoint, or a damaged one: it does not read as a PyTorch file does. Save one with "
        'torch.save(model.state_dict(), "teacher.pt").'
    )


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


def _refuse_torchscript(path: Path) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise CheckpointError(
                    f"{path} is a TorchScript archive, which is code. Save the weights of the model it was made from: "
                    'torch.save(model.state_dict(), "teacher.pt").'
                )


def _state_dict(content: object, path: Path) -> dict[str, Any]:
    """Finds the state dict in what the file holds; a wrapper inside a wrapper too."""
    import torch

    if isinstance(content, Mapping):
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return dict(content)
        for key in _WRAPPERS:
            if isinstance(content.get(key), Mapping):
                return _state_dict(content[key], path)
        tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
        if tensors and all("." in str(key) for key in tensors):
            return tensors
        held = ", ".join(map(str, list(content)[:6])) or "nothing"
    else:
        held = f"a {type(content).__name__}"
    raise CheckpointError(
        f"{path}: no state dict in it (it holds {held}). Looked for tensors by name, bare or under "
        f"{', '.join(_WRAPPERS[:5])}."
    )


def _normalised(weights: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers; floating-point numbers in float32."""
    if not weights:
        raise CheckpointError(f"{path}: holds no tensors.")
    names = [str(name) for name in weights]
    for prefix in _PREFIXES * 2:  # either may be outside the other
        if all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in zip(names, weights.values(), strict=True)
    }
