"""ONNX: a network as one file that any loader opens, with a dynamic batch and batch norms folded into convolutions."""

from __future__ import annotations

import ast
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from litdeploy.batch import Batch, device_of, moved, size_of
from litdeploy.config.spec import NetworkSpec
from litdeploy.config.target import Precision
from litdeploy.errors import NetworkError, SettingsError
from litdeploy.exporter.build import BATCH, Built, ExportWrapper, Job, output_names
from litdeploy.exporter.precision import Conversion, quantize_onnx
from litdeploy.exporter.triton_repository import Signature, Tensor, TritonBackend
from litdeploy.files import write_whole
from litdeploy.networks import Network
from litdeploy.runtime import Runner, open_runner
from litdeploy.runtime.onnx_file import ends_of, read_model, shape_of
from litdeploy.version import __version__

# The limit of a protobuf message, hence of an ONNX file that is one file.
_MOST_BYTES = 2**31 - 2**20
# The first in which convolutions take bfloat16.
_BF16_OPSET = 22


# How long int8 is timed against fp32.
_WARM_UP, _SECONDS, _MOST_CALLS = 5, 1.0, 200


def build(job: Job, path: Path) -> Built:
    """Build an ONNX file; an int8 file is also timed against the float32 file, on the job's device."""
    with TemporaryDirectory(dir=path.parent) as folder:
        source = Path(folder) / "fp32.onnx"
        details = write_onnx(job, path, source)
        if job.precision == "int8":
            details["latency"] = _latency(job, source, path)
    return Built(details)


def write_onnx(job: Job, path: Path, source: Path) -> dict[str, Any]:
    """Write a job's network as ONNX; in int8 from its float32 file, which is left at `source`."""
    int8 = job.precision == "int8"
    details = export_onnx(
        job.network,
        source if int8 else path,
        job.target.opset,
        conversion=job.conversion,
        io_precision=job.io_precision,
        embedded=job.embed_preprocessing,
    )
    if not int8:
        return {**details, **job.conversion_details()}
    inputs = job.calibration_inputs
    return {
        **details,
        **quantize_onnx(source, path, inputs),
        "calibration": {"images": size_of(inputs), "method": "least and largest value"},
    }


def export_onnx(
    network: Network,
    path: Path,
    opset: int | None,
    *,
    conversion: Conversion | None = None,
    io_precision: Precision = "fp32",
    embedded: bool = False,
) -> dict[str, Any]:
    """Write a network as ONNX: float32 `images` (batch, C, H, W), normalized, to `logits` (batch, classes).

    Other networks take what their input spec names, for example int64 `input_ids` and `attention_mask` (batch, length).
    The file's metadata hold the input's description (normalization and shape of images) and the names of the classes.
    Nodes are named for the network's layers (`layer1.0.conv1/Conv_3`).

    Args:
        network: left unchanged.
        path: of the file; its folder is created.
        opset: ONNX operator set; None for the exporter's own, or the first that has the precision.
        conversion: the same network in another precision.
        io_precision: of floating-point inputs and of logits.
        embedded: whether `images` are pixels, uint8 (batch, H, W, C), which the file normalizes.

    Returns:
        A description of the saved file: `opset`, `input` and `input_shape` (of the first), `inputs` (name → shape),
        the same of outputs, `nodes`, `bytes`, and `unfolded_batch_norms`: how many follow a convolution.

    Raises:
        NetworkError: it cannot be exported, or not for any batch size, or it is larger than one file can be.
        SettingsError: the network cannot be written in that operator set.
    """
    _check_size(network)
    precision: Precision = conversion.precision if conversion else "fp32"
    if precision == "bf16":
        opset = _bf16_opset(opset)
    module = ExportWrapper.of(network, conversion, io_precision, embedded)
    model = _converted(module.cpu().eval(), network, opset)
    _strip(model, depth=2 if conversion else 1)
    _describe(
        model,
        network.spec,
        {
            "precision": precision,
            "io_precision": io_precision,
            "preprocessing": "embedded" if embedded else "outside",
        },
    )
    return _written(model, network, path, opset)


def _bf16_opset(opset: int | None) -> int:
    if opset is not None and opset < _BF16_OPSET:
        raise SettingsError(
            f"opset {opset}: has no convolution in bf16; the first that does is {_BF16_OPSET}. Set the target's "
            f"`opset` to {_BF16_OPSET} or leave it out, or export another precision: --precision fp16"
        )
    return opset or _BF16_OPSET


def _check_size(network: Network) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.module.state_dict().values())
    if size > _MOST_BYTES:
        raise NetworkError(
            f"{network.source}: its weights take {size / 2**30:.1f} GiB, and an ONNX file holds less than 2 GiB. "
            "Choose a shallower student."
        )


def _converted(module: ExportWrapper, network: Network, opset: int | None) -> Any:
    """The ONNX model (a ModelProto) as PyTorch's exporter and its optimizer make it."""
    call = module.call(moved(network.example(2, half=True), torch.device("cpu")))
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                call.args,
                kwargs=call.kwargs,
                dynamo=True,
                input_names=[each.name for each in module.inputs],
                dynamic_shapes=call.dynamic_shapes,
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise _not_exportable(network, _reason(error)) from error
    assert program is not None  # with dynamo=True
    model = program.model_proto
    _name_outputs(model.graph, output_names(network))
    return model


def _name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Name a graph's outputs. PyTorch's exporter would give two values one name if another value has it already, and
    one output less if a tensor is returned twice, or unchanged from the input."""
    from onnx.helper import make_node

    fixed = {each.name for each in (*graph.input, *graph.initializer)}
    renamed: dict[str, str] = {}
    identities = []
    for output, name in zip(graph.output, names, strict=True):
        if output.name in renamed or output.name in fixed:
            identities.append(make_node("Identity", [renamed.get(output.name, output.name)], [name]))
        else:
            renamed[output.name] = name
        output.name = name
    # Values inside that have the name of an output.
    renamed = {name: f"{name}.inner" for name in names} | renamed
    _rename(graph, renamed)
    graph.node.extend(identities)


def _rename(graph: Any, renamed: Mapping[str, str]) -> None:
    for node in graph.node:
        for places in (node.input, node.output):
            places[:] = [renamed.get(name, name) for name in places]
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(inner, renamed)
    for value in (*graph.value_info, *graph.initializer):
        value.name = renamed.get(value.name, value.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what PyTorch's exporter logs of itself; what concerns the network is raised, or read from the file.

    Its logger warns of operators of torchvision, which is not installed, and onnxscript's, with a traceback, of an
    operator set that was not reached: `_written` reads that back.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # torch.export copies its own tree specs, whose class is deprecated (torch 2.11 to 2.13).
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        # Two inputs share a size, which then has one name; `_written` reads it back.
        warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _reason(error: Exception) -> str:
    """The first line of what first went wrong."""
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(first).__name__


def _not_exportable(network: Network, reason: str) -> NetworkError:
    return NetworkError(
        f"{network.source}: PyTorch cannot export {network.spec.name} to ONNX for any batch size: {reason}. Its "
        f"forward must take {_taken(network)}, not branch on what is in it, and not fix the batch size; "
        'try torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).'
    )


def _taken(network: Network) -> str:
    names = [each.name for each in network.spec.input.tensors]
    return f"one tensor of {names[0]}" if len(names) == 1 else " and ".join(names)


def _strip(model: Any, depth: int) -> None:
    """Remove the exporter's notes: lines and paths of source code on the machine that exported.

    The layers that they name are kept in the names of the nodes.

    Args:
        depth: how many modules wrap the network.
    """
    graph = model.graph
    for index, node in enumerate(graph.node):
        scopes = {each.key: each.value for each in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
        # From the outermost module to the innermost, and the operation.
        innermost = (["", *ast.literal_eval(scopes)[:-1]])[-1]
        layer = ".".join(innermost.split(".")[depth:])
        node.name = f"{layer}/{node.op_type}_{index}"
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        del part.metadata_props[:]
        part.ClearField("doc_string")


def _describe(model: Any, spec: NetworkSpec, texts: dict[str, str]) -> None:
    from onnx.helper import set_model_props

    metadata = {"litdeploy": __version__, **texts, **spec.metadata()}
    set_model_props(model, metadata)


def _written(model: Any, network: Network, path: Path, opset: int | None) -> dict[str, Any]:
    """Save the model and describe the file, which gets its name only once its content is checked."""
    import onnx

    with write_whole(path) as temporary:
        onnx.save_model(model, temporary)
        try:
            onnx.checker.check_model(temporary, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise NetworkError(
                f"{network.source}: {network.spec.name} cannot be written as ONNX in this precision: "
                f"{str(error).strip().splitlines()[0]}. Export another: --precision fp32"
            ) from error
        saved = onnx.load_model(temporary)
        reached = next(each.version for each in saved.opset_import if each.domain in ("", "ai.onnx"))
        if opset is not None and reached != opset:
            raise SettingsError(
                f"opset {opset}: {network.spec.name} cannot be written in this ONNX operator set; the exporter of "
                f"PyTorch {torch.__version__} writes it in {reached}. Set the target's `opset` to {reached}, or "
                "leave it out."
            )
        ends = ends_of(saved.graph)
        shapes = {**ends["inputs"], **ends["outputs"]}
        names = [*(each.name for each in network.spec.input.tensors), *output_names(network)]
        if list(shapes) != names or any(shape[:1] != [BATCH] for shape in shapes.values()):
            found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise _not_exportable(network, f"the tensors in the file are {found}")
        return {
            "opset": reached,
            **ends,
            "nodes": len(saved.graph.node),
            "unfolded_batch_norms": _unfolded(saved.graph),
            "bytes": temporary.stat().st_size,
        }


def _unfolded(graph: Any) -> int:
    """Batch norms that take a convolution's output: work at each call that could have gone into the weights."""
    convolved = {name for node in graph.node if node.op_type == "Conv" for name in node.output}
    return sum(node.op_type == "BatchNormalization" and node.input[0] in convolved for node in graph.node)


def _latency(job: Job, fp32_path: Path, int8_path: Path) -> dict[str, Any]:
    size = job.target.batch_profile[0]
    limit = job.target.memory_limit
    with (
        open_runner("onnxruntime", path=fp32_path, device=job.device, memory_limit=limit) as fp32,
        open_runner("onnxruntime", path=int8_path, device=job.device, memory_limit=limit) as int8,
    ):
        fp32_ms, int8_ms = interleaved_ms(fp32, int8, moved(job.network.example(size), job.device))
    return {"batch_size": size, "fp32_ms": fp32_ms, "int8_ms": int8_ms}


def interleaved_ms(first: Runner, second: Runner, batch: Batch) -> tuple[float, float]:
    """Median wall-clock milliseconds of a call of each, in turn, with the device idle before and after.

    A short look, for one line at export. The profiler measures.

    Args:
        first, second: open, on one device.
        batch: what they take, on that device.
    """
    times: dict[Runner, list[float]] = {first: [], second: []}
    for runner in times:
        for _ in range(_WARM_UP):
            _call_ms(runner, batch)
    started = time.perf_counter()
    for _ in range(_MOST_CALLS):
        for runner, taken in times.items():
            taken.append(_call_ms(runner, batch))
        if time.perf_counter() - started > _SECONDS:
            break
    return median(times[first]), median(times[second])


def _call_ms(runner: Runner, batch: Batch) -> float:
    device = device_of(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter_ns()
    runner.run(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - start) / 1e6


def _signature(path: Path, details: dict[str, Any]) -> Signature:
    import onnx

    graph = read_model(path).graph

    def tensor(value: Any) -> Tensor:
        kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        return Tensor(value.name, {"float": "float32"}.get(kind, kind), tuple(shape_of(value)))

    return [tensor(each) for each in graph.input], [tensor(each) for each in graph.output]


TRITON = TritonBackend("onnxruntime", "onnxruntime_onnx", "model.onnx", "onnx", _signature)
