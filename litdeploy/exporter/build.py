"""Building one exported file: what every format builds from, and the one way to build it.

`litdeploy export`, the profiler (for the teacher's file) and predictions (for students not trained yet) all call
`build_artefact`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, cast, in_parts, mapped, moved
from litdeploy.config.formats import FORMATS, imported
from litdeploy.config.spec import AnyInput, Free, InputSpec
from litdeploy.config.target import Precision, Target
from litdeploy.data import Data, prepared
from litdeploy.errors import DataError, NetworkError, SettingsError
from litdeploy.exporter.precision import Conversion, convert
from litdeploy.files import sha256_of
from litdeploy.networks import Network, answer_of
from litdeploy.networks.folding import folded
from litdeploy.runtime.device import DTYPES
from litdeploy.storage.records import Artefact
from litdeploy.storage.staging import write_sidecar
from litdeploy.tasks import task_of

BATCH = "batch"
_MEASURE_AT_ONCE = 64


class Calibration:
    """Training images on which ranges (int8) and magnitudes (fp16, bf16) are measured.

    They are drawn once, the same in every run, and only if a precision needs them.

    Args:
        data: None: there are none, and fp32 alone can be built.
        count: how many.
    """

    def __init__(self, data: Data | None, network: Network, count: int) -> None:
        self._data, self._network, self._count = data, network, count

    @cached_property
    def inputs(self) -> Batch:
        """The images as the network takes them, on the CPU.

        Raises:
            DataError: there are no data, or the training split has fewer.
        """
        if self._data is None:
            raise DataError(
                "no samples to measure activations on, which every precision but fp32 needs. Give the kind of data "
                "that the network was trained on: --data (a folder, a file, a hub id, or digits)"
            )
        train = self._data.train
        if len(train) < self._count:
            raise DataError(
                f"{self._data.source}: has {len(train)} training {self._data.noun}s, fewer than the {self._count} to "
                f"calibrate on. Use all of them: --calibration-images {len(train)}"
            )
        rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: self._count]
        [picked] = train.pick([rows])
        return moved(prepared(picked.images(), self._network.spec.input, picked.labels_N), torch.device("cpu"))


@dataclass(frozen=True)
class Job:
    """One file to build.

    Attributes:
        network: on the CPU; left unchanged.
        target: its operator set, batch sizes and memory limit are used.
        device: to compile for, and to run on.
        precision: of weights and arithmetic.
        io_precision: of floating-point inputs and of logits.
        embed_preprocessing: whether the file takes pixels, uint8 (N, H, W, C), and normalizes them.
        calibration: needed for every precision but fp32.
        options: the format's own, by name.
        command: what to type to build the file again.
    """

    network: Network
    target: Target
    device: torch.device
    precision: Precision = "fp32"
    io_precision: Precision = "fp32"
    embed_preprocessing: bool = False
    calibration: Calibration | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    command: str = "litdeploy export"

    @cached_property
    def calibration_inputs(self) -> Batch:
        """What to measure on, as the network takes it, on the CPU."""
        assert self.calibration is not None
        return self.calibration.inputs

    @cached_property
    def conversion(self) -> Conversion | None:
        """The network in fp16 or bf16; None for the other precisions."""
        if self.precision not in ("fp16", "bf16"):
            return None
        return convert(self.network, self.precision, in_parts(self.calibration_inputs, _MEASURE_AT_ONCE))

    def conversion_details(self) -> dict[str, Any]:
        """What a sidecar says of the conversion; nothing if there is none."""
        found = self.conversion
        if found is None:
            return {}
        return {
            "largest_activation": {"value": found.largest, "layer": found.largest_layer},
            "kept_in_fp32": list(found.kept),
        }


class Built(NamedTuple):
    """What a build function returns.

    Attributes:
        details: what the sidecar says of the file.
        versions: of libraries beyond those of the format's row.
    """

    details: dict[str, Any]
    versions: dict[str, str] = {}  # noqa: RUF012


# Write a file at a path, in a folder that exists.
BuildFunction = Callable[[Job, Path], Built]
# Refuse what cannot be built for this target, device and options, before anything is; return a line for the user.
CheckFunction = Callable[[Target, torch.device, Mapping[str, Any]], str | None]
# The details of a file that depend on this machine and its libraries: (device, options).
IdentityFunction = Callable[[torch.device, Mapping[str, Any]], dict[str, Any]]


def build_artefact(name: str, job: Job, path: Path, label: str, **details: Any) -> Artefact:
    """Build a file in a format and write its sidecar.

    Args:
        name: key of `FORMATS`.
        path: of the file; its folder exists.
        label: the artefact's `path`, relative to its bundle.
        **details: added to those of the format.
    """
    row = FORMATS[name]
    build: BuildFunction = imported(row.build)
    built = build(job, path)
    artefact = Artefact(
        path=label,
        sha256=sha256_of(path),
        precision=job.precision,
        versions={**row.versions(), **built.versions},
        details={**built.details, **details, "command": job.command},
    )
    write_sidecar(path, artefact)
    return artefact


def check_one_pass(network: Network) -> None:
    """Check that one call of a network gives its answer.

    Raises:
        NetworkError: it is a language model that generates, which servers load in the form of transformers.
    """
    generates = getattr(network.module, "can_generate", None)  # of transformers
    if callable(generates) and generates():
        raise NetworkError(
            f"{network.source}: {type(network.module).__name__} generates text token by token, with a cache that one "
            "file of a fixed graph does not have. Export it as servers of language models load it: litdeploy export "
            "--transformers DIR"
        )


def output_names(network: Network) -> list[str]:
    """Names of the outputs of an exported file: those of a tree's tensors, or the one that the task has.

    Raises:
        NetworkError: an output is called as an input, which no exported file can hold.
    """
    answer = answer_of(network.output(network.example()), network.spec.task_name)
    names = list(answer) if isinstance(answer, dict) else [task_of(network.spec).output_name]
    taken = {each.name for each in network.spec.input.tensors}.intersection(names)
    if taken:
        raise NetworkError(
            f"{network.source}: its output '{min(taken)}' has the name of an input, and an exported file needs two "
            "names. Rename one of them in its forward."
        )
    return names


class ExportCall(NamedTuple):
    """How an exporter calls an `ExportWrapper`, and which sizes of that call are free."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any


class ExportWrapper(nn.Module):
    """A network with inputs and outputs in the types of an exported file, which returns the answer of its task.

    A single input is its first argument; several are keyword arguments with their names.

    Args:
        module: float32 inputs to logits or images, or to an object that holds them.
        spec: what `module` takes.
        dtype: of floating-point inputs and of the output.
        task: that the output is the answer of.
        casts: whether `module` casts its inputs itself, as a converted network does.
        embedded: whether the input is pixels, uint8 (N, H, W, C), which are normalized here.

    Raises:
        SettingsError: pixels are requested, and the network takes no images.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(
        self,
        module: nn.Module,
        spec: AnyInput,
        dtype: torch.dtype = torch.float32,
        task: str = "classification",
        casts: bool = False,
        embedded: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.embedded, self.casts, self.dtype, self.task = embedded, casts, dtype, task
        self.inputs = spec.tensors
        if embedded:
            if not isinstance(spec, InputSpec):
                raise SettingsError("--embed-preprocessing: only networks that take images have it. Leave it out.")
            for name, values in (("mean_C11", spec.mean), ("std_C11", spec.std)):
                self.register_buffer(name, 255 * torch.tensor(values).view(-1, 1, 1))
        if len(self.inputs) > 1:
            self._name_inputs()

    @classmethod
    def of(
        cls, network: Network, conversion: Conversion | None, io_precision: Precision, embedded: bool
    ) -> ExportWrapper:
        """Wrap a network, its batch norms folded, or the conversion of it. Raises as `check_one_pass`."""
        check_one_pass(network)
        module = conversion.module if conversion else folded(network)
        spec = network.spec
        return cls(module, spec.input, DTYPES[io_precision], spec.task_name, conversion is not None, embedded)

    def _name_inputs(self) -> None:
        """Exporters take the names of a program's inputs from the signature."""

        def forward(**tensors: Tensor) -> Batch:
            return ExportWrapper.forward(self, **tensors)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [inspect.Parameter(each.name, kind) for each in self.inputs]
        forward.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
        self.forward = forward  # type: ignore[assignment, method-assign]

    def forward(self, *single: Tensor, **several: Tensor) -> Batch:
        if self.embedded:
            # Cast first: TensorRT does not transpose uint8.
            single = ((single[0].to(torch.float32).permute(0, 3, 1, 2) - self.mean_C11) / self.std_C11,)
        elif not self.casts:
            single, several = (
                tuple(_as_float32(tensor) for tensor in single),
                {name: _as_float32(tensor) for name, tensor in several.items()},
            )
        return cast(answer_of(self.module(*single, **several), self.task), self.dtype)

    def example(self, batch: Batch) -> Batch:
        """An input with as many samples as this batch for the network: the batch itself, or black pixels."""
        if self.embedded and isinstance(batch, Tensor):
            return torch.zeros_like(batch.permute(0, 2, 3, 1), dtype=torch.uint8).contiguous()
        return mapped(lambda tensor: tensor.contiguous(), cast(batch, self.dtype))

    def call(self, batch: Batch) -> ExportCall:
        """The call to export, for any number of samples.

        Args:
            batch: what the network takes.
        """
        free = {0: torch.export.Dim(BATCH)}
        known: dict[str, Any] = {}
        shapes: dict[str, dict[int, Any]] = {}
        for tensor in self.inputs:
            sizes = {
                place: known.setdefault(size.name, torch.export.Dim(size.name, max=size.most))
                for place, size in enumerate(tensor.shape, start=1)
                if isinstance(size, Free)
            }
            shapes[tensor.name] = free | sizes
        example = self.example(batch)
        if isinstance(example, dict):
            return ExportCall((), example, shapes)
        # By position: `forward` has no name for it.
        return ExportCall((example,), {}, (tuple(shapes.values()),))


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
