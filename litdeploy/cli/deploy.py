"""`litdeploy deploy`: compress, export and profile; resumes after the last finished stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import litdeploy
from litdeploy.cli import export as export_command
from litdeploy.cli import options as o
from litdeploy.cli import profile as profile_command
from litdeploy.cli.console import note, output, print_json, scored
from litdeploy.cli.recipe_options import changes, recipe_options

if TYPE_CHECKING:
    from litdeploy.profiler import Report
    from litdeploy.storage.bundle import Bundle


@recipe_options()
def command(
    teacher: o.TeacherFile,
    recipe: o.RecipeName = None,
    target: o.TargetName = None,
    device: o.Device = "auto",
    out: o.Out = o.DEFAULT_BUNDLE,
    json: o.Json = False,
    feature_cache_dir: o.FeatureCacheDir = None,
    overwrite: o.Overwrite = False,
    # What it does anyway, unless it overwrites.
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = False,
    checkpoint_every: o.CheckpointEvery = "10min",
    tensorboard: o.Tensorboard = False,
    track: o.Track = None,
    **given: Any,
) -> None:
    """Compress, export and profile; finished stages are not repeated.

    The same command resumes a run that was stopped.
    """
    from litdeploy.trainer.trackers import tracker

    bundle, report = litdeploy.deploy(
        teacher,
        recipe=recipe,
        target=target,
        out=out,
        device=device,
        overwrite=overwrite,
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        callbacks=[tracker(name) for name in track or ()],
        feature_cache_dir=feature_cache_dir,
        **changes(given),
    )
    if json:
        print_json(report)
        return
    show(bundle, report)
    note(f"{bundle.path}: complete.")


def show(bundle: Bundle, report: Report) -> None:
    """Print what each stage came to."""
    manifest = bundle.read()
    for role in ("teacher", "student"):
        if "test" in manifest.metrics[role]:  # a generator's teacher has no score of its own
            output.print(f"{role}   test {scored(manifest.metrics[role]['test'])}", highlight=False)
    for artefact in manifest.artefacts.values():
        export_command.show(artefact)
    profile_command.show(report, bundle.path)
