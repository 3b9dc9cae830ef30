"""The verb `deploy`: compress, export and profile in one go. And the demo, which trains its own teacher first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litdeploy.config.recipe import Recipe, read_recipe
from litdeploy.config.target import Target
from litdeploy.errors import BundleError, CheckpointError, TrainingError
from litdeploy.exporter import export
from litdeploy.files import remove, sha256_of
from litdeploy.networks import NetworkName, published
from litdeploy.profiler import Report, profile, read_report
from litdeploy.runtime import resolve_target
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.trainer import Progress, compress, train
from litdeploy.trainer.checkpoints import DEFAULT_EVERY
from litdeploy.trainer.launch import launched
from litdeploy.trainer.resolve import resolve_recipe


def deploy(
    teacher: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    target: Target | str | Path | None = None,
    out: str | Path = DEFAULT_PATH,
    device: str = "auto",
    network: NetworkName | None = None,
    overwrite: bool = False,
    checkpoint_every: str = DEFAULT_EVERY,
    progress: Progress | None = None,
    **changes: Any,
) -> tuple[Bundle, Report]:
    """Goes from a teacher to a profiled ONNX file; stages that are whole in `out` are not done again, and a
    training that was stopped is gone on with.

    Args:
        teacher, recipe, out, device, network, overwrite, checkpoint_every, progress, **changes: as for `compress`.
        target: a deployment target, or the name or path of one.

    Raises:
        BundleError: `out` holds a whole run of another teacher or recipe, and `overwrite` is not given.
        TrainingError: several processes were started.
        LitdeployError: as the stages raise it.
    """
    progress = progress or Progress()
    if launched().size > 1:
        raise TrainingError(
            "only the training is shared by several processes: start `litdeploy compress` with the launcher, then "
            "`litdeploy export` and `litdeploy profile` without it."
        )
    aim = resolve_target(target)
    teacher, network = published(teacher, network)
    resolved = resolve_recipe(recipe, changes)
    bundle = Bundle(out)
    if overwrite or not _trained(bundle, Path(teacher), resolved):
        compress(
            teacher,
            recipe=resolved,
            out=out,
            device=device,
            network=network,
            overwrite=overwrite,
            resume=not overwrite,
            checkpoint_every=checkpoint_every,
            progress=progress,
            indistill=changes.get("indistill"),  # named by the caller, and not by the recipe
        )
    else:
        progress.note(f"{bundle.path}: the student is trained already")
    aoti = "inductor" in aim.runners
    if not _exported(bundle, ("onnx", "aoti") if aoti else ("onnx",)):
        progress.note("exporting and verifying")
        export(bundle, onnx=True, aoti=aoti, target=aim, network=network)
    else:
        progress.note(f"{bundle.path}: exported already")
    report = _profiled(bundle, aim)
    if report is None:
        report = profile(bundle, teacher=teacher, target=aim, network=network, progress=progress.note)
    else:
        progress.note(f"{bundle.path}: profiled already")
    return bundle, report


def demo(
    out: str | Path = "demo", *, overwrite: bool = False, progress: Progress | None = None
) -> tuple[Bundle, Report]:
    """The whole way on scikit-learn's digits: a ResNet-56 is trained, made a ResNet-20, exported and profiled.

    Raises:
        LitdeployError: as the stages raise it.
    """
    progress = progress or Progress()
    folder = Path(out)
    teacher = folder / "teacher.safetensors"
    recipe = read_recipe("digits-resnet")
    if overwrite:
        remove(teacher)
    if not teacher.is_file():
        progress.note("training a ResNet-56 on scikit-learn's digits (1,797 images, 8×8)")
        train("resnet56", recipe="digits-resnet-teacher", out=teacher, device="cpu", resume=True, progress=progress)
    progress.note("compressing it to a ResNet-20 by LIT")
    return deploy(
        teacher,
        recipe=recipe,
        target="demo",
        out=folder / "deploy",
        device="cpu",
        overwrite=overwrite,
        progress=progress,
    )


def _trained(bundle: Bundle, teacher: Path, recipe: Recipe) -> bool:
    """Whether the bundle holds this run, complete.

    Raises:
        BundleError: it holds another whole run, or files of somebody else's.
    """
    if not bundle.manifest_path.exists():
        return False
    manifest = bundle.read()
    if not teacher.is_file():
        raise CheckpointError(f"{teacher}: no such file.")
    same = manifest.teacher.sha256 == sha256_of(teacher) and manifest.recipe == recipe
    if not same:
        raise BundleError(
            f"{bundle.path}: holds another run (another teacher or recipe); it is kept. Choose another folder with "
            "--out, or --overwrite it."
        )
    return manifest.status == "complete"


def _exported(bundle: Bundle, kinds: tuple[str, ...]) -> bool:
    artefacts = bundle.read_complete().artefacts
    try:
        for kind in kinds:
            bundle.artefact_path(artefacts[kind])
    except (KeyError, BundleError):
        return False
    return True


def _profiled(bundle: Bundle, target: Target) -> Report | None:
    """The report that is there, where it is of this student, its exported file and this target."""
    report = read_report(bundle.profile_path)
    manifest = bundle.read_complete()
    current = (manifest.student_sha256, manifest.artefacts["onnx"].sha256, target)
    if report is None or (report.student_sha256, report.onnx_sha256, report.target) != current:
        return None
    return report
