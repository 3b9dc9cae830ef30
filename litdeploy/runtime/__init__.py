"""Running a network: one Runner contract, whatever the backend; and where, how precisely and how well it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from litdeploy.errors import RunnerError
from litdeploy.networks import Network
from litdeploy.runtime.compiled import CompiledRunner
from litdeploy.runtime.device import (
    default_target,
    device_name,
    resolve_device,
    resolve_precision,
    resolve_target,
)
from litdeploy.runtime.eager import EagerRunner
from litdeploy.runtime.evaluate import accuracy
from litdeploy.runtime.onnxruntime import OnnxRuntimeRunner
from litdeploy.runtime.runner import Description, Runner, Source

__all__ = [
    "RUNNERS",
    "Description",
    "Runner",
    "Source",
    "accuracy",
    "default_target",
    "device_name",
    "open_runner",
    "resolve_device",
    "resolve_precision",
    "resolve_target",
]


def _tensorrt(source: Source, device: torch.device, precision: str) -> Runner:
    from litdeploy.runtime.tensorrt import TensorRTRunner

    return TensorRTRunner(source, device, precision)


def _tensorrt_graph(source: Source, device: torch.device, precision: str) -> Runner:
    from litdeploy.runtime.tensorrt import TensorRTRunner

    return TensorRTRunner(source, device, precision, cuda_graph=True)


RUNNERS: dict[str, Callable[[Source, torch.device, str], Runner]] = {
    "eager": EagerRunner,
    "compiled": CompiledRunner,
    "onnxruntime": OnnxRuntimeRunner,
    "tensorrt": _tensorrt,
    "tensorrt-graph": _tensorrt_graph,
}


def open_runner(
    name: str,
    *,
    network: Network | None = None,
    onnx_path: Path | None = None,
    engine_path: Path | None = None,
    device: torch.device,
    precision: str = "fp32",
) -> Runner:
    """The runner of that name, to be entered.

    Args:
        name: a key of `RUNNERS`.
        network: what the runners of PyTorch take; left as it is.
        onnx_path: what onnxruntime takes.
        engine_path: what TensorRT takes; its sidecar lies beside it.
        device: where to run; `cuda` without an index is `cuda:0`.
        precision: `fp32` (IEEE: TF32 is off in every runner) or `bf16`; a file has its own.

    Raises:
        RunnerError: no such runner, or its source or precision does not serve.
    """
    if name not in RUNNERS:
        raise RunnerError(f"no runner '{name}'. Those that there are: {', '.join(RUNNERS)}.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    return RUNNERS[name](Source(network, onnx_path, engine_path=engine_path), device, precision)
