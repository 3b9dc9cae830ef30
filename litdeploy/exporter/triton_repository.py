"""A model repository for NVIDIA's Triton Inference Server: `tritonserver --model-repository DIR` serves it as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from litdeploy.config.spec import TranslationInput, input_of
from litdeploy.errors import BundleError, SettingsError
from litdeploy.files import remove, sha256_of
from litdeploy.runtime.inductor import inputs_of
from litdeploy.runtime.onnx_file import read_model
from litdeploy.storage.records import Artefact

# Microseconds that a request may wait for others to share its batch.
QUEUE_DELAY_US = 100
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "uint8": "TYPE_UINT8",
    "int64": "TYPE_INT64",
}
_IO_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_OURS = {"config.pbtxt", "labels.txt", "1"}


class _Word(str):
    """A name of an enumeration's value, written without quotes."""


@dataclass(frozen=True)
class _Backend:
    """How Triton runs a kind of file.

    Attributes:
        batches: whether it puts requests together. PyTorch's AOTInductor packages run one request at a time: Triton
            26.05 neither batches them nor takes their own names of inputs and outputs.
    """

    name: str
    platform: str
    file: str
    model: str
    batches: bool = True


_BACKENDS = {
    ".onnx": _Backend("onnxruntime", "onnxruntime_onnx", "model.onnx", "onnx"),
    ".engine": _Backend("tensorrt", "tensorrt_plan", "model.plan", "tensorrt"),
    ".plan": _Backend("tensorrt", "tensorrt_plan", "model.plan", "tensorrt"),
    ".pt2": _Backend("pytorch", "torch_aoti", "model.pt2", "inductor", batches=False),
}


@dataclass(frozen=True)
class _Tensor:
    name: str
    kind: str
    shape: tuple[int | str, ...]


def triton_repository(
    artefacts: Iterable[tuple[Path, Artefact]],
    out_dir: Path,
    *,
    classes: Sequence[str],
    batch_sizes: Sequence[int],
    device: Literal["cpu", "cuda"],
) -> list[Path]:
    """Writes one model for each artefact: `NAME-onnx`, `NAME-tensorrt` or `NAME-inductor`.

    Each has one version, which holds a copy of the file, a `config.pbtxt` with dynamic batching, one instance a device
    and warm-up, and the names of the classes in `labels.txt`.

    Args:
        artefacts: files (.onnx, .engine, .pt2) and what their sidecars say. Details that are used: of an engine its
            `EngineDetails`, of a package `metadata`; an ONNX file tells all itself.
        out_dir: of the repository; other models in it are left as they are.
        classes: names in the order of the logits; empty where they are not known.
        batch_sizes: those of the target. The largest is the most that Triton puts together, and each is warmed up.
        device: where the server runs ONNX and .pt2; engines run on a GPU in any case.

    Returns:
        The models' folders.

    Raises:
        SettingsError: a file that Triton does not run, or two of one name.
        BundleError: a file that is not the artefact's, or that cannot be written, or a folder of somebody else's.
    """
    written: list[Path] = []
    for path, artefact in artefacts:
        backend = _backend(path, artefact)
        folder = out_dir / f"{path.stem}-{backend.model}"
        if folder in written:
            raise SettingsError(
                f"{path}: another artefact is served as {folder.name} already. Rename one of the files."
            )
        sources, result = _signature(path, artefact.details)
        sizes = _batches(path, artefact, batch_sizes, backend, sources[0])
        config = _config(folder.name, backend, sources, result, sizes)
        kind = "KIND_CPU" if device == "cpu" and backend.name != "tensorrt" else "KIND_GPU"
        config["instance_group"] = [{"count": 1, "kind": _Word(kind)}]
        if classes:
            config["output"][0]["label_filename"] = "labels.txt"
        _write(folder, path, backend, "".join(_text(config)), classes)
        written.append(folder)
    return written


def _backend(path: Path, artefact: Artefact) -> _Backend:
    backend = _BACKENDS.get(path.suffix)
    if backend is None:
        raise SettingsError(f"{path}: Triton serves {', '.join(_BACKENDS)}; this is none of them.")
    if artefact.details.get("library") == "tensorrt_rtx":
        raise SettingsError(
            f"{path}: Triton's TensorRT backend loads engines of tensorrt, and this one is tensorrt_rtx's. Build one "
            "with tensorrt, on the server's GPU (litdeploy export --trt), or serve the ONNX file."
        )
    if not path.is_file() or sha256_of(path) != artefact.sha256:
        raise BundleError(f"{path}: missing, or altered since it was exported (its SHA-256 differs). Export it again.")
    return backend


def _signature(path: Path, details: Mapping[str, Any]) -> tuple[list[_Tensor], _Tensor]:
    """Inputs and output, batch first."""
    if path.suffix == ".onnx":
        return _onnx_signature(path)
    if path.suffix == ".pt2":
        return _package_signature(details)
    source, result = (
        _Tensor(details[key], details[f"{key}_type"], tuple(details[f"{key}_shape"])) for key in ("input", "output")
    )
    return [source], result


def _package_signature(details: Mapping[str, Any]) -> tuple[list[_Tensor], _Tensor]:
    """Of an AOTInductor package, whose tensors have no names but their places."""
    metadata = details["metadata"]
    kind = _IO_TYPES[metadata.get("io_precision", "fp32")]
    pixels = metadata.get("preprocessing") == "embedded"  # uint8 (N, H, W, C)
    sources = []
    for place, tensor in enumerate(inputs_of(details)):
        shape = [size if isinstance(size, int) else size.name for size in tensor.shape]
        shape = shape[1:] + shape[:1] if pixels else shape
        type_ = "uint8" if pixels else kind if tensor.dtype == "float32" else tensor.dtype
        sources.append(_Tensor(f"INPUT__{place}", type_, ("batch", *shape)))
    spec = input_of(metadata)
    if isinstance(spec, TranslationInput):
        return sources, _Tensor("OUTPUT__0", kind, ("batch", *spec.shape))
    classes = len(json.loads(metadata.get("classes", "[]"))) or "classes"
    return sources, _Tensor("OUTPUT__0", kind, ("batch", classes))


def _onnx_signature(path: Path) -> tuple[list[_Tensor], _Tensor]:
    import onnx

    graph = read_model(path).graph
    tensors = []
    for value in (*graph.input, graph.output[0]):
        kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        shape = tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        tensors.append(_Tensor(value.name, {"float": "float32"}.get(kind, kind), shape))
    return tensors[:-1], tensors[-1]


def _batches(
    path: Path, artefact: Artefact, batch_sizes: Sequence[int], backend: _Backend, source: _Tensor
) -> tuple[int, ...]:
    """The batch sizes that are served, ascending.

    Raises:
        SettingsError: the artefact does not take them all.
    """
    if isinstance(source.shape[0], int):
        return (source.shape[0],)
    wanted = tuple(sorted({1, *batch_sizes}))
    if backend.name != "tensorrt":
        return wanted
    smallest, _, largest = (int(artefact.details["batches"][key]) for key in ("min", "opt", "max"))
    if smallest > 1:
        raise SettingsError(
            f"{path}: takes batches from {smallest}, and Triton asks for single images too. Build it for them: put 1 "
            "among the target's `batch_sizes`, and litdeploy export --trt"
        )
    return tuple(sorted({*(size for size in wanted if size <= largest), largest}))


def _config(
    name: str, backend: _Backend, sources: Sequence[_Tensor], result: _Tensor, batches: tuple[int, ...]
) -> dict[str, Any]:
    """A ModelConfig, as nested mappings. Where Triton does not batch, shapes hold the batch."""
    batched = backend.batches and isinstance(sources[0].shape[0], str)
    config: dict[str, Any] = {
        "name": name,
        "platform": backend.platform,
        "backend": backend.name,
        "max_batch_size": batches[-1] if batched else 0,
    }
    ends: dict[str, Sequence[_Tensor]] = {"input": sources, "output": [result]}
    for key, tensors in ends.items():
        config[key] = []
        for tensor in tensors:
            dims = [-1 if isinstance(size, str) else size for size in tensor.shape]
            dims = dims[1:] if batched else dims
            config[key].append({"name": tensor.name, "data_type": _Word(_TYPES[tensor.kind]), "dims": dims})
    if batched and batches[-1] > 1:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": QUEUE_DELAY_US}
    config["model_warmup"] = [_warm_up(sources, size, batched) for size in batches]
    return config


def _warm_up(sources: Sequence[_Tensor], size: int, batched: bool) -> dict[str, Any]:
    inputs = []
    for source in sources:
        # Of a free size the least.
        sample = [1 if isinstance(each, str) else each for each in source.shape[1:]]
        value = {
            "data_type": _Word(_TYPES[source.kind]),
            "dims": sample if batched else [size, *sample],
            # Random whole numbers are no ids.
            ("zero_data" if source.kind == "int64" else "random_data"): True,
        }
        inputs.append({"key": source.name, "value": value})
    return {"name": f"batch of {size}", "batch_size": size if batched else 1, "inputs": inputs}


def _text(message: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A protobuf message in its text format, one field a line. Lists are repeated fields, mappings are messages."""
    for name, content in message.items():
        for value in content if isinstance(content, list) else [content]:
            if isinstance(value, Mapping):
                yield f"{indent}{name} {{\n"
                yield from _text(value, indent + "  ")
                yield f"{indent}}}\n"
            else:
                yield f"{indent}{name}: {_scalar(value)}\n"


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, _Word):
        return str(value)
    # Strings, numbers and truth values are written as in JSON.
    return json.dumps(value, ensure_ascii=False)


def _write(folder: Path, path: Path, backend: _Backend, config: str, classes: Sequence[str]) -> None:
    """Writes a model's folder, which gets its name when it is whole."""
    if folder.exists() and not (folder.is_dir() and {each.name for each in folder.iterdir()} <= _OURS):
        raise BundleError(f"{folder}: holds something that is not litdeploy's. Name another --triton-repository.")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        remove(partial)
        (partial / "1").mkdir(parents=True)
        shutil.copyfile(path, partial / "1" / backend.file)
        (partial / "config.pbtxt").write_text(config, encoding="utf-8")
        if classes:
            # A name takes one line, or the lines below it would name the wrong classes.
            lines = "".join(" ".join(name.split()) + "\n" for name in classes)
            (partial / "labels.txt").write_text(lines, encoding="utf-8")
        remove(folder)
        partial.replace(folder)
    except OSError as error:
        raise BundleError(f"{folder}: cannot be written ({error.strerror}). Make room, or write elsewhere.") from None
    finally:
        if partial.is_dir():
            remove(partial)
