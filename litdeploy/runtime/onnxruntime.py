"""ONNX Runtime, on the CPU or on CUDA."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from litdeploy.config.spec import AnyInput, Free, InputTensor, input_of
from litdeploy.errors import RunnerError
from litdeploy.files import is_file
from litdeploy.networks.batch import Batch, size_of
from litdeploy.runtime.device import device_name
from litdeploy.runtime.feed import Feed, read_feed
from litdeploy.runtime.onnx_file import read_model
from litdeploy.runtime.providers import PROVIDERS, check_cuda, check_placement, library, no_cuda
from litdeploy.runtime.rounding import rounded
from litdeploy.runtime.runner import Description, Source, check_batch, check_precision, not_open
from litdeploy.tasks import task_of

_ERRORS_ONLY = 3
# ONNX Runtime's names of an input's type, and what it takes it as in torch's memory; bfloat16 by onnx's number.
_ELEMENTS: dict[torch.dtype, tuple[str, Any]] = {
    torch.float32: ("tensor(float)", np.float32),
    torch.float16: ("tensor(float16)", np.float16),
    torch.bfloat16: ("tensor(bfloat16)", 16),
    torch.uint8: ("tensor(uint8)", np.uint8),
    torch.int64: ("tensor(int64)", np.int64),
}


@dataclass(frozen=True)
class _Bound:
    """What a captured graph reads and writes: always the same memory. The graph is known to onnxruntime by a number."""

    inputs: dict[str, Tensor]
    logits: Tensor
    binding: Any
    options: Any


class OnnxRuntimeRunner:
    """An ONNX file whose inputs are float32 or int64, batch first, and whose first output is logits or images.

    Or other inputs, where its metadata tell how a float32 image becomes one: as `litdeploy export` writes them.

    Through CUDA graphs, one for each shape of a batch, the batch is copied into the graph's own inputs and the logits
    out of its output.
    """

    def __init__(self, source: Source, device: torch.device, precision: str, cuda_graph: bool = False) -> None:
        """`precision` is only checked: a file has its own, which `describe` tells."""
        self.name = "onnxruntime-graph" if cuda_graph else "onnxruntime"
        self.device = device
        self._cuda_graph = cuda_graph
        self._path = source.needed_onnx_path(self.name)
        check_precision(self.name, precision, ("fp32", "fp16", "bf16", "int8"))
        if device.type not in PROVIDERS:
            raise RunnerError(f"the runner '{self.name}' runs on cpu and cuda, not on {device}.")
        if cuda_graph and device.type != "cuda":
            raise RunnerError(
                f"the runner '{self.name}' runs on cuda, not on {device}. Say --device cuda, or take the runner "
                "'onnxruntime'."
            )
        self._memory_limit = source.memory_limit
        self._feed = Feed()
        self._session: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None
        self._bound: dict[tuple[torch.Size, ...], _Bound] = {}
        self._inputs: tuple[InputTensor, ...] = ()
        self._output = ""
        self._output_dtype = torch.float32
        self._output_shape: tuple[int, ...] = ()
        self._build_seconds = 0.0

    def __enter__(self) -> Self:
        ort = library()
        if not is_file(self._path):
            raise RunnerError(f"{self._path}: no such file. Make it: litdeploy export")
        if self.device.type == "cuda":
            check_cuda(ort, self.device)
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        started = time.perf_counter()
        self._session = self._open(ort)
        self._build_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *_: object) -> None:
        if self._bound:
            torch.cuda.synchronize(self.device)  # what is still queued uses the graphs' memory
        self._bound.clear()
        self._session = self._stream = self._done = None

    def run(self, batch: Batch) -> Tensor:
        """See `Runner.run`."""
        if self._session is None:
            raise not_open(self.name)
        check_batch(self.name, batch, self._inputs, self.device)
        taken = self._feed.take(batch)
        tensors = taken if isinstance(taken, dict) else {self._inputs[0].name: taken}
        try:
            if self._stream is None:
                return self._run_on_cpu(tensors)
            return (self._replayed if self._cuda_graph else self._run_on_cuda)(tensors, self._stream)
        except Exception as error:  # ONNX Runtime's own have no common base
            raise RunnerError(f"{self._path}: onnxruntime cannot run it: {_first_line(error)}") from error

    def describe(self) -> Description:
        """See `Runner.describe`."""
        return Description(
            runner=self.name,
            device=device_name(self.device),
            precision=self._feed.precision,
            mode=PROVIDERS[self.device.type]
            + (", fp32 rounded to bf16" if self._rounds() else "")
            + (", CUDA graph" if self._cuda_graph else ""),
            versions={"onnxruntime": library().__version__},
            build_seconds=self._build_seconds,
        )

    def _open(self, ort: Any) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = _ERRORS_ONLY
        # Its threads spin for a while after a call, on the cores that the next runner's call needs. Two sessions taking
        # turns on two cores (ResNet-20, batch 8): 22.0 ms a call with that, 11.5 ms without; one alone is no slower.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider = PROVIDERS[self.device.type]
        settings = self._cuda_settings()
        metadata = _metadata(self._path)
        self._feed = read_feed(metadata, str(self._path))
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
            raise no_cuda(
                ort, self.device, f"its CUDA provider (for CUDA {built_for}) did not load; its log above says why"
            )
        # Else a call that fails on CUDA would be tried again, silently, in a new session on the CPU.
        session.disable_fallback()
        check_placement(session, provider, self._path)
        self._read_signature(session, input_of(metadata))
        return session

    def _cuda_settings(self) -> dict[str, str]:
        """Of the CUDA provider; nothing on the CPU."""
        if self._stream is None:
            return {}
        settings = {
            "device_id": str(self.device.index),
            "user_compute_stream": str(self._stream.cuda_stream),
            "use_tf32": "0",
        }
        if self._cuda_graph:
            settings["enable_cuda_graph"] = "1"
        if self._memory_limit is not None:
            settings["gpu_mem_limit"] = str(int(self._memory_limit * 2**30))
        return settings

    def _rounds(self) -> bool:
        """Whether it runs in float32 with each result rounded: ONNX Runtime has no bfloat16 on a processor."""
        return self._feed.precision == "bf16" and self.device.type == "cpu"

    def _read_signature(self, session: Any, spec: AnyInput | None) -> None:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if not inputs or not outputs:
            raise RunnerError(
                f"{self._path}: has {len(inputs)} inputs and {len(outputs)} outputs; at least one of each is needed."
            )
        if self._rounds() and self._feed.dtype is torch.bfloat16:
            self._feed = replace(self._feed, dtype=torch.float32)
        kinds = {name: dtype for dtype, (name, _) in _ELEMENTS.items() if dtype.is_floating_point}
        logits = outputs[0]
        taken = [_input_tensor(each, self._feed) for each in inputs]
        known = tuple(each for each in taken if each is not None)
        sizes = tuple(logits.shape[1:])
        fixed = task_of(spec).class_count(sizes, spec) is not None
        if not known or len(known) < len(inputs) or logits.type not in kinds or not fixed:
            found = ", ".join(f"{each.name} {each.type} {each.shape}" for each in (*inputs, *outputs))
            raise RunnerError(
                f"{self._path}: no classifier as `litdeploy export` writes it: float32 or int64 inputs, batch first, "
                f"as images (N, C, H, W), and logits (N, classes) (or images, where it says that it translates "
                f"such) are needed; it has {found}."
            )
        # What the file says of itself knows how long a free size may be.
        stated = () if spec is None else spec.tensors
        self._inputs = stated if [each.name for each in stated] == [each.name for each in known] else known
        self._output, self._output_shape = logits.name, sizes
        self._output_dtype = kinds[logits.type]

    def _run_on_cpu(self, tensors: dict[str, Tensor]) -> Tensor:
        [logits] = self._session.run([self._output], {name: tensor.numpy() for name, tensor in tensors.items()})
        return torch.from_numpy(logits).float()

    def _run_on_cuda(self, tensors: dict[str, Tensor], stream: torch.cuda.Stream) -> Tensor:
        """In torch's own memory, on a stream that takes its place in the current one's order; nothing waits."""
        bound = self._bind(tensors)
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        self._session.run_with_iobinding(bound.binding, bound.options)
        current.wait_stream(stream)
        return bound.logits.float()

    def _replayed(self, tensors: dict[str, Tensor], stream: torch.cuda.Stream) -> Tensor:
        """By the graph for these shapes; the first call with them runs once, and is then captured by onnxruntime."""
        assert self._done is not None
        shapes = tuple(tensor.shape for tensor in tensors.values())
        if shapes not in self._bound:
            own = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
            self._bound[shapes] = self._bind(own, graph=len(self._bound) + 1)  # 0 is onnxruntime's own
        bound = self._bound[shapes]
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._done)  # a call on another stream, which uses the same memory
        for name, tensor in tensors.items():
            bound.inputs[name].copy_(tensor)
        stream.wait_stream(current)
        self._session.run_with_iobinding(bound.binding, bound.options)
        current.wait_stream(stream)
        logits = bound.logits.to(torch.float32, copy=True)
        self._done.record(current)
        return logits

    def _bind(self, tensors: dict[str, Tensor], graph: int | None = None) -> _Bound:
        size = size_of(tensors)
        logits = torch.empty(size, *self._output_shape, device=self.device, dtype=self._output_dtype)
        binding = self._session.io_binding()
        for name, tensor in tensors.items():
            _bind(binding.bind_input, name, tensor)
        _bind(binding.bind_output, self._output, logits)
        options = library().RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph is not None:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return _Bound(tensors, logits, binding, options)


def _input_tensor(found: Any, feed: Feed) -> InputTensor | None:
    """What a runner is given for an input of a file; None where nothing becomes it."""
    sizes = tuple(size if isinstance(size, int) else Free(str(size)) for size in found.shape[1:])
    if found.type == _ELEMENTS[torch.int64][0] and sizes:
        return InputTensor(found.name, "int64", sizes)
    if found.type != _ELEMENTS[feed.dtype][0] or not sizes:
        return None
    if feed.dtype is torch.uint8:  # pixels, which have their channels last
        return InputTensor(found.name, "float32", (sizes[2], sizes[0], sizes[1])) if len(sizes) == 3 else None
    return InputTensor(found.name, "float32", sizes)


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    element = _ELEMENTS[tensor.dtype][1]
    bind(name, "cuda", tensor.device.index, element, tuple(tensor.shape), tensor.data_ptr())


def _metadata(path: Path) -> dict[str, str]:
    """What the file says of its input, once all that it claims was held against what there is."""
    return {each.key: each.value for each in read_model(path).metadata_props}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
