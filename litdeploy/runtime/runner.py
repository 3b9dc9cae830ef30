"""The contract that every backend keeps, and what the backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor

from litdeploy.batch import Batch, tensors_of
from litdeploy.config.formats import FORMATS, format_of_file, format_of_runner, imported
from litdeploy.config.spec import Free, InputTensor
from litdeploy.config.target import CompileMode
from litdeploy.errors import RunnerError

if TYPE_CHECKING:
    from litdeploy.networks import Network


@dataclass(frozen=True)
class Description:
    """How a runner runs.

    Attributes:
        runner: its name.
        device: name of the processor or GPU.
        precision: of weights and arithmetic: `fp32`, `fp16`, `bf16` or `int8`.
        mode: what else decides the speed: execution provider, compiler, memory format.
        versions: library → version.
        build_seconds: wall-clock time of `__enter__`, without what the first call of each batch size adds (compiling,
            choosing kernels).
    """

    runner: str
    device: str
    precision: str
    mode: str
    versions: dict[str, str]
    build_seconds: float


@dataclass(frozen=True)
class ExportedFile:
    """What an exported file says of itself.

    Attributes:
        metadata: the keys that `litdeploy export` writes: precision, input, normalization, class names.
        image_shape: (channels, height, width), if known apart from the metadata.
        classes: their number; None: the output's shape has it.
        output_shape: with the batch; empty: unknown.
    """

    metadata: dict[str, str]
    image_shape: tuple[int, ...] | None = None
    classes: int | None = None
    output_shape: tuple[int | str, ...] = ()


# Describe a file that is to run on a device.
DescribeFunction = Callable[[Path, torch.device], ExportedFile]


def described(path: Path, device: torch.device) -> ExportedFile:
    """What an exported file says of itself.

    Args:
        path: of a format that describes itself: `format_of_file` returns its key.
        device: where it is to run.

    Raises:
        RunnerError: no such file, a damaged one, or one that does not run there.
    """
    name = format_of_file(path)
    assert name is not None
    reference = FORMATS[name].describe
    assert reference is not None
    describe: DescribeFunction = imported(reference)
    return describe(path, device)


class Runner(Protocol):
    """A network in one backend, on one device. A context manager: built in `__enter__`, released in `__exit__`.

    Attributes:
        name: key of `config.formats.runners()`.
        device: where batches must be; a CUDA device has its index.
    """

    name: str
    device: torch.device

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def run(self, batch: Batch) -> Batch:
        """Run one batch of any size.

        On CUDA the work is queued in the current stream's order; the host does not wait.

        Args:
            batch: the network's input on `device`: normalized float32 images (N, C, H, W), or several tensors by name.

        Returns:
            The answer of the network's task, float32, on `device`: logits (N, classes), images, or named tensors.

        Raises:
            RunnerError: a wrong shape, type or device, a call outside the `with` block, or the backend fails.
        """
        ...

    def describe(self) -> Description:
        """Describe how it runs; complete once entered."""
        ...


@dataclass(frozen=True)
class Source:
    """What a runner is made of; each runner takes what it needs.

    Attributes:
        network: a module with its weights.
        path: an exported file, with its sidecar in the same folder.
        compile_mode: of torch.compile.
        memory_limit: most device memory, in GiB; None: no limit.
    """

    network: Network | None = None
    path: Path | None = None
    compile_mode: CompileMode = "default"
    memory_limit: float | None = None

    def needed_network(self, runner: str) -> Network:
        """The network.

        Raises:
            RunnerError: none was given.
        """
        if self.network is None:
            raise RunnerError(f"the runner '{runner}' runs a PyTorch network: pass network=….")
        return self.network

    def needed_path(self, runner: str) -> Path:
        """The exported file.

        Raises:
            RunnerError: none was given.
        """
        if self.path is None:
            name = format_of_runner(runner)
            assert name is not None
            raise RunnerError(
                f"the runner '{runner}' runs a file in the format {FORMATS[name].title}: pass "
                f"path=…. `litdeploy export --{name}` makes one."
            )
        return self.path


def check_precision(runner: str, precision: str, known: Sequence[str]) -> str:
    """Check that a runner supports a precision, and return it.

    Raises:
        RunnerError: it does not.
    """
    if precision not in known:
        raise RunnerError(f"the runner '{runner}' has no precision '{precision}'; it has {' and '.join(known)}.")
    return precision


def check_batch(runner: str, batch: Batch, inputs: Sequence[InputTensor], device: torch.device) -> None:
    """Check a batch against a runner's inputs.

    Raises:
        RunnerError: the tensors have other names, shapes, types or devices.
    """
    given = batch if isinstance(batch, dict) else {inputs[0].name: batch}
    names = [each.name for each in inputs]
    sizes = {len(tensor) for tensor in tensors_of(batch) if tensor.dim()}
    if (
        list(given) == names
        and isinstance(batch, dict) == (len(inputs) > 1)
        and len(sizes) == 1
        and min(sizes) > 0
        and all(_fits(given[each.name], each, device) for each in inputs)
        and _free_sizes_agree(given, inputs)
    ):
        return
    wanted = " and ".join(f"{each.dtype} {each.name} of shape (N, {_sizes(each.shape)})" for each in inputs)
    found = " and ".join(
        f"{f'{name}: ' if isinstance(batch, dict) else ''}{str(tensor.dtype).removeprefix('torch.')} of shape "
        f"{tuple(tensor.shape)} on {tensor.device}"
        for name, tensor in given.items()
    )
    raise RunnerError(f"the runner '{runner}' takes {wanted} on {device}, N at least 1; it got {found or 'nothing'}.")


def _fits(tensor: Tensor, wanted: InputTensor, device: torch.device) -> bool:
    return (
        tensor.dim() == len(wanted.shape) + 1
        and str(tensor.dtype) == f"torch.{wanted.dtype}"
        and tensor.device == device
        and all(
            1 <= found <= (size.most or found) if isinstance(size, Free) else found == size
            for size, found in zip(wanted.shape, tensor.shape[1:], strict=True)
        )
    )


def _free_sizes_agree(given: dict[str, Tensor], inputs: Sequence[InputTensor]) -> bool:
    found: dict[str, set[int]] = {}
    for each in inputs:
        for size, length in zip(each.shape, given[each.name].shape[1:], strict=True):
            if isinstance(size, Free):
                found.setdefault(size.name, set()).add(length)
    return all(len(lengths) == 1 for lengths in found.values())


def _sizes(shape: Sequence[int | Free]) -> str:
    return ", ".join(
        str(size) if isinstance(size, int) else f"1 to {size.most}" if size.most else "any" for size in shape
    )


def not_open(runner: str) -> RunnerError:
    """The error of a runner that is used before or after its `with` block."""
    return RunnerError(
        f"the runner '{runner}' is not open. Use it inside its block: with open_runner({runner!r}, …) as runner: …"
    )
