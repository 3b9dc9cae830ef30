"""Running a network: one Runner contract for every backend, and the device and precision it runs with.

A backend is imported when its runner is opened: an exported file runs without litdeploy's networks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from litdeploy.config.formats import imported, runners
from litdeploy.config.target import CompileMode
from litdeploy.errors import RunnerError
from litdeploy.runtime.device import (
    default_target,
    device_name,
    resolve_device,
    resolve_precision,
    resolve_target,
)
from litdeploy.runtime.runner import Description, Runner, Source

if TYPE_CHECKING:
    from litdeploy.networks import Network

__all__ = [
    "Description",
    "Runner",
    "Source",
    "default_target",
    "device_name",
    "open_runner",
    "resolve_device",
    "resolve_precision",
    "resolve_target",
]


def open_runner(
    name: str,
    *,
    network: Network | None = None,
    path: Path | None = None,
    device: torch.device,
    precision: str = "fp32",
    compile_mode: CompileMode = "default",
    memory_limit: float | None = None,
) -> Runner:
    """Return the runner of that name, to be entered.

    Args:
        name: a key of `config.formats.runners()`.
        network: the module that `eager` and `compiled` run; left unchanged.
        path: the exported file that the other runners open; its sidecar is in the same folder.
        device: where to run; `cuda` without an index is `cuda:0`.
        precision: `fp32` (IEEE: TF32 is off in every runner) or `bf16`; an exported file has its own.
        compile_mode: of torch.compile.
        memory_limit: most device memory, in GiB, if the runner takes a limit (onnxruntime on CUDA).

    Raises:
        RunnerError: an unknown runner, or a source or precision that it does not take.
    """
    known = runners()
    if name not in known:
        raise RunnerError(f"no runner '{name}'. Known runners: {', '.join(known)}.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    make: Callable[[Source, torch.device, str], Runner] = imported(known[name])
    return make(Source(network, path, compile_mode, memory_limit), device, precision)
