"""Read weights from pickles, the format of torch.save, without running their code or trusting their sizes."""

from __future__ import annotations

import mmap
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from litdeploy.errors import CheckpointError, first_line

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "ema", "state_dict_ema", "model_ema")
# The name in a pickle; the reader accepts names in this form only.
_BYTEARRAY = b"\nbytearray\n"
_ZIP = b"PK\x03\x04"
_DEEPEST_WRAPPER = 8
_LONGEST_NAME = 80
# Magic number, version, machine, content, keys of the storages; then raw bytes.
_PICKLES_OF_OLD_FORMAT = 5
_NAMES_A_VALUE = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_REFERS_TO_A_VALUE = {"GET", "BINGET", "LONG_BINGET"}
_GROWS_A_VALUE = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}
# Honest checkpoints refer to classes and strings; a file may also hold the same weights under several names.
_MOST_TIMES_PICKLE, _ALWAYS_ALLOWED = 16, 2**20


def read_pickled(path: Path) -> dict[str, Any]:
    """Read the state dict in a PyTorch file, with the weights-only reader.

    The sizes are read first, without allocating memory: a few bytes of pickle may claim any size.

    Raises:
        CheckpointError: the file is torn, not a checkpoint, would run code, or claims sizes that it cannot hold.
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
            for _ in range(_PICKLES_OF_OLD_FORMAT):
                if content.tell() < len(content):
                    _check_growth(content, path)
        with FakeTensorMode():
            claimed = _torch_load(path, "cpu")
    else:
        raise _not_weights(path, "")
    _check_claims(_state_dict(claimed, path), path)
    return _state_dict(_torch_load(path, "cpu"), path)


def _torch_load(path: Path, device: str) -> object:
    import torch

    try:
        with warnings.catch_warnings():
            # torch warns of pickles that it did not write itself.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_weights(path, str(error)) from None
    except Exception as error:  # a pickle can be damaged, or made, to fail in any way
        raise CheckpointError(
            f"{path}: a truncated or damaged checkpoint ({first_line(error)}). Copy or save it again."
        ) from None


def _state_dict(content: object, path: Path) -> dict[str, Any]:
    """Find the state dict in the file's content, also in a wrapper inside a wrapper."""
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
        held = ", ".join(map(shown, list(content)[:6])) or "nothing"
        content = inner
    raise CheckpointError(
        f"{path}: no state dict in it (it holds {held}). Looked for tensors by name, bare or under "
        f"{', '.join(_WRAPPERS[:5])}."
    )


def _not_weights(path: Path, reason: str) -> CheckpointError:
    """The error for a file that the weights-only reader refused, from its reason."""
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
    """Check the zip archive's table of contents against the file's length.

    Raises:
        CheckpointError: the archive is torn, is TorchScript, or unpacks to more than its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries, comment = archive.infolist(), archive.comment
            unpacked, length = sum(entry.file_size for entry in entries), path.stat().st_size
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            # A comment may hold a second table of contents, which another reader would use.
            whole = not packed and not comment and unpacked <= length
            script = any(entry.filename.endswith("constants.pkl") for entry in entries)
            for entry in entries if whole and not script else ():
                if entry.filename.endswith(".pkl"):
                    content = archive.read(entry)
                    _check_globals(content, path)
                    _check_growth(BytesIO(content), path)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile fails in as many ways as an archive can be damaged
        raise CheckpointError(
            f"{path}: a truncated or damaged checkpoint ({first_line(error)}). Copy or save it again."
        ) from None
    if script:
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
    """Refuse a pickle that makes a `bytearray`: the weights-only reader accepts it, in any size.

    Raises:
        CheckpointError: the pickle makes one.
    """
    if content.find(_BYTEARRAY) >= 0:
        raise CheckpointError(
            f"{path}: its pickle makes a bytearray, which weights do not need. Save the weights alone: "
            'torch.save(model.state_dict(), "teacher.pt").'
        )


def _check_growth(stream: BytesIO | mmap.mmap, path: Path) -> None:
    """Check that the values in a pickle, written out in full, are not far larger than the pickle.

    A pickle can refer to a value instead of repeating it. So 40 tuples, each a pair of the one before, take 400 bytes,
    and hashing the last one, as the key of a dict, takes 2⁴⁰ steps. The opcodes are followed here with nothing but the
    size of each value; every reference adds the size of its value to what the pickle comes to.

    Args:
        stream: at the start of a pickle; read to its end.

    Raises:
        CheckpointError: the values are too large, or the pickle is damaged.
    """
    start = stream.tell()
    # A size is a list of one number, which all references to a value share: a list or dict grows after it is named.
    stack: list[list[int] | None] = []  # None: a mark
    named: dict[Any, list[int]] = {}
    referred = 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]  # mmap reads too
            if opcode.name in _NAMES_A_VALUE:
                named[len(named) if argument is None else argument] = _size(stack[-1])
            elif opcode.name in _REFERS_TO_A_VALUE:
                value = named[argument]
                stack.append(value)
                referred += value[0]
                if referred > _MOST_TIMES_PICKLE * (stream.tell() - start) + _ALWAYS_ALLOWED:
                    raise CheckpointError(
                        f"{path}: its pickle repeats values within values, {referred:,} and more. It is damaged or "
                        'made up. Save the weights alone: torch.save(model.state_dict(), "teacher.pt").'
                    )
            elif opcode.name == "MARK":
                stack.append(None)
            else:
                taken = _taken(stack, opcode)
                size = 1 + sum(value[0] for value in taken)
                if opcode.name in _GROWS_A_VALUE:
                    taken[0][0] = size
                    stack.append(taken[0])
                else:
                    stack.extend([size] for _ in opcode.stack_after)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise _not_weights(path, str(error)) from None


def _taken(stack: list[list[int] | None], opcode: pickletools.OpcodeInfo) -> list[list[int]]:
    """The sizes of the values that an opcode takes from the stack, the lowest first."""
    taken: list[list[int]] = []
    count = len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        while (value := stack.pop()) is not None:
            taken.append(value)
        count = opcode.stack_before.index(pickletools.markobject)
    taken += [_size(stack.pop()) for _ in range(count)]
    return taken[::-1]


def _size(value: list[int] | None) -> list[int]:
    if value is None:
        raise ValueError("a mark where a value is needed")
    return value


def _check_claims(claimed: Mapping[str, Any], path: Path) -> None:
    """Check the tensors' sizes, as the pickle claims them, against the file's length.

    Raises:
        CheckpointError: a tensor is larger than the file, or is not dense.
    """
    import torch

    length = path.stat().st_size
    for name, tensor in claimed.items():
        named = shown(name)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise CheckpointError(
                f"{path}: tensor '{named}' is sparse, quantized or nested. litdeploy reads dense weights; save "
                "tensor.to_dense() or tensor.dequantize()."
            )
        claim = tensor.numel() * tensor.element_size()
        if claim > length:
            raise CheckpointError(
                f"{path}: tensor '{named}' claims {tuple(tensor.shape)}, {claim:,} bytes, and the file has {length:,}. "
                "It is truncated, damaged or made up. Copy or save it again."
            )


def shown(key: object) -> str:
    """A tensor's name for messages, shortened."""
    return key[:_LONGEST_NAME] if isinstance(key, str) else f"a {type(key).__name__}"
