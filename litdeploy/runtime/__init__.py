"""Running a network: one Runner contract, whatever the backend; and where, how precisely and how well it runs.

A backend is imported when its runner is opened: an exported file is run without litdeploy's networks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

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
    "RUNNERS",
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


def _eager(source: Source, device: torch.device, precision: str) -> Runner:
    from litdeploy.runtime.eager import EagerRunner

    return EagerRunner(source, device, precision)


def _compiled(source: Source, device: torch.device, precision: str) -> Runner:
    from litdeploy.runtime.compiled import CompiledRunner

    return CompiledRunner(source, device, precision)


def _onnxruntime(source: Source, device: torch.device, precision: str) -> Runner:
    from litdeploy.runtime.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(source, device, precision)


def _onnxruntime_graph(source: Source, device: torch.device, precision: str) -> Runner:
    from litdeploy.runtime.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(source, device, precision, cuda_graph=True)


def _inductor(source: Source, device: torch.device, precision: str) -> Runner:
    from litdeploy.runtime.inductor import InductorRunner

    return InductorRunner(source, device, precision)


def _tensorrt(source: Source, device: torch.device, precision: str) -> Runner:
    from litdeploy.runtime.tensorrt import TensorRTRunner

    return TensorRTRunner(source, device, precision)


def _tensorrt_graph(source: Source, device: torch.device, precision: str) -> Runner:
    from litdeploy.runtime.tensorrt import TensorRTRunner

    return TensorRTRunner(source, device, precision, cuda_graph=True)


RUNNERS: dict[str, Callable[[Source, torch.device, str], Runner]] = {
    "eager": _eager,
    "compiled": _compiled,
    "onnxruntime": _onnxruntime,
    "onnxruntime-graph": _onnxruntime_graph,
    "inductor": _inductor,
    "tensorrt": _tensorrt,
    "tensorrt-graph": _tensorrt_graph,
}


def open_runner(
    name: str,
    *,
    network: Network | None = None,
    onnx_path: Path | None = None,
    package_path: Path | None = None,
    engine_path: Path | None = None,
    device: torch.device,
    precision: str = "fp32",
    compile_mode: CompileMode = "default",
    memory_limit: float | None = None,
) -> Runner:
    """The runner of that name, to be entered.

    Args:
        name: a key of `RUNNERS`.
        network: what the runners of PyTorch take; left as it is.
        onnx_path: what onnxruntime takes.
        package_path: what AOTInductor takes (`.pt2`).
        engine_path: what TensorRT takes; its sidecar lies beside it.
        device: where to run; `cuda` without an index is `cuda:0`.
        precision: `fp32` (IEEE: TF32 is off in every runner) or `bf16`; an exported file has its own.
        compile_mode: of torch.compile.
        memory_limit: most device memory, in GiB, where the runner has such a limit (onnxruntime on CUDA).

    Raises:
        RunnerError: no such runner, or its source or precision does not serve.
    """
    if name not in RUNNERS:
        raise RunnerError(f"no runner '{name}'. Those that there are: {', '.join(RUNNERS)}.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    source = Source(network, onnx_path, package_path, engine_path, compile_mode, memory_limit)
    return RUNNERS[name](source, device, precision)
