"""The verb `inspect`: which network a file holds, its sections, and how deep a student of it can be."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from litdeploy.config.spec import AnyInput, DepthPlan
from litdeploy.errors import NetworkError, RunnerError
from litdeploy.exporter.onnx import describe_onnx
from litdeploy.files import is_folder, sha256_of
from litdeploy.networks import FAMILIES, Network, NetworkName, describe, load, published, sections_of
from litdeploy.networks.families.family import depths_of
from litdeploy.profiler.analysis.breakdown import break_down
from litdeploy.profiler.schema import Breakdown
from litdeploy.runtime.inductor import read_package
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Artefact, Manifest, Record


class FoundNetwork(Record):
    """What is known of a file of weights.

    Attributes:
        title: for people: `CIFAR ResNet-56, shortcut A`.
        network: as `--network` takes it.
        classes: width of the logits; how many domains, where it makes images.
        class_names: in the order of the logits, where the file says them.
        breakdown: depth, sections, parameters, FLOPs.
        student_depths: what `--student-depth` takes; empty for a student, and where there are no repeated blocks.
        plan: for a student, the teacher's blocks that it kept.
        narrowed: how many of its layers channels were taken out of.
    """

    title: str
    network: str
    classes: int
    class_names: tuple[str, ...]
    input: AnyInput
    sha256: str
    breakdown: Breakdown
    student_depths: tuple[int, ...]
    plan: DepthPlan | None
    narrowed: int


class FoundOnnx(Record):
    """What is known of an ONNX file: inputs and output (a size that is free is a name), opset and metadata."""

    opset: int
    input: str
    input_shape: list[int | str]
    inputs: dict[str, list[int | str]]
    output: str
    output_shape: list[int | str]
    metadata: dict[str, str]
    sha256: str


def inspect(
    path: str | Path,
    *,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> FoundNetwork | FoundOnnx | Artefact | Manifest:
    """Looks into a file of weights, a folder as transformers saves a network in, an ONNX file, an AOTInductor package
    (by its sidecar) or a bundle.

    Raises:
        LitdeployError: the file is none of these, or its network is not recognised.
    """
    path = Path(path)
    path, network = published(path, network)
    if is_folder(path):
        return Bundle(path).read()
    if path.suffix == ".onnx":
        try:
            return FoundOnnx(**describe_onnx(path), sha256=sha256_of(path))
        except ValidationError:  # protobuf gives a name that is no text as bytes
            raise RunnerError(
                f"{path}: names in it are no text. It is damaged; make it again: litdeploy export"
            ) from None
    if path.suffix == ".pt2":
        return read_package(path)
    return _inspect_network(load(path, network=network, normalise=normalise, input_shape=input_shape), path)


def _inspect_network(network: Network, path: Path) -> FoundNetwork:
    spec = network.spec
    family = FAMILIES.get(spec.name)
    try:
        sections = sections_of(network)
    except NetworkError:
        sections = []
    names = [section.name for section in sections]
    repeated = spec.plan is None and any(section.blocks > 1 for section in sections)
    depths = tuple(depths_of(family, sections)) if repeated else ()
    breakdown = break_down(network, names)
    shortcut = f", shortcut {spec.arguments['shortcut']}" if "shortcut" in spec.arguments else ""
    title = f"{family.title}-{breakdown.depth}{shortcut}" if family and names else family.title if family else spec.name
    return FoundNetwork(
        title=title,
        network=describe(spec.name, spec.arguments),
        classes=network.class_count(),
        class_names=spec.classes,
        input=spec.input,
        sha256=sha256_of(path),
        breakdown=breakdown,
        student_depths=depths,
        plan=spec.plan,
        narrowed=len(spec.widths),
    )
