"""The verb `verify`: what compression changed, and what export changed after that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from litdeploy.batch import in_parts, joined, mapped, moved, picked
from litdeploy.config.formats import FORMATS, format_of, format_of_file
from litdeploy.config.spec import TaskName, input_of
from litdeploy.config.target import Target, Tolerance
from litdeploy.data import Data, normalised_batches
from litdeploy.errors import BundleError, RunnerError, SettingsError
from litdeploy.evaluation.bisect import Parting, first_parting
from litdeploy.exporter.evidence import Evidence, open_for, open_test_data, settings_of
from litdeploy.exporter.parity import compare_runners
from litdeploy.exporter.teacher import load_exported, load_teacher
from litdeploy.files import is_file, remove, sha256_of
from litdeploy.networks import Network, NetworkName, load
from litdeploy.runtime import Runner, open_runner, resolve_device, resolve_target
from litdeploy.runtime.adapter import read_task
from litdeploy.runtime.runner import described
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle, read_sidecar, sidecar_of
from litdeploy.storage.exports import ExportFolder
from litdeploy.storage.records import Artefact, Difference, Parity, Record, Score
from litdeploy.storage.staging import reject, rejected_path
from litdeploy.tasks import task_of

_ANYTHING = Tolerance(atol=float(torch.finfo(torch.float64).max), top1=0, psnr=0, ssim=0)
_BISECT_IMAGES = 8
_REJECTED = rejected_path(Path("*.onnx")).name


class Verification(Record):
    """All differences, the rejected files, and the differing layer of each bisected file.

    Attributes:
        differences: of the compression, and of each artefact.
        rejected: artefact's key → where its file is kept now.
        partings: file name → the first layer whose outputs differ; None if none does.
        not_run: keys of the artefacts built ahead of time for other GPUs.
    """

    differences: tuple[Difference, ...]
    rejected: dict[str, str]
    partings: dict[str, Parting | None]
    not_run: tuple[str, ...] = ()

    @property
    def beyond(self) -> dict[str, Parity]:
        """Key → parity of the artefacts beyond their limits."""
        found = {each.candidate: each.parity for each in self.differences if each.parity is not None}
        return {kind: parity for kind, parity in found.items() if not parity.within}

    @property
    def within(self) -> bool:
        """Whether every artefact is within its limits."""
        return not self.beyond


def verify(
    source: Bundle | str | Path = DEFAULT_PATH,
    *,
    against: str | Path | Network | None = None,
    artefacts: Sequence[str] | None = None,
    teacher: str | Path | None = None,
    target: Target | str | None = None,
    data: Any = None,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    task: TaskName | None = None,
    bisect: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Compare exported files with their network, and a student with its teacher, on the test split.

    An artefact of a bundle or a folder of exports that is beyond the target's tolerance is renamed to `.rejected` and
    removed from the manifest. A single file stays.

    Args:
        source: a bundle with exported artefacts, a folder that an uncompressed network was exported to, or one exported
            file.
        against: weights of the network that one file is compared with, or that moved since a folder was exported.
        artefacts: keys of the manifest (`onnx-fp16`); None: all.
        teacher: the teacher's file, if it moved. Without it, the compression is not measured.
        target, data, network: as for `export`.
        normalise, input_shape, task: of `against`, if neither it nor the file states them: see `networks.load`.
        bisect: find the first differing layer of ONNX files beyond the tolerance, including those rejected earlier.
        progress: called with a line for each step.

    Raises:
        BundleError: an incomplete bundle, an unknown or altered artefact, or another teacher or network.
        LitdeployError: bad input; see `litdeploy.errors`.
    """
    say = progress or (lambda line: None)
    chosen = resolve_target(target)
    device = resolve_device(chosen.device)
    folder = _folder_of(source)
    everything = {} if folder is None else _asked(folder, artefacts)
    asked = {kind: artefact for kind, artefact in everything.items() if artefact.runs_here}
    files = {} if folder is None else {kind: folder.artefact_path(artefact) for kind, artefact in asked.items()}
    if isinstance(folder, Bundle):
        _check_absent(f"{folder.path}: is a bundle; its files are compared with its student", against=against)
        candidate = load(folder.student_path, network=network)
        opened = open_test_data(folder.read(), data, candidate, device)
    elif folder is not None:
        _check_absent(f"{folder.path}: holds files of a network that was not compressed", teacher=teacher)
        candidate = against if isinstance(against, Network) else load_exported(folder, against, network)
        opened = open_for(candidate, settings_of(data, folder.read().data), device)
    else:
        path = Path(str(source))
        _check_absent(f"{path}: is one exported file", teacher=teacher, artefact=artefacts)
        asked, files = {path.name: _artefact_of(path, device)}, {path.name: path}
        candidate = _against(path, against, device, network, normalise=normalise, input_shape=input_shape, task=task)
        opened = open_for(candidate, settings_of(data), device)
    bench = _Bench(candidate, opened, chosen, device, "network" if folder is None else folder.role)

    differences: list[Difference] = []
    rejected: dict[str, str] = {}
    with open_runner("eager", network=candidate, device=device) as reference:
        say(bench.role)
        of_candidate = bench.score(reference)
        original = _teacher(folder, teacher, network, say) if isinstance(folder, Bundle) else None
        if original is not None:
            say("teacher")
            differences.append(bench.compression(original, reference, of_candidate))
        for kind, artefact in asked.items():
            say(kind)
            found = bench.conversion(kind, artefact, files[kind], reference, of_candidate)
            differences.append(found)
            if folder is not None and found.parity is not None and not found.parity.within:
                rejected[kind] = str(_set_aside(folder, kind, artefact, files[kind], found.parity))
    verified = Verification(
        differences=tuple(differences),
        rejected=rejected,
        partings={},
        not_run=tuple(kind for kind in everything if kind not in asked),
    )
    if not bisect:
        return verified
    beyond = sorted(folder.export_path.glob(_REJECTED)) if folder else [files[kind] for kind in verified.beyond]
    return verified.model_copy(update={"partings": _bisect(beyond, candidate, bench, say)})


class _Bench:
    """The data and limits that every artefact is compared on.

    Args:
        role: what the network is called: `student` or `network`.
    """

    def __init__(self, student: Network, data: Data | None, target: Target, device: torch.device, role: str) -> None:
        self.target, self.device, self.role = target, device, role
        self.task = task_of(student.spec)
        self._data, self._spec = data, student.spec
        self.evidence = Evidence.of(data, student, target.batch_sizes[-1], device)

    def score(self, runner: Runner, reference: Runner | None = None) -> Score | None:
        """On the whole test split; None if there are no data, or the task needs a reference and there is none."""
        if self._data is None or (reference is None and self.task.needs_teacher(self._data.labeled)):
            return None
        batches = normalised_batches(self._data.test, self._spec.input, self.target.batch_sizes[-1])
        found: Score = self.task.evaluate(runner.run, batches, self._spec.input, reference.run if reference else None)
        return found

    def compression(self, teacher: Network, student: Runner, of_student: Score | None) -> Difference:
        with open_runner("eager", network=teacher, device=self.device) as runner:
            size = self.target.batch_sizes[-1]
            outputs = [
                joined([side.run(batch) for batch in in_parts(self.evidence.inputs, size)])
                for side in (runner, student)
            ]
            batch = self.task.compare(outputs[0], outputs[1], size, _ANYTHING, self._spec.input)
            found = of_student or self.score(student, runner)
            return Difference(
                error="compression",
                reference="teacher",
                candidate="student",
                precision="fp32",
                **Difference.figures([batch], self.score(runner), found),
            )

    def conversion(
        self, kind: str, artefact: Artefact, path: Path, student: Runner, of_student: Score | None
    ) -> Difference:
        tolerance = getattr(self.target.tolerance, artefact.precision)
        sizes = sorted(set(self.target.batch_profile))
        name = format_of_file(path) or format_of(kind)
        limit = self.target.memory_limit
        with open_runner(FORMATS[name].runner, path=path, device=self.device, memory_limit=limit) as runner:
            parity = compare_runners(student, runner, self.evidence.inputs, sizes, tolerance, self._spec)
            found = self.score(runner, student)
        if of_student and found:
            parity = parity.with_labels(self.task.compare_scores(of_student, found, tolerance))
        return Difference(
            error="conversion",
            reference=self.role,
            candidate=kind,
            precision=artefact.precision,
            parity=parity,
            **Difference.figures(parity.batches, of_student, found),
        )


def _folder_of(source: Bundle | str | Path) -> Bundle | ExportFolder | None:
    """The bundle or the folder of exported files; None for one exported file.

    Raises:
        BundleError: the bundle is incomplete.
    """
    if not isinstance(source, Bundle):
        if format_of_file(Path(source)) is not None:
            return None
        exports = ExportFolder(source)
        if is_file(exports.manifest_path):
            return exports
        source = Bundle(source)
    source.read_complete()
    return source


def _check_absent(why: str, **options: Any) -> None:
    """Check that options are absent that this source does not take.

    Raises:
        SettingsError: one is given.
    """
    for name, value in options.items():
        if value is not None:
            raise SettingsError(f"--{name}: {why}. Leave it out.")


def _artefact_of(path: Path, device: torch.device) -> Artefact:
    """What is known of an exported file, from its sidecar, or from the file itself."""
    if is_file(sidecar_of(path)):
        try:
            return read_sidecar(path)
        except (OSError, ValidationError):
            raise RunnerError(f"{sidecar_of(path)}: not a sidecar of litdeploy. Remove it, or export again.") from None
    precision = described(path, device).metadata.get("precision", "fp32")
    return Artefact(path=path.name, sha256=sha256_of(path), precision=precision, versions={}, details={})


def _against(
    path: Path,
    against: str | Path | Network | None,
    device: torch.device,
    network: NetworkName | None,
    *,
    normalise: str | None,
    input_shape: tuple[int, ...] | None,
    task: TaskName | None,
) -> Network:
    """The network that one file is compared with; its input and task are those that the file states."""
    if against is None:
        raise SettingsError(f"{path}: say which network it is compared with: --against teacher.pt")
    if isinstance(against, Network):
        return against
    metadata = described(path, device).metadata
    stated = input_of(metadata)
    if stated is not None:
        task = read_task(metadata, stated, str(path)).name
    return load(against, network=network, normalise=normalise, input_shape=input_shape, input=stated, task=task)


def _asked(folder: Bundle | ExportFolder, asked: Sequence[str] | None) -> dict[str, Artefact]:
    """The artefacts to verify, by their keys."""
    there = folder.read().artefacts
    if not there:
        raise BundleError(
            f"{folder.path}: has no exported {folder.role}. Run `litdeploy export {folder.path} --onnx` first."
        )
    for kind in asked or ():
        if kind not in there:
            raise BundleError(
                f"--artefact {kind}: {folder.path} has no artefact of that name. It has {', '.join(there)}."
            )
    return {kind: artefact for kind, artefact in there.items() if asked is None or kind in asked}


def _teacher(
    bundle: Bundle, path: str | Path | None, network: NetworkName | None, say: Callable[[str], None]
) -> Network | None:
    """Load the teacher; None if its file is gone and no other is given."""
    manifest = bundle.read()
    if path is None and not Path(manifest.teacher.path).is_file():
        say(
            f"{manifest.teacher.path}: no such file; the effect of the compression is not measured (give --teacher "
            "FILE)"
        )
        return None
    return load_teacher(bundle, manifest, path, network)


def _set_aside(folder: Bundle | ExportFolder, kind: str, artefact: Artefact, path: Path, parity: Parity) -> Path:
    with folder.lock():
        if folder.read().artefacts.get(kind) != artefact:
            raise BundleError(f"{path}: was exported again while it was verified. Verify it again.")
        folder.drop_artefact(kind)
        details = {**artefact.details, "parity": parity.model_dump(mode="json")}
        kept = reject(path, path, artefact.model_copy(update={"details": details}))
        remove(sidecar_of(path))
        return kept


def _bisect(
    paths: Sequence[Path], student: Network, bench: _Bench, say: Callable[[str], None]
) -> dict[str, Parting | None]:
    """Bisect ONNX files, each with the tolerance of its precision."""
    few = moved(picked(bench.evidence.inputs, slice(_BISECT_IMAGES)), torch.device("cpu"))
    inputs = mapped(lambda tensor: tensor.contiguous(), few)
    partings = {}
    for path in paths:
        if format_of_file(path) not in (None, "onnx"):
            continue
        try:
            artefact = read_sidecar(path) if format_of_file(path) is None else _artefact_of(path, bench.device)
        except (OSError, ValidationError):
            raise BundleError(
                f"{sidecar_of(path)}: missing or damaged, so the precision of {path.name} is unknown. Remove "
                f"{path.name}, or export it again."
            ) from None
        say(f"bisecting {path.name}")
        tolerance = getattr(bench.target.tolerance, artefact.precision)
        partings[path.name] = first_parting(student, path, inputs, tolerance)
    return partings
