"""The runners `tensorrt` and `tensorrt-graph`: a TensorRT engine on the GPU it was built for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from litdeploy.batch import Batch, size_of
from litdeploy.config.spec import InputTensor, input_of
from litdeploy.errors import RunnerError
from litdeploy.runtime.adapter import InputAdapter, answer, read_adapter, read_task
from litdeploy.runtime.device import DTYPES, device_name
from litdeploy.runtime.engine import Engine, capability_of, load_library, logger_of, read_engine
from litdeploy.runtime.runner import Description, Source, check_batch, check_precision, not_open
from litdeploy.tasks import Task, task_of

_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_OUTPUT_TYPES = _TYPES | {"int64": torch.int64, "int32": torch.int32, "bool": torch.bool}


@dataclass
class _Captured:
    """The CUDA graph of one batch size, and the tensors that it reads and writes.

    It has its own context: a graph replays with the scratch memory of the context it was captured from.
    """

    graph: torch.cuda.CUDAGraph
    context: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class TensorRTRunner:
    """Runs an engine that takes images (N, C, H, W), alone or with further tensors, and returns what its task has.

    The images may be pixels, uint8 (N, H, W, C), if the metadata describes the normalization.

    Batches are read and outputs written in PyTorch's memory: nothing is copied unless the engine's type
    is not float32. With CUDA graphs, one per batch size, the batch is copied into the graph's input and the output out
    of it.
    """

    def __init__(self, source: Source, device: torch.device, precision: str, cuda_graph: bool = False) -> None:
        """`precision` is only validated: the engine has its own, which `describe` reports."""
        self.name = "tensorrt-graph" if cuda_graph else "tensorrt"
        self.device = device
        self._path = source.needed_path(self.name)
        check_precision(self.name, precision, _PRECISIONS)
        if device.type != "cuda":
            raise RunnerError(f"the runner '{self.name}' runs on cuda, not on {device}. Use --device cuda.")
        self._cuda_graph = cuda_graph
        self._adapter = InputAdapter()
        self._task = task_of(None)
        self._built: Engine | None = None
        self._engine: Any = None
        self._context: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None
        self._captured: dict[int, _Captured] = {}
        self._build_seconds = 0.0

    def __enter__(self) -> Self:
        self._built = built = read_engine(self._path)
        self._adapter, self._task = _checked(built)
        trt = load_library(built.details.library)
        if not torch.cuda.is_available():
            raise RunnerError(f"{self._path}: an engine needs a CUDA GPU, and PyTorch finds none.")
        built.check(str(trt.__version__), capability_of(self.device))
        started = time.perf_counter()
        with torch.cuda.device(self.device):
            self._engine = self._loaded(trt, built)
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._context = self._new_context()
        self._build_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self.device)  # queued work still uses the context's memory
        self._captured.clear()
        self._context = self._engine = self._built = self._stream = self._done = None

    def run(self, batch: Batch) -> Batch:
        """See `Runner.run`. A batch size outside the engine's profile raises an error."""
        if self._built is None or self._context is None:
            raise not_open(self.name)
        details = self._built.details
        check_batch(self.name, batch, _taken(self._built, self._adapter), self.device)
        sizes, size = details.batches, size_of(batch)
        if not sizes.min <= size <= sizes.max:
            raise RunnerError(
                f"{self._path}: takes batches of {sizes.min} to {sizes.max} images, got {size}. Split the "
                "batch, or build an engine for it: set the target's `batch_sizes`, and litdeploy export --trt"
            )
        taken = self._adapter.adapt(batch)
        inputs = taken if isinstance(taken, dict) else {details.input: taken}
        with torch.cuda.device(self.device):
            if self._cuda_graph:
                return answer(self._replayed(inputs), self._task)
            outputs = self._empty_outputs(size)
            self._enqueue(self._context, inputs, outputs)
            return answer(outputs, self._task)

    def describe(self) -> Description:
        """See `Runner.describe`."""
        built = read_engine(self._path) if self._built is None else self._built
        return Description(
            runner=self.name,
            device=device_name(self.device),
            precision=built.artefact.precision,
            mode=f"{built.details.library}{', CUDA graph' if self._cuda_graph else ''}",
            versions={built.details.library: built.version},
            build_seconds=self._build_seconds,
        )

    def _loaded(self, trt: Any, built: Engine) -> Any:
        log = logger_of(built.details.library)
        log.errors.clear()
        runtime = trt.Runtime(log)
        runtime.engine_host_code_allowed = built.details.version_compatible
        engine = runtime.deserialize_cuda_engine(built.content)
        if engine is None:
            raise self._failed("cannot load it")
        return engine

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise self._failed("cannot create an execution context (is the GPU's memory full?)")
        return context

    def _empty_outputs(self, size: int) -> dict[str, Tensor]:
        assert self._built is not None
        return {
            name: torch.empty(size, *map(int, shape[1:]), dtype=_OUTPUT_TYPES[kind], device=self.device)
            for name, (kind, shape) in self._built.details.every_output.items()
        }

    def _enqueue(self, context: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Enqueue one run in the current stream's order.

        On the default stream TensorRT would synchronize at each call, so the runner's own stream is used instead.
        """
        assert self._stream is not None
        assert self._done is not None
        current = torch.cuda.current_stream(self.device)
        stream = current if current.cuda_stream else self._stream
        capturing = torch.cuda.is_current_stream_capturing()
        if stream is not current:
            stream.wait_stream(current)
        if not capturing:
            stream.wait_event(self._done)  # a run on another stream uses the same scratch memory
        self._execute(context, inputs, outputs, stream)
        if not capturing:
            self._done.record(stream)
        if stream is not current:
            current.wait_stream(stream)

    def _execute(
        self, context: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor], stream: torch.cuda.Stream
    ) -> None:
        ready = all(
            context.set_input_shape(name, tuple(tensor.shape)) and context.set_tensor_address(name, tensor.data_ptr())
            for name, tensor in inputs.items()
        ) and all(context.set_tensor_address(name, tensor.data_ptr()) for name, tensor in outputs.items())
        if not ready or not context.execute_async_v3(stream.cuda_stream):
            raise self._failed("cannot run it")

    def _replayed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self._done is not None
        size = size_of(inputs)
        captured = self._captured.get(size)
        if captured is None:
            own = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
            captured = self._captured[size] = self._capture(own)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._done)  # a replay on another stream uses the same tensors
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        outputs = {name: tensor.clone() for name, tensor in captured.outputs.items()}
        self._done.record(stream)
        return outputs

    def _capture(self, inputs: dict[str, Tensor]) -> _Captured:
        assert self._stream is not None
        context, outputs = self._new_context(), self._empty_outputs(size_of(inputs))
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        # The first run with a shape allocates memory, which is not allowed during capture.
        with torch.cuda.stream(self._stream):
            self._execute(context, {name: own.zero_() for name, own in inputs.items()}, outputs, self._stream)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._execute(context, inputs, outputs, self._stream)
        return _Captured(graph, context, inputs, outputs)

    def _failed(self, what: str) -> RunnerError:
        assert self._built is not None
        log = logger_of(self._built.details.library)
        reasons = "\n".join(f"  {error}" for error in log.errors) or "  (no reason given)"
        log.errors.clear()
        return RunnerError(f"{self._path}: {self._built.details.library} {what}:\n{reasons}")


def graph_runner(source: Source, device: torch.device, precision: str) -> TensorRTRunner:
    """The runner through CUDA graphs."""
    return TensorRTRunner(source, device, precision, cuda_graph=True)


def _taken(built: Engine, adapter: InputAdapter) -> tuple[InputTensor, ...]:
    """Input tensors of a runner for an engine."""
    spec = input_of(built.details.metadata)
    if spec is not None and len(spec.tensors) > 1:
        return spec.tensors
    return (InputTensor(built.details.input, "float32", _image_shape(built.details.input_shape, adapter)),)


def _image_shape(input_shape: Sequence[int | str], adapter: InputAdapter) -> tuple[int, ...]:
    """Shape (C, H, W) of one image; pixels have their channels last."""
    sizes = [int(size) for size in input_shape[1:]]
    return (sizes[2], sizes[0], sizes[1]) if adapter.dtype is torch.uint8 else tuple(sizes)


def _checked(built: Engine) -> tuple[InputAdapter, Task[Any]]:
    """The adapter and the task of an engine, after its inputs and outputs were checked.

    Raises:
        RunnerError: a runner cannot run the engine.
    """
    details, adapter = built.details, read_adapter(built.details.metadata, str(built.path))
    images, outputs = details.input_shape, details.every_output
    pixels = details.input_type == "uint8" and adapter.dtype is torch.uint8
    typed = (pixels or details.input_type in _TYPES) and all(kind in _OUTPUT_TYPES for kind, _ in outputs.values())
    ends = [images, *(shape for _, shape in outputs.values())]
    fixed = all(isinstance(size, int) for shape in ends for size in shape[1:])
    spec = input_of(details.metadata)
    several = [] if spec is None or len(spec.tensors) == 1 else [each.name for each in spec.tensors]
    named = list(details.inputs) == several if several else len(details.inputs) <= 1
    task = read_task(details.metadata, spec, str(built.path))
    fits = task.class_count(ends[1][1:], spec) is not None and (task.several or details.output_type in _TYPES)
    if not typed or not fixed or not named or not fits or len(images) != 4:
        raise RunnerError(
            f"{built.path}: not an engine as `litdeploy export` builds it: one floating-point input "
            f"(N, C, H, W) and logits (N, classes), or the outputs of another task, are needed, but it has "
            f"{details.input} {details.input_type} {list(images)} and "
            + ", ".join(f"{name} {kind} {list(shape)}" for name, (kind, shape) in outputs.items())
            + "."
        )
    return adapter if pixels else replace(adapter, dtype=_TYPES[details.input_type]), task
