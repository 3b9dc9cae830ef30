"""Where to run, in which precision, and for which target when nothing else was said."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from litdeploy.config.target import Target, read_target
from litdeploy.errors import DeviceError, SettingsError


def resolve_device(text: str) -> torch.device:
    """The device that was asked for.

    Args:
        text: `auto` (CUDA where there is one, else the CPU), `cpu`, `cuda` (the current one) or `cuda:i`.

    Returns:
        A device; with its index where it is CUDA.

    Raises:
        DeviceError: it is not there, or no device is called so.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", text)
    if match is None:
        raise DeviceError(f"--device {text}: no such device. Write auto, cpu, cuda or cuda:0.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not count):
        return torch.device("cpu")
    if not count:
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for the CPU only"
        raise DeviceError(
            f"--device {text}: no CUDA device was found; PyTorch {torch.__version__} {built}. "
            + ("Check nvidia-smi" if torch.version.cuda else "Install PyTorch for CUDA (https://pytorch.org)")
            + ", or run with --device cpu."
        )
    index = torch.cuda.current_device() if match[1] is None else int(match[1])
    if index >= count:
        found = ", ".join(f"cuda:{each} ({torch.cuda.get_device_name(each)})" for each in range(count))
        raise DeviceError(f"--device {text}: there is no such CUDA device. Found: {found}. Give one of these.")
    return torch.device("cuda", index)


def resolve_precision(text: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """The precision that was asked for.

    Args:
        text: `fp32`, `bf16`, or `auto`: bf16 where the device multiplies it in hardware.

    Raises:
        SettingsError: another word.
    """
    if text == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    if text == "fp32":
        return "fp32"
    if text == "bf16":
        return "bf16"
    raise SettingsError(f"--precision {text}: no such precision. Write auto, fp32 or bf16.")


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Not in every torch that litdeploy takes, and without these keys on other processors than x86.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads that PyTorch uses: `AMD EPYC 9V74, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def default_target() -> Target:
    """The shipped target for this machine: `cuda` where there is a CUDA device, else `cpu`."""
    return read_target("cuda" if torch.cuda.is_available() else "cpu")


def resolve_target(target: Target | str | Path | None) -> Target:
    """The target that was asked for: itself, by name or path, or the default one.

    Raises:
        SettingsError: see `target.read_target`.
    """
    if isinstance(target, Target):
        return target
    return default_target() if target is None else read_target(target)


@contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """While it is open, float32 on CUDA is float32 and not TF32, which cuDNN's convolutions use unless told otherwise.

    So that `fp32` means one thing in every runner. Costs two microseconds a call. The legacy flags, since Inductor
    itself reads them, and PyTorch refuses to where one of the newer ones was set.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
