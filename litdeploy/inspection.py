"""The verb `inspect`: which network a file holds, its sections, and the possible depths of a student."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from litdeploy.config.spec import AnyInput, DepthPlan
from litdeploy.errors import NetworkError, RunnerError
from litdeploy.files import is_folder, sha256_of
from litdeploy.networks import FAMILIES, Network, NetworkName, describe, load, published, sections_of
from litdeploy.networks.finding import survey
from litdeploy.networks.student import depths_of
from litdeploy.profiler.analysis.breakdown import break_down
from litdeploy.profiler.schema import Breakdown
from litdeploy.runtime.inductor import read_package
from litdeploy.runtime.onnx_file import describe_onnx
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Artefact, Manifest, Record


class NoSection(Record):
    """Modules that are no section, though they look like blocks: why, and what would make them one."""

    name: str
    blocks: int
    reason: str
    remedy: str


class FoundNetwork(Record):
    """The network in a file of weights.

    Attributes:
        title: readable name: `CIFAR ResNet-56, shortcut A`.
        network: the network as `--network` takes it.
        task: what its output means.
        classes: number of classes, or of a generator's domains; 0 if its task has none.
        class_names: names of the classes in the order of the logits; empty if the file does not name them.
        input: what the network takes.
        sha256: of the file.
        breakdown: depth, sections, parameters, FLOPs.
        student_depths: possible values of `--student-depth`; empty for a student, and without repeated blocks.
        plan: the teacher's blocks that a student kept; None for a teacher.
        narrowed: number of layers from which channels were removed.
        candidates: modules that look like blocks and are no section.
    """

    title: str
    network: str
    task: str
    classes: int
    class_names: tuple[str, ...]
    input: AnyInput
    sha256: str
    breakdown: Breakdown
    student_depths: tuple[int, ...]
    plan: DepthPlan | None
    narrowed: int
    candidates: tuple[NoSection, ...] = ()


class FoundOnnx(Record):
    """The network in an ONNX file: inputs and outputs (a dynamic size is a name), opset and metadata."""

    opset: int
    input: str
    input_shape: list[int | str]
    inputs: dict[str, list[int | str]]
    output: str
    output_shape: list[int | str]
    outputs: dict[str, list[int | str]]
    metadata: dict[str, str]
    sha256: str


def inspect(
    path: str | Path,
    *,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> FoundNetwork | FoundOnnx | Artefact | Manifest:
    """Describe what a file holds.

    Args:
        path: weights, a folder that transformers saved, an ONNX file, an AOTInductor package (described by its
            sidecar) or a bundle.
        network, normalise, input_shape: as for `load`, if the file does not state them.

    Returns:
        The description of weights, of an ONNX file, of a package, or the bundle's manifest.

    Raises:
        LitdeployError: the file is none of these, or its network is not recognized.
    """
    path = Path(path)
    path, network = published(path, network)
    if is_folder(path):
        return Bundle(path).read()
    if path.suffix == ".onnx":
        try:
            return FoundOnnx(**describe_onnx(path), sha256=sha256_of(path))
        except ValidationError:  # protobuf returns a name that is not text as bytes
            raise RunnerError(
                f"{path}: its names are not text. The file is damaged; export it again: litdeploy export"
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
    repeated = spec.plan is None and any(section.blocks > 1 for section in sections)
    depths = tuple(depths_of(family, sections)) if repeated else ()
    breakdown = break_down(network, sections)
    shortcut = f", shortcut {spec.arguments['shortcut']}" if "shortcut" in spec.arguments else ""
    title = (
        f"{family.title}-{breakdown.depth}{shortcut}" if family and sections else family.title if family else spec.name
    )
    return FoundNetwork(
        title=title,
        network=describe(spec.name, spec.arguments),
        task=spec.task_name,
        classes=network.class_count(),
        class_names=spec.classes,
        input=spec.input,
        sha256=sha256_of(path),
        breakdown=breakdown,
        student_depths=depths,
        plan=spec.plan,
        narrowed=len(spec.widths),
        candidates=tuple(
            NoSection(name=each.name, blocks=each.blocks, reason=each.reason, remedy=each.remedy)
            for each in survey(network.module, network.example())[1]
        ),
    )
