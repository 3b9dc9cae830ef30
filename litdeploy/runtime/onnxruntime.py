"""ONNX Runtime, on the CPU or on CUDA."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from litdeploy.errors import DependencyError, RunnerError
from litdeploy.files import is_file
from litdeploy.runtime.device import device_name
from litdeploy.runtime.feed import Feed, read_feed
from litdeploy.runtime.onnx_file import read_model
from litdeploy.runtime.rounding import rounded
from litdeploy.runtime.runner import Description, Source, check_batch, check_precision, not_open

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ERRORS_ONLY = 3
# ONNX Runtime's names of an input's type, and what it takes it as in torch's memory; bfloat16 by onnx's number.
_ELEMENTS: dict[torch.dtype, tuple[str, Any]] = {
    torch.float32: ("tensor(float)", np.float32),
    torch.float16: ("tensor(float16)", np.float16),
    torch.bfloat16: ("tensor(bfloat16)", 16),
    torch.uint8: ("tensor(uint8)", np.uint8),
}


class OnnxRuntimeRunner:
    """An ONNX file with one float32 image input (N, C, H, W) and logits (N, classes) as its first output.

    Or another input, where its metadata tell how a float32 image becomes one: as `litdeploy export` writes them.
    """

    name = "onnxruntime"

    def __init__(self, source: Source, device: torch.device, precision: str) -> None:
        self.device = device
        self._path = source.needed_onnx_path(self.name)
        check_precision(self.name, precision, ("fp32", "fp16", "bf16", "int8"))
        if device.type not in _PROVIDERS:
            raise RunnerError(f"the runner '{self.name}' runs on cpu and cuda, not on {device}.")
        self._memory_limit = source.memory_limit
        self._feed = Feed()
        self._session: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._input, self._output = "", ""
        self._output_dtype = torch.float32
        self._shape: tuple[int | None, ...] = ()
        self._classes = 0
        self._build_seconds = 0.0

    def __enter__(self) -> Self:
        ort = _library()
        if not is_file(self._path):
            raise RunnerError(f"{self._path}: no such file. Make it: litdeploy export")
        if self.device.type == "cuda":
            _check_cuda(ort, self.device)
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        started = time.perf_counter()
        self._session = self._open(ort)
        self._build_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self._stream = None

    def run(self, batch_NCHW: Tensor) -> Tensor:
        """See `Runner.run`."""
        if self._session is None:
            raise not_open(self.name)
        check_batch(self.name, batch_NCHW, self._shape, self.device)
        images = self._feed.take(batch_NCHW)
        try:
            return self._run_on_cpu(images) if self._stream is None else self._run_on_cuda(images, self._stream)
        except Exception as error:  # ONNX Runtime's own have no common base
            raise RunnerError(f"{self._path}: onnxruntime cannot run it: {_first_line(error)}") from error

    def describe(self) -> Description:
        """See `Runner.describe`."""
        return Description(
            runner=self.name,
            device=device_name(self.device),
            precision=self._feed.precision,
            mode=_PROVIDERS[self.device.type] + (", fp32 rounded to bf16" if self._rounds() else ""),
            versions={"onnxruntime": _library().__version__},
            build_seconds=self._build_seconds,
        )

    def _open(self, ort: Any) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = _ERRORS_ONLY
        # Its threads spin for a while after a call, on the cores that the next runner's call needs. Two sessions taking
        # turns on two cores (ResNet-20, batch 8): 22.0 ms a call with that, 11.5 ms without; one alone is no slower.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        provider = _PROVIDERS[self.device.type]
        settings = {}
        if self._stream is not None:
            settings = {
                "device_id": str(self.device.index),
                "user_compute_stream": str(self._stream.cuda_stream),
                "use_tf32": "0",
            }
            if self._memory_limit is not None:
                settings["gpu_mem_limit"] = str(int(self._memory_limit * 2**30))
        self._feed = _read_feed(self._path)
        try:
            model = rounded(self._path) if self._rounds() else str(self._path)
            session = ort.InferenceSession(model, options, providers=[(provider, settings)])
        except Exception as error:  # ONNX Runtime's own have no common base
            raise RunnerError(
                f"{self._path}: not an ONNX file that onnxruntime {ort.__version__} opens ({_first_line(error)}). "
                "Make it again: litdeploy export"
            ) from error
        if provider not in session.get_providers():
            built_for = getattr(ort, "cuda_version", "") or "another version"
            raise _no_cuda(
                ort, self.device, f"its CUDA provider (for CUDA {built_for}) did not load; its log above says why"
            )
        # Else a call that fails on CUDA would be tried again, silently, in a new session on the CPU.
        session.disable_fallback()
        self._read_signature(session)
        return session

    def _rounds(self) -> bool:
        """Whether it runs in float32 with each result rounded: ONNX Runtime has no bfloat16 on a processor."""
        return self._feed.precision == "bf16" and self.device.type == "cpu"

    def _read_signature(self, session: Any) -> None:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if not inputs or not outputs:
            raise RunnerError(
                f"{self._path}: has {len(inputs)} inputs and {len(outputs)} outputs; one of each is needed."
            )
        images, logits = inputs[0], outputs[0]
        if self._rounds() and self._feed.dtype is torch.bfloat16:
            self._feed = replace(self._feed, dtype=torch.float32)
        kinds = {name: dtype for dtype, (name, _) in _ELEMENTS.items() if dtype is not torch.uint8}
        fits = len(inputs) == 1 and images.type == _ELEMENTS[self._feed.dtype][0] and logits.type in kinds
        if not fits or len(images.shape) != 4 or len(logits.shape) != 2 or not isinstance(logits.shape[1], int):
            found = ", ".join(f"{each.name} {each.type} {each.shape}" for each in (*inputs, *outputs))
            raise RunnerError(
                f"{self._path}: no classifier of images as `litdeploy export` writes it: one float32 input "
                f"(N, C, H, W) and logits (N, classes) are needed; it has {found}."
            )
        self._input, self._output = images.name, logits.name
        shape = tuple(size if isinstance(size, int) else None for size in images.shape[1:])
        # Pixels have their channels last.
        self._shape = (shape[2], shape[0], shape[1]) if self._feed.dtype is torch.uint8 else shape
        self._classes = logits.shape[1]
        self._output_dtype = kinds[logits.type]

    def _run_on_cpu(self, images: Tensor) -> Tensor:
        [logits] = self._session.run([self._output], {self._input: images.numpy()})
        return torch.from_numpy(logits).float()

    def _run_on_cuda(self, images: Tensor, stream: torch.cuda.Stream) -> Tensor:
        """In torch's own memory, on a stream that takes its place in the current one's order; nothing waits."""
        logits = torch.empty(len(images), self._classes, device=self.device, dtype=self._output_dtype)
        binding = self._session.io_binding()
        for bind, name, tensor in (
            (binding.bind_input, self._input, images),
            (binding.bind_output, self._output, logits),
        ):
            element = _ELEMENTS[tensor.dtype][1]
            bind(name, "cuda", self.device.index, element, tuple(tensor.shape), tensor.data_ptr())
        options = _library().RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        self._session.run_with_iobinding(binding, options)
        current.wait_stream(stream)
        return logits.float()


def _read_feed(path: Path) -> Feed:
    """What the file's metadata say of its input, once all that it claims was held against what there is."""
    return read_feed({each.key: each.value for each in read_model(path).metadata_props}, str(path))


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            f"the runner 'onnxruntime' needs onnxruntime ({error}). Install it: pip install onnxruntime-gpu "
            "(onnxruntime, where there is no GPU build)"
        ) from None
    return onnxruntime


def _check_cuda(ort: Any, device: torch.device) -> None:
    """What can be told before a session is made, and better than by its log.

    Raises:
        RunnerError: CUDA cannot be used.
    """
    if _PROVIDERS["cuda"] not in ort.get_available_providers():
        raise _no_cuda(ort, device, "it was built without CUDA")
    if not torch.cuda.is_available():
        raise _no_cuda(ort, device, "PyTorch finds no CUDA device here")


def _no_cuda(ort: Any, device: torch.device, reason: str) -> RunnerError:
    built_for = torch.version.cuda
    match = f"the onnxruntime-gpu for CUDA {built_for.split('.')[0]}" if built_for else "onnxruntime-gpu"
    return RunnerError(
        f"onnxruntime {ort.__version__} cannot run on {device}: {reason}. Its providers: "
        f"{', '.join(ort.get_available_providers())}; PyTorch {torch.__version__} is built for "
        f"{f'CUDA {built_for}' if built_for else 'the CPU'}. Run on --device cpu, or install PyTorch for CUDA and "
        f"{match}: pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
