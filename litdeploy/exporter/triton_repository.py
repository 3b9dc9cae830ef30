"""A model repository for NVIDIA's Triton Inference Server: for `tritonserver --model-repository DIR`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from litdeploy.config.formats import FORMATS, imported
from litdeploy.errors import BundleError, SettingsError
from litdeploy.files import remove, sha256_of
from litdeploy.storage.records import Artefact

# Microseconds that a request may wait for others to share its batch.
QUEUE_DELAY_US = 100
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "uint8": "TYPE_UINT8",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}
_OURS = {"config.pbtxt", "labels.txt", "1"}


class _Word(str):
    """A name of an enumeration's value, written without quotes."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a served file.

    Attributes:
        kind: `float32`, `float16`, `bfloat16`, `uint8`, `int64`, `int32` or `bool`.
        shape: batch first; a free size by its name.
    """

    name: str
    kind: str
    shape: tuple[int | str, ...]


# Inputs and outputs.
Signature = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class TritonBackend:
    """How Triton serves the files of a format.

    Attributes:
        name, platform, file: Triton's names of the backend, the platform and the model's file.
        label: end of the model's name: `student-onnx`.
        signature: inputs and outputs of a file, given its path and its sidecar's details.
        batches: whether Triton puts requests together.
        refusal: why it cannot load a file with these details; None: it can.
        needs_gpu: whether it runs on GPUs only.
    """

    name: str
    platform: str
    file: str
    label: str
    signature: Callable[[Path, dict[str, Any]], Signature]
    batches: bool = True
    refusal: Callable[[dict[str, Any]], str | None] = lambda details: None
    needs_gpu: bool = False


def triton_repository(
    artefacts: Iterable[tuple[Path, Artefact]],
    out_dir: Path,
    *,
    classes: Sequence[str],
    batch_sizes: Sequence[int],
    device: Literal["cpu", "cuda"],
) -> list[Path]:
    """Write one model for each artefact: `NAME-onnx`, `NAME-tensorrt` or `NAME-inductor`.

    Each has one version, which holds a copy of the file, a `config.pbtxt` with dynamic batching, one instance a device
    and warm-up, and the names of the classes in `labels.txt`.

    Args:
        artefacts: files (.onnx, .engine, .pt2) and what their sidecars say. Details that are used: of an engine its
            `EngineDetails`, of a package `metadata`; an ONNX file describes itself.
        out_dir: of the repository; other models in it are left unchanged.
        classes: names in the order of the logits; empty if unknown.
        batch_sizes: those of the target. The largest is the most that Triton puts together, and each is warmed up.
        device: where the server runs ONNX and .pt2; engines run on a GPU in any case.

    Returns:
        The models' folders.

    Raises:
        SettingsError: a file that Triton does not run, or two of one name.
        BundleError: a file that is not the artefact's, or that cannot be written, or a folder with other files.
    """
    written: list[Path] = []
    for path, artefact in artefacts:
        backend = _checked_backend(path, artefact)
        folder = out_dir / f"{path.stem}-{backend.label}"
        if folder in written:
            raise SettingsError(
                f"{path}: another artefact is served as {folder.name} already. Rename one of the files."
            )
        sources, results = backend.signature(path, artefact.details)
        sizes = _batches(path, artefact, batch_sizes, sources[0])
        config = _config(folder.name, backend, sources, results, sizes)
        kind = "KIND_CPU" if device == "cpu" and not backend.needs_gpu else "KIND_GPU"
        config["instance_group"] = [{"count": 1, "kind": _Word(kind)}]
        if classes:
            config["output"][0]["label_filename"] = "labels.txt"
        _write(folder, path, backend, "".join(_text(config)), classes)
        written.append(folder)
    return written


def backend_of(path: Path) -> TritonBackend | None:
    """How Triton serves a file, by its suffix; `.plan` is TensorRT's own for an engine. None: it does not."""
    suffix = ".engine" if path.suffix == ".plan" else path.suffix
    references = (row.triton for row in FORMATS.values() if row.suffix == suffix and row.triton)
    return next((imported(reference) for reference in references), None)


def _checked_backend(path: Path, artefact: Artefact) -> TritonBackend:
    backend = backend_of(path)
    if backend is None:
        served = [row.suffix for row in FORMATS.values() if row.triton]
        raise SettingsError(f"{path}: Triton serves {', '.join([*served, '.plan'])}; this is none of them.")
    if refusal := backend.refusal(artefact.details):
        raise SettingsError(f"{path}: {refusal}")
    if not path.is_file() or sha256_of(path) != artefact.sha256:
        raise BundleError(f"{path}: missing, or altered since it was exported (its SHA-256 differs). Export it again.")
    return backend


def _batches(path: Path, artefact: Artefact, batch_sizes: Sequence[int], source: Tensor) -> tuple[int, ...]:
    """The batch sizes that are served, ascending.

    Raises:
        SettingsError: the artefact does not take them all.
    """
    if isinstance(source.shape[0], int):
        return (source.shape[0],)
    wanted = tuple(sorted({1, *batch_sizes}))
    if "batches" not in artefact.details:  # only an engine is limited
        return wanted
    smallest, largest = (int(artefact.details["batches"][key]) for key in ("min", "max"))
    if smallest > 1:
        raise SettingsError(
            f"{path}: takes batches from {smallest}, and Triton asks for single images too. Build it for them: put 1 "
            "among the target's `batch_sizes`, and litdeploy export --trt"
        )
    return tuple(sorted({*(size for size in wanted if size <= largest), largest}))


def _config(
    name: str, backend: TritonBackend, sources: Sequence[Tensor], results: Sequence[Tensor], batches: tuple[int, ...]
) -> dict[str, Any]:
    """A ModelConfig, as nested mappings. Where Triton does not batch, shapes hold the batch."""
    batched = backend.batches and isinstance(sources[0].shape[0], str)
    config: dict[str, Any] = {
        "name": name,
        "platform": backend.platform,
        "backend": backend.name,
        "max_batch_size": batches[-1] if batched else 0,
    }
    ends: dict[str, Sequence[Tensor]] = {"input": sources, "output": results}
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


def _warm_up(sources: Sequence[Tensor], size: int, batched: bool) -> dict[str, Any]:
    inputs = []
    for source in sources:
        # The least of a free size.
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


def _write(folder: Path, path: Path, backend: TritonBackend, config: str, classes: Sequence[str]) -> None:
    """Write a model's folder, which gets its name when it is whole."""
    if folder.exists() and not (folder.is_dir() and {each.name for each in folder.iterdir()} <= _OURS):
        raise BundleError(f"{folder}: holds files that are not litdeploy's. Name another --triton-repository.")
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
