"""A format in one file, as a newcomer would add it: torch.export's own file, with a number added to its logits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Self

import torch

from litdeploy.batch import Batch, mapped
from litdeploy.config.formats import Format, Option
from litdeploy.exporter.build import Built, ExportWrapper, Job
from litdeploy.runtime.runner import Description, ExportedFile, Source

ROW = Format(
    title="Toy",
    help="Write a toy.",
    suffix=".toy",
    precisions=("fp32",),
    libraries=("torch",),
    build="tests.exporter.toy_format:build",
    runners={"toy": "tests.exporter.toy_format:ToyRunner"},
    describe="tests.exporter.toy_format:describe",
    options=(
        Option("toy_shift", "--toy-shift", "Add a number to every logit.", "0"),
        Option("toy_words", "--toy-word", "Words.", (), metavar="A,B", from_target="compute_capability"),
    ),
)


def build(job: Job, path: Path) -> Built:
    wrapper = ExportWrapper.of(job.network, job.conversion, job.io_precision, job.embed_preprocessing).eval()
    call = wrapper.call(job.network.example(2, half=True))
    program = torch.export.export(wrapper, call.args, call.kwargs, dynamic_shapes=call.dynamic_shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    spec = job.network.spec
    stored = {
        "program": buffer.getvalue(),
        "shift": float(job.options["toy_shift"]),
        "metadata": {**spec.input.metadata(), "classes": json.dumps(spec.classes)},
        "classes": job.network.class_count(),
    }
    torch.save(stored, path)
    return Built({"bytes": path.stat().st_size, "shift": job.options["toy_shift"]}, {"toy": "1.0"})


def describe(path: Path, device: torch.device) -> ExportedFile:
    stored: dict[str, Any] = torch.load(path, weights_only=True)
    return ExportedFile(stored["metadata"], classes=stored["classes"])


class ToyRunner:
    name = "toy"

    def __init__(self, source: Source, device: torch.device, precision: str) -> None:
        self.device = device
        self._path = source.needed_path(self.name)

    def __enter__(self) -> Self:
        stored: dict[str, Any] = torch.load(self._path, weights_only=True)
        self._module = torch.export.load(io.BytesIO(stored["program"])).module()
        self._shift: float = stored["shift"]
        return self

    def __exit__(self, *_: object) -> None:
        del self._module

    def run(self, batch: Batch) -> Batch:
        with torch.inference_mode():
            output: Batch = self._module(batch)
            return mapped(lambda tensor: tensor + self._shift, output)

    def describe(self) -> Description:
        return Description("toy", "cpu", "fp32", "toy", {}, 0.0)
