"""The device, precision and target to run with, and their defaults."""

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

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(text: str) -> torch.device:
    """Resolve a device name.

    Args:
        text: `auto` (CUDA if available, else the CPU), `cpu`, `cuda` (the current device) or `cuda:i`.

    Returns:
        The device; a CUDA device has its index.

    Raises:
        DeviceError: the device does not exist, or the name is not a device's.
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
        raise DeviceError(f"--device {text}: no such CUDA device. Found: {found}. Use one of these.")
    return torch.device("cuda", index)


def resolve_precision(text: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """Resolve a precision.

    Args:
        text: `fp32`, `bf16`, or `auto`: bf16 if the device multiplies it in hardware.

    Raises:
        SettingsError: not one of these.
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
    # Missing from some supported torch versions; other processors than x86 lack these keys.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor with PyTorch's number of threads: `AMD EPYC 9V74, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def default_target() -> Target:
    """The default target of this machine: `cuda` if there is a CUDA device, else `cpu`."""
    return read_target("cuda" if torch.cuda.is_available() else "cpu")


def resolve_target(target: Target | str | Path | None) -> Target:
    """Resolve a target: a target, the name or path of one, or None for the default.

    Raises:
        SettingsError: see `target.read_target`.
    """
    if isinstance(target, Target):
        return target
    return default_target() if target is None else read_target(target)


@contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """Context in which float32 on CUDA is IEEE float32, not TF32, the default of cuDNN's convolutions.

    It gives `fp32` one meaning in every runner, at two microseconds per call. It sets the legacy flags because Inductor
    reads them, and PyTorch refuses to read them once a newer flag was set.
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
