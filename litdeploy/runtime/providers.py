"""Where ONNX Runtime computes: its execution providers, and that none takes another's place in silence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from litdeploy.errors import DependencyError, RunnerError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# What costs time: on the CPU beside CUDA it would be the GPU that is waited for.
_COMPUTES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Attention", "MultiHeadAttention", "LSTM", "GRU"})


def check_placement(session: Any, provider: str, path: Path) -> None:
    """Whether a session computes where it was asked to. Small work on shapes is left to the CPU by onnxruntime itself.

    Raises:
        RunnerError: what costs time is computed elsewhere, which onnxruntime does without a word where the provider has
            no kernel for it.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # not in every onnxruntime that litdeploy takes
        return
    elsewhere = Counter(
        f"{node.op_type} on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type.removeprefix("Fused") in _COMPUTES
    )
    if elsewhere:
        told = ", ".join(f"{count} {what}" for what, count in elsewhere.items())
        raise RunnerError(
            f"{path}: onnxruntime does not compute all of it with the {provider}: {told}. Export it in a precision "
            "that this provider has (litdeploy export --onnx --precision fp32), or run it with --device cpu."
        )


def library() -> Any:
    """The module `onnxruntime`.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            f"the runner 'onnxruntime' needs onnxruntime ({error}). Install it: pip install onnxruntime-gpu "
            "(onnxruntime, where there is no GPU build)"
        ) from None
    return onnxruntime


def check_cuda(ort: Any, device: torch.device) -> None:
    """What can be told before a session is made, and better than by its log.

    Raises:
        RunnerError: CUDA cannot be used.
    """
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise no_cuda(ort, device, "it was built without CUDA")
    if not torch.cuda.is_available():
        raise no_cuda(ort, device, "PyTorch finds no CUDA device here")


def no_cuda(ort: Any, device: torch.device, reason: str) -> RunnerError:
    """The error of an onnxruntime that does not compute on the GPU."""
    built_for = torch.version.cuda
    match = f"the onnxruntime-gpu for CUDA {built_for.split('.')[0]}" if built_for else "onnxruntime-gpu"
    return RunnerError(
        f"onnxruntime {ort.__version__} cannot run on {device}: {reason}. Its providers: "
        f"{', '.join(ort.get_available_providers())}; PyTorch {torch.__version__} is built for "
        f"{f'CUDA {built_for}' if built_for else 'the CPU'}. Run on --device cpu, or install PyTorch for CUDA and "
        f"{match}: pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )
