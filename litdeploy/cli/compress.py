"""`litdeploy compress`: from a teacher's weights to a bundle with a trained, shallower student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json, scored, training_progress

if TYPE_CHECKING:
    from litdeploy.storage.bundle import Bundle
    from litdeploy.storage.records import Manifest


def command(
    teacher: o.Teacher,
    student_depth: o.StudentDepth = None,
    student_blocks: o.StudentBlocks = None,
    data: o.Data = None,
    recipe: o.RecipeName = None,
    method: o.Method = None,
    init: o.Init = None,
    generations: o.Generations = None,
    by: o.BornAgainBy = None,
    student_network: o.StudentNetwork = None,
    sparsity: o.Sparsity = None,
    prune_ratio: o.PruneRatio = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    learning_rate: o.LearningRate = None,
    beta: o.Beta = None,
    discriminator: o.Discriminator = None,
    parallel: o.Parallel = None,
    batch_norm: o.BatchNorm = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    feature_cache: o.FeatureCache = None,
    feature_cache_dir: o.FeatureCacheDir = None,
    device: o.Device = "auto",
    seed: o.Seed = None,
    network: o.Network = None,
    normalise: o.Normalise = None,
    input_shape: o.InputShape = None,
    image_column: o.ImageColumn = None,
    text_column: o.TextColumn = None,
    label_column: o.LabelColumn = None,
    attributes: o.Attributes = None,
    image_size: o.ImageSize = None,
    text_length: o.TextLength = None,
    tokenizer: o.Tokenizer = None,
    workers: o.Workers = None,
    skip_bad: o.SkipBad = None,
    out: o.Out = o.DEFAULT_BUNDLE,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    checkpoint_every: o.CheckpointEvery = "10min",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the metrics for TensorBoard too.")] = False,
    json: o.Json = False,
) -> None:
    """Make a trained network shallower, by LIT.

    Ctrl-C and SIGTERM leave a checkpoint; the same command with --resume goes on from there.
    """
    from litdeploy.trainer import compress
    from litdeploy.trainer.launch import launched

    changes: dict[str, Any] = {
        "student_depth": o.depths_of(student_depth),
        "student_blocks": None if student_blocks is None else o.blocks(student_blocks),
        "data": o.given(
            source=data,
            image_column=image_column,
            text_column=text_column,
            label_column=label_column,
            attributes=o.names_of(attributes),
            image_size=o.size_of(image_size),
            text_length=text_length,
            tokenizer=tokenizer,
            workers=workers,
            skip_bad=skip_bad,
        ),
        "method": method,
        "init": init,
        "born_again": o.given(generations=generations, by=by) or None,
        "indistill": o.given(student=student_network) or None,
        "slimming": o.given(sparsity=sparsity, prune_ratio=prune_ratio) or None,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "beta": beta,
        "discriminator": None if discriminator is None else str(discriminator),
        "parallel": parallel,
        "batch_norm": batch_norm,
        "precision": precision,
        "compile": compile,
        "feature_cache": o.views_of(feature_cache),
        "seed": seed,
        "network": network,
        "normalise": normalise,
        "input_shape": o.shape_of(input_shape),
    }
    bundle = compress(
        teacher,
        recipe=recipe,
        out=out,
        device=device,
        overwrite=overwrite,
        resume=resume,
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        feature_cache_dir=feature_cache_dir,
        progress=training_progress(),
        **changes,
    )
    if launched().rank == 0:
        show(bundle, bundle.read(), json)


def show(bundle: Bundle, manifest: Manifest, json: bool) -> None:
    """Prints what came out of a training."""
    from litdeploy.storage.records import descent

    if json:
        print_json({"bundle": str(bundle.path), **manifest.model_dump(mode="json")})
        return
    if manifest.lineage:
        note(descent(manifest.lineage))
    metrics = manifest.metrics
    for role in ("teacher", "student"):
        if metrics[role]:
            splits = "   ".join(f"{split} {scored(found)}" for split, found in metrics[role].items())
            output.print(f"{role}   {splits}", highlight=False)
    data = manifest.data
    held_out = f"held out of the training {data.noun}s" if data.test_is_held_out else "the dataset's own"
    note(f"The test split ({held_out}) was used once, after the last epoch.")
    argument = "" if bundle.path == o.DEFAULT_BUNDLE else f" {bundle.path}"
    note(f"{bundle.path}: written. Next: litdeploy export --onnx{argument}")
