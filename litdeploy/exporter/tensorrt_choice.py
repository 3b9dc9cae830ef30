"""Which TensorRT builds: `tensorrt`, on the GPU that will run the engine, or `tensorrt_rtx`, for GPUs elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import torch

from litdeploy.errors import DependencyError, SettingsError
from litdeploy.runtime.engine import INSTALL, Library, capability_of, load_library


@dataclass(frozen=True)
class Choice:
    """Which library builds, for which GPUs, and why that one.

    Attributes:
        gpu: name of the one at hand that it builds for; None where it builds for GPUs that are elsewhere.
    """

    library: Library
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    reason: str

    def told(self) -> str:
        """In one line: `tensorrt_rtx 1.7.1 for compute capability 8.6, 8.9: there is no CUDA GPU here …`."""
        capabilities = ", ".join(self.compute_capabilities)
        return f"{self.library} {self.version} for compute capability {capabilities}: {self.reason}"


def choose_library(device: torch.device, compute_capabilities: Sequence[str] = ()) -> Choice:
    """`tensorrt` where its GPU and the library are; else `tensorrt_rtx`, which builds for GPUs that are elsewhere.

    Args:
        device: where the student will run, if it is here.
        compute_capabilities: those that were asked for, as in `8.6`; none: the device's.

    Raises:
        DependencyError: the library that is needed is not installed; says what to install.
        SettingsError: no compute capability to build for, or one that the library does not have.
    """
    here = capability_of(device) if device.type == "cuda" else None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    asked = tuple(dict.fromkeys(compute_capabilities)) or ((here,) if here else ())
    version, missing = _version("tensorrt")
    if here is None:
        reason = "there is no CUDA GPU here, and tensorrt builds only on the GPU that runs the engine"
    elif asked != (here,):
        reason = f"tensorrt builds only for the GPU at hand, of compute capability {here}"
    elif version is not None:
        return Choice("tensorrt", version, asked, gpu, f"the library and a GPU ({gpu}) are here")
    else:
        reason = "tensorrt is not installed"
    rtx_version, rtx_missing = _version("tensorrt_rtx")
    if rtx_version is None:
        needed = f"Install one: {INSTALL['tensorrt_rtx']}" if here is None or version is not None else missing
        raise DependencyError(f"{reason}, and tensorrt_rtx is not to be had either: {rtx_missing}\n{needed}")
    if not asked:
        raise SettingsError(
            f"{reason}; tensorrt_rtx {rtx_version} builds ahead of time, for GPUs that are named. Name them: "
            "litdeploy export --trt --compute-capability 8.6,8.9,12.0"
        )
    _check_capabilities(asked, rtx_version)
    return Choice("tensorrt_rtx", rtx_version, asked, gpu if asked == (here,) else None, reason)


def _version(name: Library) -> tuple[str | None, str]:
    """Of an installed library; or None, and why it is not to be had."""
    try:
        return str(load_library(name).__version__), ""
    except DependencyError as error:
        return None, str(error)


def _check_capabilities(asked: Sequence[str], version: str) -> None:
    known = rtx_capabilities()
    for each in asked:
        if each not in known:
            raise SettingsError(
                f"--compute-capability {each}: tensorrt_rtx {version} does not build for it; it builds for "
                f"{', '.join(known)}. For other GPUs (H200 is 9.0) there is tensorrt, on the GPU itself: "
                f"{INSTALL['tensorrt']}"
            )


def rtx_capabilities() -> dict[str, Any]:
    """Compute capability → tensorrt_rtx's own name of it, for all that it builds for.

    Raises:
        DependencyError: it is not installed.
    """
    members = load_library("tensorrt_rtx").ComputeCapability.__members__
    named = {re.fullmatch(r"SM(\d+)(\d)", name): value for name, value in members.items()}
    return {f"{match[1]}.{match[2]}": value for match, value in named.items() if match}


def versions(choice: Choice) -> dict[str, str]:
    """Versions of the library, of CUDA as the library was built for, and, where there is a GPU, of its driver."""
    found: dict[str, str] = {choice.library: choice.version}
    try:
        needs = " ".join(requires(choice.library) or ())
    except PackageNotFoundError:  # as in NVIDIA's containers, which hold it without pip
        needs = ""
    if built_for := re.search(r"[_-]cu(\d+)\b", needs):
        found["cuda"] = built_for[1]
    elif torch.version.cuda:
        found["cuda"] = torch.version.cuda
    driver = Path("/proc/driver/nvidia/version")
    if (
        choice.gpu is not None
        and driver.is_file()
        and (number := re.search(r"\b\d+\.\d+(\.\d+)?\b", driver.read_text()))
    ):
        found["driver"] = number[0]
    return found
