"""`litdeploy compress`: from a teacher's weights to a bundle with a trained, shallower student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json, scored
from litdeploy.cli.recipe_options import changes, recipe_options

if TYPE_CHECKING:
    from litdeploy.storage.bundle import Bundle
    from litdeploy.storage.records import Manifest


@recipe_options()
def command(
    teacher: o.TeacherFile,
    recipe: o.RecipeName = None,
    device: o.Device = "auto",
    out: o.Out = o.DEFAULT_BUNDLE,
    json: o.Json = False,
    feature_cache_dir: o.FeatureCacheDir = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    checkpoint_every: o.CheckpointEvery = "10min",
    tensorboard: o.Tensorboard = False,
    track: o.Track = None,
    **given: Any,
) -> None:
    """Make a trained network shallower, by LIT.

    Ctrl-C and SIGTERM leave a checkpoint; the same command with --resume continues from it.
    """
    from litdeploy.trainer.distributed import launched
    from litdeploy.trainer.trackers import tracker

    bundle = litdeploy.compress(
        teacher,
        recipe=recipe,
        out=out,
        device=device,
        overwrite=overwrite,
        resume=resume,
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        callbacks=[tracker(name) for name in track or ()],
        feature_cache_dir=feature_cache_dir,
        **changes(given),
    )
    if launched().rank == 0:
        show(bundle, bundle.read(), json)


def show(bundle: Bundle, manifest: Manifest, json: bool) -> None:
    """Print the result of a training."""
    from litdeploy.storage.records import CUT, descent

    if json:
        print_json({"bundle": str(bundle.path), **manifest.model_dump(mode="json")})
        return
    if manifest.lineage:
        note(descent(manifest.lineage))
    metrics = manifest.metrics
    for role in ("teacher", CUT, "student"):
        if metrics.get(role):
            splits = "   ".join(f"{split} {scored(score)}" for split, score in metrics[role].items())
            output.print(f"{role:<7}   {splits}", highlight=False)
    data = manifest.data
    held_out = f"held out of the training {data.noun}s" if data.test_is_held_out else "the dataset's own"
    note(f"The test split ({held_out}) was used once, after the last epoch.")
    argument = "" if bundle.path == o.DEFAULT_BUNDLE else f" {bundle.path}"
    note(f"{bundle.path}: written. Next: litdeploy export --onnx{argument}")
