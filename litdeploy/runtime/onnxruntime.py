"""The runners `onnxruntime` and `onnxruntime-graph`: ONNX Runtime on the CPU or on CUDA."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from litdeploy.batch import Batch, size_of
from litdeploy.config.spec import AnyInput, Free, InputTensor, input_of
from litdeploy.errors import DependencyError, RunnerError, first_line
from litdeploy.files import is_file
from litdeploy.runtime.adapter import InputAdapter, answer, read_adapter, read_task
from litdeploy.runtime.device import device_name
from litdeploy.runtime.onnx_file import bfloat16_emulated, read_model
from litdeploy.runtime.runner import Description, Source, check_batch, check_precision, not_open
from litdeploy.tasks import task_of

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Expensive operations: if one falls back to the CPU, the GPU waits for it.
_COMPUTES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Attention", "MultiHeadAttention", "LSTM", "GRU"})
_ERRORS_ONLY = 3
# ONNX Runtime's name of each input type, and the element type to bind torch memory as; bfloat16 by its ONNX number.
_ELEMENTS: dict[torch.dtype, tuple[str, Any]] = {
    torch.float32: ("tensor(float)", np.float32),
    torch.float16: ("tensor(float16)", np.float16),
    torch.bfloat16: ("tensor(bfloat16)", 16),
    torch.uint8: ("tensor(uint8)", np.uint8),
    torch.int64: ("tensor(int64)", np.int64),
    torch.int32: ("tensor(int32)", np.int32),
    torch.bool: ("tensor(bool)", np.bool_),
}


@dataclass(frozen=True)
class _Output:
    """An output of a file: its type, and its sizes without the batch; free ones by name."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]


@dataclass(frozen=True)
class _Bound:
    """The memory that a run reads and writes; of a captured graph it is fixed. onnxruntime identifies the graph by a
    number."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    binding: Any
    options: Any


class OnnxRuntimeRunner:
    """Runs an ONNX file whose inputs are float32 or int64, batch first, and whose outputs its task knows.

    Inputs may have other types if the metadata that `litdeploy export` writes describes the conversion.

    With CUDA graphs, one per batch shape, the batch is copied into the graph's inputs and its outputs are copied.
    """

    def __init__(self, source: Source, device: torch.device, precision: str, cuda_graph: bool = False) -> None:
        """`precision` is only validated: the file has its own, which `describe` reports."""
        self.name = "onnxruntime-graph" if cuda_graph else "onnxruntime"
        self.device = device
        self._cuda_graph = cuda_graph
        self._path = source.needed_path(self.name)
        check_precision(self.name, precision, ("fp32", "fp16", "bf16", "int8"))
        if device.type not in PROVIDERS:
            raise RunnerError(f"the runner '{self.name}' runs on cpu and cuda, not on {device}.")
        if cuda_graph and device.type != "cuda":
            raise RunnerError(
                f"the runner '{self.name}' runs on cuda, not on {device}. Use --device cuda, or the runner "
                "'onnxruntime'."
            )
        self._memory_limit = source.memory_limit
        self._adapter = InputAdapter()
        self._session: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None
        self._bound: dict[tuple[torch.Size, ...], _Bound] = {}
        self._inputs: tuple[InputTensor, ...] = ()
        self._task = task_of(None)
        self._outputs: tuple[_Output, ...] = ()
        self._build_seconds = 0.0

    def __enter__(self) -> Self:
        ort = library()
        if not is_file(self._path):
            raise RunnerError(f"{self._path}: no such file. Create it: litdeploy export")
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
            torch.cuda.synchronize(self.device)  # queued work still uses the graphs' memory
        self._bound.clear()
        self._session = self._stream = self._done = None

    def run(self, batch: Batch) -> Batch:
        """See `Runner.run`."""
        if self._session is None:
            raise not_open(self.name)
        check_batch(self.name, batch, self._inputs, self.device)
        taken = self._adapter.adapt(batch)
        tensors = taken if isinstance(taken, dict) else {self._inputs[0].name: taken}
        try:
            if self._stream is None:
                return answer(self._run_on_cpu(tensors), self._task)
            return answer(
                (self._replayed if self._cuda_graph else self._run_on_cuda)(tensors, self._stream), self._task
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise RunnerError(f"{self._path}: onnxruntime cannot run it: {first_line(error)}") from error

    def describe(self) -> Description:
        """See `Runner.describe`."""
        return Description(
            runner=self.name,
            device=device_name(self.device),
            precision=self._adapter.precision,
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
        # Its threads spin after a call, on the cores that the next runner needs. Two alternating sessions on two cores
        # (ResNet-20, batch 8): 22.0 ms per call with spinning, 11.5 ms without; a single session is no slower.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider = PROVIDERS[self.device.type]
        settings = self._cuda_settings()
        metadata = _metadata(self._path)
        self._adapter = read_adapter(metadata, str(self._path))
        try:
            model = bfloat16_emulated(self._path) if self._rounds() else str(self._path)
            session = ort.InferenceSession(model, options, providers=[(provider, settings)])
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise RunnerError(
                f"{self._path}: not an ONNX file that onnxruntime {ort.__version__} can open ({first_line(error)}). "
                "Export it again: litdeploy export"
            ) from error
        if provider not in session.get_providers():
            built_for = getattr(ort, "cuda_version", "") or "another version"
            raise no_cuda(
                ort, self.device, f"its CUDA provider (for CUDA {built_for}) did not load; its log above says why"
            )
        # Otherwise a call that fails on CUDA is silently repeated in a new session on the CPU.
        session.disable_fallback()
        check_placement(session, provider, self._path)
        spec = input_of(metadata)
        self._task = read_task(metadata, spec, str(self._path))
        self._read_signature(session, spec)
        return session

    def _cuda_settings(self) -> dict[str, str]:
        """Options of the CUDA provider; empty on the CPU."""
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
        """Whether bfloat16 is emulated in float32: ONNX Runtime has no bfloat16 kernels for the CPU."""
        return self._adapter.precision == "bf16" and self.device.type == "cpu"

    def _read_signature(self, session: Any, spec: AnyInput | None) -> None:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if not inputs or not outputs:
            raise RunnerError(
                f"{self._path}: has {len(inputs)} inputs and {len(outputs)} outputs; at least one of each is needed."
            )
        if self._rounds() and self._adapter.dtype is torch.bfloat16:
            self._adapter = replace(self._adapter, dtype=torch.float32)
        kinds = {name: dtype for dtype, (name, _) in _ELEMENTS.items()}
        taken = [_input_tensor(each, self._adapter) for each in inputs]
        known = tuple(each for each in taken if each is not None)
        wanted = outputs if self._task.several else outputs[:1]
        found = [_Output(each.name, kinds[each.type], tuple(each.shape[1:])) for each in wanted if each.type in kinds]
        fits = len(found) == len(wanted) and self._task.class_count(found[0].sizes, spec) is not None
        fits = fits and (self._task.several or found[0].dtype.is_floating_point)
        if not known or len(known) < len(inputs) or not fits:
            there = ", ".join(f"{each.name} {each.type} {each.shape}" for each in (*inputs, *outputs))
            raise RunnerError(
                f"{self._path}: not a network as `litdeploy export` writes it: float32 or int64 inputs, batch "
                f"first, such as images (N, C, H, W), and logits (N, classes), or another output if its metadata say "
                f"which task it has, are needed; it has {there}."
            )
        # The metadata bounds the dynamic sizes; the graph does not.
        stated = () if spec is None else spec.tensors
        self._inputs = stated if [each.name for each in stated] == [each.name for each in known] else known
        self._outputs = tuple(found)

    def _run_on_cpu(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [each.name for each in self._outputs]
        values = self._session.run(names, {name: tensor.numpy() for name, tensor in tensors.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    def _run_on_cuda(self, tensors: dict[str, Tensor], stream: torch.cuda.Stream) -> dict[str, Tensor]:
        """Run in torch's memory, on a stream ordered with the current one; the host does not wait."""
        bound = self._bind(tensors)
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        self._session.run_with_iobinding(bound.binding, bound.options)
        current.wait_stream(stream)
        return bound.outputs

    def _replayed(self, tensors: dict[str, Tensor], stream: torch.cuda.Stream) -> dict[str, Tensor]:
        """Run the graph of these shapes; onnxruntime captures it at the first call with them."""
        assert self._done is not None
        shapes = tuple(tensor.shape for tensor in tensors.values())
        if shapes not in self._bound:
            own = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
            self._bound[shapes] = self._bind(own, graph=len(self._bound) + 1)  # 0 is reserved by onnxruntime
        bound = self._bound[shapes]
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._done)  # a call on another stream uses the same memory
        for name, tensor in tensors.items():
            bound.inputs[name].copy_(tensor)
        stream.wait_stream(current)
        self._session.run_with_iobinding(bound.binding, bound.options)
        current.wait_stream(stream)
        outputs = {name: tensor.clone() for name, tensor in bound.outputs.items()}
        self._done.record(current)
        return outputs

    def _bind(self, tensors: dict[str, Tensor], graph: int | None = None) -> _Bound:
        size = size_of(tensors)
        free = _free_sizes(self._inputs, tensors)
        outputs = {
            each.name: torch.empty(size, *self._sizes(each, free), device=self.device, dtype=each.dtype)
            for each in self._outputs
        }
        binding = self._session.io_binding()
        for name, tensor in tensors.items():
            _bind(binding.bind_input, name, tensor)
        for name, tensor in outputs.items():
            _bind(binding.bind_output, name, tensor)
        options = library().RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph is not None:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return _Bound(tensors, outputs, binding, options)

    def _sizes(self, output: _Output, free: dict[str, int]) -> list[int]:
        """An output's sizes in one run.

        Raises:
            RunnerError: one of them is none of the inputs' free sizes: its memory cannot be bound before the run.
        """
        unknown = [size for size in output.sizes if isinstance(size, str) and size not in free]
        if unknown:
            raise RunnerError(
                f"{self._path}: the sizes of its output {output.name} ({', '.join(unknown)}) are known only after a "
                "run, and the runner binds memory before it. Run it on --device cpu, or in another runner."
            )
        return [free[size] if isinstance(size, str) else size for size in output.sizes]


def graph_runner(source: Source, device: torch.device, precision: str) -> OnnxRuntimeRunner:
    """The runner through CUDA graphs."""
    return OnnxRuntimeRunner(source, device, precision, cuda_graph=True)


def check_placement(session: Any, provider: str, path: Path) -> None:
    """Check that a session runs its expensive operations with its provider; shape arithmetic may stay on the CPU.

    Raises:
        RunnerError: some fall back to another provider, which onnxruntime does silently if a kernel is missing.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # missing from some supported versions
        return
    elsewhere = Counter(
        f"{node.op_type} on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type.removeprefix("Fused") in _COMPUTES
    )
    if elsewhere:
        operations = ", ".join(f"{count} {what}" for what, count in elsewhere.items())
        raise RunnerError(
            f"{path}: onnxruntime does not run all of it with the {provider}: {operations}. Export it in a "
            "precision that this provider supports (litdeploy export --onnx --precision fp32), or use --device cpu."
        )


def library() -> Any:
    """Import onnxruntime.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            f"the runner 'onnxruntime' needs onnxruntime ({error}). Install it: pip install onnxruntime-gpu "
            "(or onnxruntime, if there is no GPU build for this platform)"
        ) from None
    return onnxruntime


def check_cuda(ort: Any, device: torch.device) -> None:
    """Check for CUDA before a session is created, for a clearer message than its log.

    Raises:
        RunnerError: CUDA cannot be used.
    """
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise no_cuda(ort, device, "it was built without CUDA")
    if not torch.cuda.is_available():
        raise no_cuda(ort, device, "PyTorch finds no CUDA device here")


def no_cuda(ort: Any, device: torch.device, reason: str) -> RunnerError:
    """The error of an onnxruntime that cannot use the GPU."""
    built_for = torch.version.cuda
    match = f"the onnxruntime-gpu for CUDA {built_for.split('.')[0]}" if built_for else "onnxruntime-gpu"
    return RunnerError(
        f"onnxruntime {ort.__version__} cannot run on {device}: {reason}. Its providers: "
        f"{', '.join(ort.get_available_providers())}; PyTorch {torch.__version__} is built for "
        f"{f'CUDA {built_for}' if built_for else 'the CPU'}. Run on --device cpu, or install PyTorch for CUDA and "
        f"{match}: pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


def _input_tensor(found: Any, adapter: InputAdapter) -> InputTensor | None:
    """The runner's tensor for a file's input; None if its type cannot be provided."""
    sizes = tuple(size if isinstance(size, int) else Free(str(size)) for size in found.shape[1:])
    if found.type == _ELEMENTS[torch.int64][0] and sizes:
        return InputTensor(found.name, "int64", sizes)
    if found.type != _ELEMENTS[adapter.dtype][0] or not sizes:
        return None
    if adapter.dtype is torch.uint8:  # pixels have their channels last
        return InputTensor(found.name, "float32", (sizes[2], sizes[0], sizes[1])) if len(sizes) == 3 else None
    return InputTensor(found.name, "float32", sizes)


def _free_sizes(inputs: Sequence[InputTensor], given: dict[str, Tensor]) -> dict[str, int]:
    """Name → value of the free sizes in a batch."""
    return {
        size.name: length
        for each in inputs
        for size, length in zip(each.shape, given[each.name].shape[1:], strict=False)
        if isinstance(size, Free)
    }


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    element = _ELEMENTS[tensor.dtype][1]
    bind(name, "cuda", tensor.device.index, element, tuple(tensor.shape), tensor.data_ptr())


def _metadata(path: Path) -> dict[str, str]:
    """Metadata of the file, after its claimed sizes were checked."""
    return {each.key: each.value for each in read_model(path).metadata_props}
