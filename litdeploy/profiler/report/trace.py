"""Trace a few calls of teacher and student, operator by operator, for Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as record

from litdeploy.batch import forward, moved
from litdeploy.errors import SettingsError
from litdeploy.networks import Network, Section
from litdeploy.profiler.report.output import check_output
from litdeploy.runtime.eager import placed

_WARM_UP_CALLS = 3
_CALLS = 3


def write_trace(
    path: Path,
    networks: dict[str, Network],
    sections: Mapping[str, Sequence[Section]],
    device: torch.device,
    batch_size: int,
) -> None:
    """Record teacher and student in turn, in eager PyTorch, and write a trace in Chrome's JSON format.

    Each call is a range `teacher` or `student`, which contains a range for each section (`student layer1`), above the
    operators and, on a GPU, their kernels. Recording an operator takes some microseconds: the trace shows where time is
    spent and where a device waits, not how fast a network is.

    Args:
        path: `.json`, or `.json.gz` for a compressed file.
        networks: `teacher` and `student`.
        sections: of each.

    Raises:
        SettingsError: another file extension, or the file cannot be written.
    """
    check_trace_path(path)
    modules = {role: placed(network, device, "fp32") for role, network in networks.items()}
    batch = moved(networks["student"].example(batch_size), device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.inference_mode():
        for _ in range(_WARM_UP_CALLS):
            for module in modules.values():
                forward(module, batch)
        # acc_events: there is one cycle, so all events are kept anyway; without it, torch before 2.13 warns.
        with (
            record(activities=activities, record_shapes=True, acc_events=True) as recorded,
            ExitStack() as ranges,
        ):
            for role, module in modules.items():
                ranges.enter_context(_marked(module, sections[role], role))
            for _ in range(_CALLS):
                for role, module in modules.items():
                    with record_function(role):
                        forward(module, batch)
                        if device.type == "cuda":
                            torch.cuda.synchronize(device)
    try:
        # torch compresses by the extension, so the file is written under its own name elsewhere, and moved when whole.
        with TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            recorded.export_chrome_trace(str(whole))
            whole.replace(path)
    except OSError as error:
        raise SettingsError(f"--trace {path}: it cannot be written there ({error.strerror}).") from None


def check_trace_path(path: Path) -> None:
    """Create the folder of a trace, before anything is measured.

    Raises:
        SettingsError: another file extension, or there cannot be a file.
    """
    if not path.name.endswith((".json", ".json.gz")):
        raise SettingsError(f"--trace {path}: name a file that ends in .json or .json.gz, as in --trace trace.json.gz.")
    check_output(path, "--trace")


@contextmanager
def _marked(module: nn.Module, sections: Sequence[Section], role: str) -> Iterator[None]:
    """Record each section of the module that has blocks as a range of its own while the context is open."""
    with ExitStack() as handles:
        for section in sections:
            if not section.blocks:
                continue
            blocks = section.blocks_in(module)
            range_ = record_function(f"{role} {section.name}")

            def enter(block: nn.Module, args: tuple[Any, ...], range_: record_function = range_) -> None:
                range_.__enter__()  # type: ignore[no-untyped-call]

            def leave(block: nn.Module, args: tuple[Any, ...], output: Any, range_: record_function = range_) -> None:
                range_.__exit__(None, None, None)

            handles.callback(blocks[0].register_forward_pre_hook(enter).remove)
            handles.callback(blocks[-1].register_forward_hook(leave).remove)
        yield
