"""Read weights (`.pt .pth .th .ckpt .bin .safetensors`; never code) and write them (`.safetensors`)."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from litdeploy.config.spec import NetworkSpec
from litdeploy.errors import CheckpointError, first_line
from litdeploy.files import is_file, is_folder, parse_json, sha256_of, write_whole
from litdeploy.storage.pickled import read_pickled, shown

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors")
_PREFIXES = ("module.", "_orig_mod.")
_METADATA_KEY = "litdeploy"
_SHARED_KEY = "litdeploy.shared"
_FLOAT32_BYTES = 4
# float8 becomes four times as large; tensors that are tied have several names.
_MOST_TIMES_FILE, _ALWAYS_ALLOWED = 16, 64 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a file.

    Attributes:
        path: the file.
        sha256: of the whole file.
        weights: name → tensor on the CPU; floating-point tensors in float32, prefixes removed.
        spec: the network, if the file describes it (files written by litdeploy do).
    """

    path: Path
    sha256: str
    weights: dict[str, Tensor]
    spec: NetworkSpec | None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file of weights.

    The file holds a bare state dict or one wrapped under `state_dict`, `model`, `model_state_dict`, `net` or `ema`,
    keys with or without `module.` and `_orig_mod.`, saved on any device, in any floating-point type.

    Raises:
        CheckpointError: the file is missing, empty, torn, not a checkpoint, a pickle that would run code, or claims
            sizes that it cannot hold.
    """
    path = Path(path)
    if is_folder(path):
        raise CheckpointError(f"{path}: is a folder; a file of weights is needed ({' '.join(SUFFIXES)}).")
    if not is_file(path):
        raise CheckpointError(f"{path}: no such file.")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: cannot be read (permission denied). Allow it: chmod u+r {path}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes). Copy or save it again.")
    if path.suffix == ".safetensors":
        weights, spec = _read_safetensors(path)
    elif path.suffix in SUFFIXES:
        weights, spec = read_pickled(path), None
    else:
        raise CheckpointError(
            f"{path}: the ending '{path.suffix}' is not one of a file of weights ({' '.join(SUFFIXES)})."
        )
    return Checkpoint(path, sha256_of(path), _normalized(weights, path), spec)


def write_checkpoint(path: Path, weights: Mapping[str, Tensor], spec: NetworkSpec) -> str:
    """Write `.safetensors` with a header that rebuilds the network; return its SHA-256. Raises as `write_whole`.

    A tensor of several names, such as a tied weight, is written once; the header has its other names.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors, shared = _once(weights)
    metadata = {"format": "pt", _METADATA_KEY: spec.model_dump_json()}
    if shared:
        metadata[_SHARED_KEY] = json.dumps(shared)
    with write_whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a disk error, of which safetensors gives only the text
            raise OSError(errno.EIO, str(error)) from error
    return sha256_of(path)


def _once(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of which no two share memory, which safetensors refuses; and other names of theirs → name."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[Any, str] = {}
    memory: set[int] = set()
    for name, tensor in weights.items():
        storage = tensor.untyped_storage().data_ptr()
        whole = (storage, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and whole in names:
            shared[name] = names[whole]
            continue
        kept = tensor.detach().cpu().contiguous()
        tensors[name] = kept.clone() if storage in memory else kept
        names[whole] = name
        memory.add(storage)
    return tensors, shared


def load_weights(module: Any, weights: Mapping[str, Tensor], source: str, network: str) -> None:
    """Load `weights` into `module`, all of them or none.

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
    check_finite({key: value for key, value in weights.items() if key in own}, module, source)
    module.load_state_dict({key: value for key, value in weights.items() if key in own}, strict=False)


def check_finite(weights: Mapping[str, Tensor], module: Any, source: str) -> None:
    """Check that weights are numbers. A buffer, such as a mask, may hold infinities.

    Raises:
        CheckpointError: they are not: a training diverged, and nothing useful can be made of them.
    """
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    bad = [
        key
        for key, value in weights.items()
        if value.is_floating_point() and (value.isnan().any() or (key in parameters and value.isinf().any()))
    ]
    if bad:
        raise CheckpointError(
            f"{source}: {len(bad)} of its {len(weights)} tensors hold values that are not finite numbers "
            f"({_some(bad)}). The training that made it diverged; give an earlier checkpoint."
        )


def _some(keys: list[str]) -> str:
    return ", ".join(map(shown, keys[:4])) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], NetworkSpec | None]:
    from safetensors import safe_open

    try:
        # It checks the header against the file's length before it makes a tensor.
        with safe_open(path, framework="pt", device="cpu") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except Exception as error:  # SafetensorError, and torch's error for a type that it lacks
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({first_line(error)}). Copy or save it again."
        ) from None
    if _METADATA_KEY not in metadata:
        return weights, None
    try:
        for name, other in parse_json(metadata.get(_SHARED_KEY, "{}")).items():
            weights.setdefault(name, weights[other])
        return weights, NetworkSpec.model_validate_json(metadata[_METADATA_KEY])
    except (ValidationError, ValueError, AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"{path}: its header's description of the network is damaged, or of another litdeploy version. Name the "
            "network with --network after removing that metadata, or compress again."
        ) from None


def _normalized(weights: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers, floating-point values in float32.

    Raises:
        CheckpointError: there are no tensors, a name is not text, or they would take far more memory than the file.
    """
    if not weights:
        raise CheckpointError(f"{path}: holds no tensors.")
    for name, tensor in weights.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: a tensor is named by {shown(name)}, not by text. Save a state dict.")
        if tensor.is_meta:
            raise CheckpointError(f"{path}: tensor '{shown(name)}' has a shape and no values. Save the weights.")
    # Many tensors may be views of the same few bytes; each would be converted into memory of its own.
    needed, length = sum(tensor.numel() * _FLOAT32_BYTES for tensor in weights.values()), path.stat().st_size
    if needed > _MOST_TIMES_FILE * length + _ALWAYS_ALLOWED:
        raise CheckpointError(
            f"{path}: its {len(weights)} tensors come to {needed:,} bytes in float32, and the file has {length:,}. "
            "Save each once."
        )
    names = list(weights)
    for prefix in _PREFIXES * 2:  # either may be outside the other
        if all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    try:
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in zip(names, weights.values(), strict=True)
        }
    except RuntimeError as error:  # a type that torch does not convert
        raise CheckpointError(
            f"{path}: not all of its tensors can be converted to float32 ({first_line(error)}). Save them in float32."
        ) from None
