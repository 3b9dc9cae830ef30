"""AOTInductor: a network as one `.pt2`, compiled ahead of time, which torch loads without the network's code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from litdeploy.batch import moved
from litdeploy.config.spec import InputSpec, input_of
from litdeploy.config.target import Precision, Target
from litdeploy.errors import NetworkError, RunnerError, SettingsError
from litdeploy.exporter.build import BATCH, Built, ExportWrapper, Job, output_names
from litdeploy.exporter.precision import Conversion
from litdeploy.exporter.triton_repository import Signature, Tensor, TritonBackend
from litdeploy.networks import Network
from litdeploy.runtime.adapter import read_task
from litdeploy.runtime.inductor import built_for, inputs_of
from litdeploy.version import __version__

_IO_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def build(job: Job, path: Path) -> Built:
    """Build a package for the job's device."""
    details = export_aoti(
        job.network,
        path,
        job.device,
        conversion=job.conversion,
        io_precision=job.io_precision,
        embedded=job.embed_preprocessing,
    )
    return Built({**details, **job.conversion_details()})


def check(target: Target, device: torch.device, options: Mapping[str, Any]) -> None:
    """Make sure that the GPU here is the target's: a package is compiled for the GPU at hand.

    Raises:
        SettingsError: it is another kind.
    """
    if target.compute_capability is None or device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if target.compute_capability != f"{major}.{minor}":
        raise SettingsError(
            f"--aoti compiles for the GPU at hand, {torch.cuda.get_device_name(device)} (compute capability "
            f"{major}.{minor}), and the target has {target.compute_capability}. Run it on a GPU of that kind, "
            "or export --onnx."
        )


def identity(device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a package depends on."""
    return {"built_for": built_for(device)}


def export_aoti(
    network: Network,
    path: Path,
    device: torch.device,
    *,
    conversion: Conversion | None = None,
    io_precision: Precision = "fp32",
    embedded: bool = False,
) -> dict[str, Any]:
    """Compile a network ahead of time, for any batch size, for a processor like this one or the GPU at hand.

    Args:
        network: left unchanged.
        path: of the file; ends in `.pt2`.
        device: to compile for.
        conversion: the same network in another precision.
        io_precision: of floating-point inputs and of logits.
        embedded: whether the input is pixels, uint8 (batch, H, W, C), which the package normalizes.

    Returns:
        `inputs` (name → shape), `outputs` (name → type and shape), `image_shape` (C, H, W) if it takes images,
        `classes` (how many), `metadata` (of its
        input, names of the classes, precisions), `built_for` and `bytes`.

    Raises:
        NetworkError: it cannot be exported for any batch size.
        RunnerError: it cannot be compiled here.
    """
    module = ExportWrapper.of(network, conversion, io_precision, embedded)
    metadata = _metadata(network, conversion.precision if conversion else "fp32", io_precision, embedded)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        # torch warns of its own tree specs, and of classes that Inductor loads (2.11 to 2.13).
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is ", DeprecationWarning)
        names = output_names(network)
        program = _program(module.to(device).eval(), network, device)
        outputs = _outputs(program, names, network)
        _compile(program, path, network, device, metadata)
    return {
        "inputs": {
            each.name: ["batch", *(size if isinstance(size, int) else size.name for size in each.shape)]
            for each in network.spec.input.tensors
        },
        "outputs": outputs,
        **({"image_shape": list(network.spec.input.shape)} if isinstance(network.spec.input, InputSpec) else {}),
        "classes": network.class_count(),
        "metadata": metadata,
        "built_for": built_for(device),
        "bytes": path.stat().st_size,
    }


def _metadata(network: Network, precision: str, io_precision: str, embedded: bool) -> dict[str, str]:
    """The same keys as an ONNX file has."""
    spec = network.spec
    return {
        "litdeploy": __version__,
        "precision": precision,
        "io_precision": io_precision,
        "preprocessing": "embedded" if embedded else "outside",
        **spec.metadata(),
    }


def _program(module: ExportWrapper, network: Network, device: torch.device) -> Any:
    call = module.call(moved(network.example(2, half=True), device))
    try:
        return torch.export.export(module, call.args, call.kwargs, dynamic_shapes=call.dynamic_shapes, strict=False)
    except Exception as error:  # its many kinds of errors have no common base
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise NetworkError(
            f"{network.source}: torch.export cannot export {network.spec.name} for any batch size: "
            f"{reason.rstrip('.:')}. Its forward must take what its input spec says, not branch on what is in it, and "
            "not fix the batch size."
        ) from error


def _outputs(program: Any, names: Sequence[str], network: Network) -> dict[str, dict[str, Any]]:
    """Name → type and shape of the outputs of an exported program; the free sizes of the inputs have their names.

    Raises:
        NetworkError: one of them has no batch.
    """
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    given = [nodes[name] for name in program.graph_signature.user_inputs]
    known = {str(given[0].shape[0]): BATCH}
    for value, tensor in zip(given, network.spec.input.tensors, strict=True):
        for size, stated in zip(value.shape[1:], tensor.shape, strict=False):
            if not isinstance(stated, int):
                known[str(size)] = stated.name
    found = {}
    for name, node in zip(names, program.graph_signature.user_outputs, strict=True):
        shape = [int(size) if str(size).isdecimal() else known.get(str(size), str(size)) for size in nodes[node].shape]
        if shape[:1] != [BATCH]:
            raise NetworkError(f"{network.source}: its output {name} has the shape {shape}, without the batch.")
        found[name] = {"type": str(nodes[node].dtype).removeprefix("torch."), "shape": shape}
    return found


def _compile(program: Any, path: Path, network: Network, device: torch.device, metadata: dict[str, str]) -> None:
    configs = {
        "aot_inductor.metadata": metadata,
        # Packs weights as the processor's library takes them. ResNet-20 on a busy EPYC, one thread, batch 64: 117 to
        # 124 ms with it, 141 to 200 ms without; no slower at 1 and 8.
        "freezing": device.type == "cpu",
    }
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    except OSError:
        raise
    except Exception as error:  # Inductor's and the compiler's
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RunnerError(
            f"{network.source}: AOTInductor cannot compile {network.spec.name} here ({reason.rstrip('.:')}). It needs "
            "a C++ compiler (apt-get install g++) and, for CUDA, Triton and the CUDA toolkit. Or export --onnx alone."
        ) from error


def _signature(path: Path, details: dict[str, Any]) -> Signature:
    """A package's tensors are known by their places and have no names."""
    metadata = details["metadata"]
    kind = _IO_TYPES[metadata.get("io_precision", "fp32")]
    pixels = metadata.get("preprocessing") == "embedded"  # uint8 (N, H, W, C)
    sources = []
    for place, tensor in enumerate(inputs_of(details)):
        shape = [size if isinstance(size, int) else size.name for size in tensor.shape]
        shape = shape[1:] + shape[:1] if pixels else shape
        type_ = "uint8" if pixels else kind if tensor.dtype == "float32" else tensor.dtype
        sources.append(Tensor(f"INPUT__{place}", type_, ("batch", *shape)))
    if "outputs" in details:
        ends = enumerate(details["outputs"].values())
        return sources, [Tensor(f"OUTPUT__{place}", each["type"], tuple(each["shape"])) for place, each in ends]
    spec = input_of(metadata)  # a package of an older version
    classes = len(json.loads(metadata.get("classes", "[]"))) or "classes"
    output = (classes,) if spec is None else read_task(metadata, spec, str(path)).output_shape(spec, classes)
    return sources, [Tensor("OUTPUT__0", kind, ("batch", *output))]


# Triton 26.05 runs one request at a time with an AOTInductor package, and ignores its names of inputs and outputs.
TRITON = TritonBackend("pytorch", "torch_aoti", "model.pt2", "inductor", _signature, batches=False)
