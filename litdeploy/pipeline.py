"""The verbs `deploy`, which compresses, exports and profiles, and `demo`, which trains its own teacher first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litdeploy.config.recipe import Recipe
from litdeploy.config.target import Target
from litdeploy.errors import BundleError, CheckpointError, TrainingError
from litdeploy.exporter import export
from litdeploy.exporter.build import check_one_pass
from litdeploy.files import remove, sha256_of
from litdeploy.networks import NetworkName, is_hub, published
from litdeploy.profiler import Report, profile, read_report
from litdeploy.runtime import resolve_target
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.trainer import Callback, compress, train
from litdeploy.trainer.distributed import launched
from litdeploy.trainer.progress import callbacks_of
from litdeploy.trainer.resolve import resolve_recipe
from litdeploy.trainer.resume import DEFAULT_EVERY
from litdeploy.trainer.teacher import read_teacher


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
    tensorboard: bool = False,
    feature_cache_dir: str | Path | None = None,
    progress: Callback | bool = True,
    callbacks: Sequence[Callback] = (),
    **changes: Any,
) -> tuple[Bundle, Report]:
    """Compress a teacher, export the student to ONNX and profile both.

    Stages that are complete in `out` are not repeated, and a training that was stopped is resumed.

    Args:
        teacher, recipe, out, device, network, overwrite, checkpoint_every, tensorboard, feature_cache_dir, progress,
            callbacks, **changes: as for `compress`.
        target: a deployment target, or its name or path.

    Returns:
        The bundle, and the report of its profile.

    Raises:
        BundleError: `out` holds a complete run of another teacher or recipe, and `overwrite` is False.
        TrainingError: several processes were started.
        LitdeployError: any error of the stages.
    """
    watching = callbacks_of(progress, callbacks)
    if launched().size > 1:
        raise TrainingError(
            "several processes can share the training alone: start `litdeploy compress` with the launcher, then "
            "`litdeploy export` and `litdeploy profile` without it."
        )
    resolved_target = resolve_target(target)
    teacher, network = published(teacher, network)
    resolved_recipe = resolve_recipe(recipe, changes)
    bundle = Bundle(out)
    if overwrite or not _trained(bundle, Path(teacher), resolved_recipe):
        if isinstance(network, str) and is_hub(network):  # refused here, and not after the training
            check_one_pass(read_teacher(teacher, resolved_recipe, network)[0])
        compress(
            teacher,
            recipe=resolved_recipe,
            out=out,
            device=device,
            network=network,
            overwrite=overwrite,
            resume=not overwrite,
            checkpoint_every=checkpoint_every,
            tensorboard=tensorboard,
            feature_cache_dir=feature_cache_dir,
            progress=progress,
            callbacks=callbacks,
            indistill=changes.get("indistill"),  # code that the caller named, not the recipe
        )
    else:
        watching.note(f"{bundle.path}: the student is trained already")
    aoti = "inductor" in resolved_target.runners
    if not _exported(bundle, ("onnx", "aoti") if aoti else ("onnx",)):
        watching.note("exporting and verifying")
        export(bundle, onnx=True, aoti=aoti, target=resolved_target, network=network)
    else:
        watching.note(f"{bundle.path}: exported already")
    report = _profiled(bundle, resolved_target)
    if report is None:
        report = profile(bundle, teacher=teacher, target=resolved_target, network=network, progress=watching.note)
    else:
        watching.note(f"{bundle.path}: profiled already")
    return bundle, report


def demo(
    out: str | Path = "demo", *, overwrite: bool = False, progress: Callback | bool = True
) -> tuple[Bundle, Report]:
    """Train a ResNet-56 on scikit-learn's digits, compress it to a ResNet-20, export, verify and profile it.

    Args:
        out: folder for the teacher and, in `out/deploy`, the bundle.
        overwrite: repeat stages that are complete.
        progress: as for `compress`.

    Raises:
        LitdeployError: any error of the stages.
    """
    watching = callbacks_of(progress)
    folder = Path(out)
    teacher = folder / "teacher.safetensors"
    if overwrite:
        remove(teacher)
    if not teacher.is_file():
        watching.note("training a ResNet-56 on scikit-learn's digits (1,797 images, 8×8)")
        train("resnet56", recipe="digits-resnet-teacher", out=teacher, device="cpu", resume=True, progress=progress)
    watching.note("compressing it to a ResNet-20 by LIT")
    return deploy(
        teacher,
        recipe="digits-resnet",
        target="demo",
        out=folder / "deploy",
        device="cpu",
        overwrite=overwrite,
        progress=progress,
    )


def _trained(bundle: Bundle, teacher: Path, recipe: Recipe) -> bool:
    """Whether the bundle holds this run, complete.

    Raises:
        BundleError: it holds another complete run, or files that are not a run's.
    """
    if not bundle.manifest_path.exists():
        return False
    manifest = bundle.read()
    if not teacher.is_file():
        raise CheckpointError(f"{teacher}: no such file.")
    filled = recipe.filled_as(manifest.recipe, manifest.data.labeled)
    same = manifest.teacher.sha256 == sha256_of(teacher) and manifest.recipe == filled
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
    """The existing report, if it is of this student, its exported file and this target."""
    report = read_report(bundle.profile_path)
    manifest = bundle.read_complete()
    current = (manifest.student_sha256, manifest.artefacts["onnx"].sha256, target)
    if report is None or (report.student_sha256, report.onnx_sha256, report.target) != current:
        return None
    return report
