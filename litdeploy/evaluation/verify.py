"""The verb `verify`: what compression changed, and what export changed after that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from litdeploy.batch import in_parts, mapped, moved, picked
from litdeploy.config.formats import FORMATS, format_of
from litdeploy.config.recipe import DataSettings
from litdeploy.config.target import Target, Tolerance
from litdeploy.data import Data, normalised_batches
from litdeploy.errors import BundleError
from litdeploy.evaluation.bisect import Parting, first_parting
from litdeploy.exporter.evidence import LEAST_IMAGES, Evidence, open_test_data
from litdeploy.exporter.parity import compare_runners
from litdeploy.exporter.teacher import load_teacher
from litdeploy.files import remove
from litdeploy.networks import Network, NetworkName, load
from litdeploy.runtime import Runner, open_runner, resolve_device, resolve_target
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle, read_sidecar, sidecar_of
from litdeploy.storage.records import Artefact, Difference, Parity, Record, Score
from litdeploy.storage.staging import reject, rejected_path
from litdeploy.tasks import task_of

_ANYTHING = Tolerance(atol=float(torch.finfo(torch.float64).max), top1=0, psnr=0, ssim=0)
_BISECT_IMAGES = 8


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
    def within(self) -> bool:
        """Whether every artefact is within its limits."""
        return not self.rejected


def verify(
    bundle: Bundle | str | Path = DEFAULT_PATH,
    *,
    artefacts: Sequence[str] | None = None,
    teacher: str | Path | None = None,
    target: Target | str | None = None,
    data: DataSettings | str | None = None,
    network: NetworkName | None = None,
    bisect: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Compare each artefact with the student, and the student with its teacher, on the test split.

    An artefact beyond the target's tolerance is renamed to `.rejected` and removed from the manifest.

    Args:
        bundle: a bundle with exported artefacts.
        artefacts: keys of the manifest (`onnx-fp16`); None: all.
        teacher: the teacher's file, if it moved. Without it, the compression is not measured.
        target, data, network: as for `export`.
        bisect: find the first differing layer of ONNX files beyond the tolerance, including those rejected earlier.
        progress: called with a line for each step.

    Raises:
        BundleError: an incomplete bundle, an unknown or altered artefact, or another teacher.
        LitdeployError: bad input; see `litdeploy.errors`.
    """
    say = progress or (lambda line: None)
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    manifest = bundle.read_complete()
    chosen = resolve_target(target)
    device = resolve_device(chosen.device)
    everything = _asked(bundle, manifest.artefacts, artefacts)
    asked = {kind: artefact for kind, artefact in everything.items() if artefact.runs_here}
    paths = {kind: bundle.artefact_path(artefact) for kind, artefact in asked.items()}
    student = load(bundle.student_path, network=network)
    opened = open_test_data(manifest, data, student, device)
    bench = _Bench(student, opened, chosen, device)

    differences: list[Difference] = []
    rejected: dict[str, str] = {}
    with open_runner("eager", network=student, device=device) as reference:
        say("student")
        of_student = bench.score(reference)
        original = _teacher(bundle, teacher, network, say)
        if original is not None:
            say("teacher")
            differences.append(bench.compression(original, reference, of_student))
        for kind, artefact in asked.items():
            say(kind)
            found = bench.conversion(kind, artefact, paths[kind], reference, of_student)
            differences.append(found)
            if found.parity is not None and not found.parity.within:
                rejected[kind] = str(_set_aside(bundle, kind, artefact, paths[kind], found.parity))
    partings = _bisect(bundle, student, bench, say) if bisect else {}
    not_run = tuple(kind for kind in everything if kind not in asked)
    return Verification(differences=tuple(differences), rejected=rejected, partings=partings, not_run=not_run)


class _Bench:
    """The data and limits that every artefact of a bundle is compared on."""

    def __init__(self, student: Network, data: Data, target: Target, device: torch.device) -> None:
        self.target, self.device = target, device
        self.task = task_of(student.spec)
        self._data, self._spec = data, student.spec.input
        self.evidence = Evidence.of(data, student, max(LEAST_IMAGES, target.batch_sizes[-1]))

    def score(self, runner: Runner, reference: Runner | None = None) -> Score | None:
        """On the whole test split; None if the task needs a reference and there is none."""
        if reference is None and self.task.needs_reference:
            return None
        batches = normalised_batches(self._data.test, self._spec, self.target.batch_sizes[-1])
        found: Score = self.task.evaluate(runner.run, batches, self._spec, reference.run if reference else None)
        return found

    def compression(self, teacher: Network, student: Runner, of_student: Score | None) -> Difference:
        with open_runner("eager", network=teacher, device=self.device) as runner:
            size = self.target.batch_sizes[-1]
            outputs = [
                torch.cat([side.run(batch) for batch in in_parts(self.evidence.inputs, size)])
                for side in (runner, student)
            ]
            batch = self.task.compare(outputs[0], outputs[1], size, _ANYTHING, self._spec)
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
        with open_runner(
            FORMATS[format_of(kind)].runner, path=path, device=self.device, memory_limit=self.target.memory_limit
        ) as runner:
            parity = compare_runners(student, runner, self.evidence.inputs, sizes, tolerance, self._spec)
            found = self.score(runner, student)
        if of_student and found:
            parity = parity.with_labels(self.task.compare_scores(of_student, found, tolerance))
        return Difference(
            error="conversion",
            reference="student",
            candidate=kind,
            precision=artefact.precision,
            parity=parity,
            **Difference.figures(parity.batches, of_student, found),
        )


def _asked(bundle: Bundle, there: dict[str, Artefact], asked: Sequence[str] | None) -> dict[str, Artefact]:
    if not there:
        raise BundleError(f"{bundle.path}: has no exported student. Run `litdeploy export {bundle.path} --onnx` first.")
    for kind in asked or ():
        if kind not in there:
            raise BundleError(
                f"--artefact {kind}: {bundle.path} has no artefact of that name. It has {', '.join(there)}."
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


def _set_aside(bundle: Bundle, kind: str, artefact: Artefact, path: Path, parity: Parity) -> Path:
    with bundle.lock():
        if bundle.read().artefacts.get(kind) != artefact:
            raise BundleError(f"{path}: was exported again while it was verified. Verify it again.")
        return _reject(bundle, kind, artefact, path, parity)


def _reject(bundle: Bundle, kind: str, artefact: Artefact, path: Path, parity: Parity) -> Path:
    bundle.drop_artefact(kind)
    details = {**artefact.details, "parity": parity.model_dump(mode="json")}
    kept = reject(path, path, artefact.model_copy(update={"details": details}))
    remove(sidecar_of(path))
    return kept


def _bisect(bundle: Bundle, student: Network, bench: _Bench, say: Callable[[str], None]) -> dict[str, Parting | None]:
    """Bisect every rejected ONNX file, with the tolerance of its precision."""
    few = moved(picked(bench.evidence.inputs, slice(_BISECT_IMAGES)), torch.device("cpu"))
    inputs = mapped(lambda tensor: tensor.contiguous(), few)
    partings = {}
    for path in sorted(bundle.export_path.glob(rejected_path(Path("*.onnx")).name)):
        try:
            artefact = read_sidecar(path)
        except (OSError, ValidationError):
            raise BundleError(
                f"{sidecar_of(path)}: missing or damaged, so the precision of {path.name} is unknown. Remove "
                f"{path.name}, or export it again."
            ) from None
        say(f"bisecting {path.name}")
        tolerance = getattr(bench.target.tolerance, artefact.precision)
        partings[path.name] = first_parting(student, path, inputs, tolerance)
    return partings
