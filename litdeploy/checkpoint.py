"""Weights in (`.pt .pth .th .ckpt .bin .safetensors`; never code), weights out (`.safetensors`)."""

from __future__ import annotations

import errno
import mmap
import os
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
from litdeploy.files import is_file, is_folder
from litdeploy.spec import NetworkSpec

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "ema", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.")
_METADATA_KEY = "litdeploy"
# As a pickle writes it: the reader takes names in this form only.
_BYTEARRAY = b"\nbytearray\n"
_ZIP = b"PK\x03\x04"
_DEEPEST_WRAPPER = 8
_LONGEST_NAME = 80
_FLOAT32_BYTES = 4
# float8 becomes four times as large; tensors that are tied have several names.
_MOST_TIMES_FILE, _ALWAYS_ALLOWED = 16, 64 * 2**20


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
        CheckpointError: missing, empty, torn, no checkpoint, a pickle that would have to run code, or sizes that the
            file cannot hold.
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
        weights, spec = _state_dict(_unpickle(path), path), None
    else:
        raise CheckpointError(
            f"{path}: the ending '{path.suffix}' is not one of a file of weights ({' '.join(SUFFIXES)})."
        )
    return Checkpoint(path, sha256_of(path), _normalised(weights, path), spec)


def write_checkpoint(path: Path, weights: Mapping[str, Tensor], spec: NetworkSpec) -> str:
    """Writes `.safetensors` whose header rebuilds the network. Returns the file's SHA-256. Raises as `write_whole`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with write_whole(path) as temporary:
        try:
            save_file(tensors, temporary, {"format": "pt", _METADATA_KEY: spec.model_dump_json()})
        except SafetensorError as error:  # of the disk, which it tells in words
            raise OSError(errno.EIO, str(error)) from error
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
    return ", ".join(map(_told, keys[:4])) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], NetworkSpec | None]:
    from safetensors import safe_open

    try:
        # Its header is held against the file's length there, before a tensor is made.
        with safe_open(path, framework="pt", device="cpu") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except Exception as error:  # SafetensorError, and what torch says of a type that it does not have
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({_first_line(error)}). Copy or save it again."
        ) from None
    if _METADATA_KEY not in metadata:
        return weights, None
    try:
        return weights, NetworkSpec.model_validate_json(metadata[_METADATA_KEY])
    except ValidationError:
        raise CheckpointError(
            f"{path}: its header's description of the network is damaged, or of another litdeploy version. Name the "
            "network with --network after removing that metadata, or compress again."
        ) from None


def _unpickle(path: Path) -> object:
    """What a PyTorch file holds, by the weights-only reader.

    What it claims is read first, without memory for it: a few bytes of pickle may ask for any number of them.
    """
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
    if start == _ZIP:
        _check_archive(path)
        claimed = _torch_load(path, "meta")
    elif start[:1] == pickle.PROTO:  # the format before PyTorch 1.6
        from torch._subclasses.fake_tensor import FakeTensorMode

        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check_globals(content, path)
        with FakeTensorMode():
            claimed = _torch_load(path, "cpu")
    else:
        raise _not_weights(path, "")
    _check_claims(_state_dict(claimed, path), path)
    return _torch_load(path, "cpu")


def _torch_load(path: Path, device: str) -> object:
    import torch

    try:
        with warnings.catch_warnings():
            # torch warns of pickles that it did not write itself; whether it could read them is what counts here.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_weights(path, str(error)) from None
    except Exception as error:  # a pickle can be damaged, or made, to fail in any way
        raise CheckpointError(
            f"{path}: a truncated or damaged checkpoint ({_first_line(error)}). Copy or save it again."
        ) from None


def _not_weights(path: Path, reason: str) -> CheckpointError:
    """What to say of a file that the weights-only reader refused, for the reason it gave."""
    named = re.search(r"(?:GLOBAL|class) ([\w.]+)", reason)
    if named or "Unsupported operand" in reason:
        held = f" ({named[1][:_LONGEST_NAME]})" if named else ""
        return CheckpointError(
            f"{path} holds a pickled object{held}, which runs code when opened. litdeploy opens weights only. Save its "
            'weights instead: torch.save(model.state_dict(), "teacher.pt").'
        )
    return CheckpointError(
        f"{path}: not a checkpoint, or a damaged one: it does not read as a PyTorch file does. Save one with "
        'torch.save(model.state_dict(), "teacher.pt").'
    )


def _check_archive(path: Path) -> None:
    """Holds the zip archive's table of contents against the file's length.

    Raises:
        CheckpointError: no whole archive, TorchScript, or one that unpacks to more than it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries, comment = archive.infolist(), archive.comment
            unpacked, length = sum(entry.file_size for entry in entries), path.stat().st_size
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            # A comment may hold a second table of contents, which another reader would take for the first.
            whole = not packed and not comment and unpacked <= length
            for entry in entries if whole else ():
                if entry.filename.endswith(".pkl"):
                    _check_globals(archive.read(entry), path)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile fails in as many ways as an archive can be damaged
        raise CheckpointError(
            f"{path}: a truncated or damaged checkpoint ({_first_line(error)}). Copy or save it again."
        ) from None
    if any(entry.filename.endswith("constants.pkl") for entry in entries):
        raise CheckpointError(
            f"{path} is a TorchScript archive, which is code. Save the weights of the model it was made from: "
            'torch.save(model.state_dict(), "teacher.pt").'
        )
    if not whole:
        raise CheckpointError(
            f"{path}: its archive is packed, or claims more than it holds ({unpacked:,} bytes in a file of "
            f"{length:,}). PyTorch writes none of this kind. If you trust where it is from, unpack it and save it "
            "again with torch.save."
        )


def _check_globals(content: bytes | mmap.mmap, path: Path) -> None:
    """The weights-only reader takes `bytearray`, which a pickle may ask for in any size.

    Raises:
        CheckpointError: it does.
    """
    if content.find(_BYTEARRAY) >= 0:
        raise CheckpointError(
            f"{path}: its pickle makes a bytearray, which weights have no use for. Save the weights alone: "
            'torch.save(model.state_dict(), "teacher.pt").'
        )


def _check_claims(claimed: Mapping[str, Any], path: Path) -> None:
    """Holds the tensors' sizes, as the pickle tells them, against the file's length.

    Raises:
        CheckpointError: a tensor larger than the file, or of a kind that weights are not.
    """
    import torch

    length = path.stat().st_size
    for name, tensor in claimed.items():
        told = _told(name)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise CheckpointError(
                f"{path}: tensor '{told}' is sparse, quantised or nested. litdeploy takes dense weights; save "
                "tensor.to_dense() or tensor.dequantize()."
            )
        claim = tensor.numel() * tensor.element_size()
        if claim > length:
            raise CheckpointError(
                f"{path}: tensor '{told}' claims {tuple(tensor.shape)}, {claim:,} bytes, and the file has {length:,}. "
                "It is truncated, damaged or made up. Copy or save it again."
            )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _told(key: object) -> str:
    """A key as a message shows it."""
    return key[:_LONGEST_NAME] if isinstance(key, str) else f"a {type(key).__name__}"


def _state_dict(content: object, path: Path) -> dict[str, Any]:
    """Finds the state dict in what the file holds; a wrapper inside a wrapper too."""
    import torch

    held = f"a {type(content).__name__}"
    for _ in range(_DEEPEST_WRAPPER):  # a pickle can hold itself
        if not isinstance(content, Mapping):
            break
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return dict(content)
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
            if tensors and all(isinstance(key, str) and "." in key for key in tensors):
                return tensors
        held = ", ".join(map(_told, list(content)[:6])) or "nothing"
        content = inner
    raise CheckpointError(
        f"{path}: no state dict in it (it holds {held}). Looked for tensors by name, bare or under "
        f"{', '.join(_WRAPPERS[:5])}."
    )


def _normalised(weights: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers; floating-point numbers in float32.

    Raises:
        CheckpointError: there are none, or names that are no text, or they would take far more memory than the file.
    """
    if not weights:
        raise CheckpointError(f"{path}: holds no tensors.")
    for name, tensor in weights.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: a tensor is named by {_told(name)}, and not by text. Save a state dict.")
        if tensor.is_meta:
            raise CheckpointError(f"{path}: tensor '{_told(name)}' has a shape and no values. Save the weights.")
    # Many tensors may be views of the same few bytes, of which each would be converted into memory of its own.
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
    except RuntimeError as error:  # a type that torch has and does not convert
        raise CheckpointError(
            f"{path}: not all of its tensors can be had in float32 ({_first_line(error)}). Save them in float32."
        ) from None
