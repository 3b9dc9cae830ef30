"""`litdeploy deploy`: compress, export and profile in one go; continues after the last stage that is whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from litdeploy.cli import export as export_command
from litdeploy.cli import options as o
from litdeploy.cli import profile as profile_command
from litdeploy.cli.console import note, output, scored, training_progress


def command(
    teacher: o.Teacher,
    student_depth: o.StudentDepth = None,
    student_blocks: o.StudentBlocks = None,
    data: o.Data = None,
    recipe: o.RecipeName = None,
    target: o.TargetName = None,
    method: o.Method = None,
    beta: o.Beta = None,
    discriminator: o.Discriminator = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    feature_cache: o.FeatureCache = None,
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
    resume: Annotated[bool, typer.Option("--resume", help="What it does anyway, unless told to --overwrite.")] = False,
    checkpoint_every: o.CheckpointEvery = "10min",
    json: o.Json = False,
) -> None:
    """Compress, export and profile, and go on where that stopped."""
    from litdeploy.pipeline import deploy

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
        "beta": beta,
        "discriminator": None if discriminator is None else str(discriminator),
        "epochs": epochs,
        "batch_size": batch_size,
        "precision": precision,
        "compile": compile,
        "feature_cache": o.views_of(feature_cache),
        "seed": seed,
        "network": network,
        "normalise": normalise,
        "input_shape": o.shape_of(input_shape),
    }
    bundle, report = deploy(
        teacher,
        recipe=recipe,
        target=target,
        out=out,
        device=device,
        overwrite=overwrite,
        checkpoint_every=checkpoint_every,
        progress=training_progress(),
        **changes,
    )
    if json:
        typer.echo(report.model_dump_json(indent=2))
        return
    manifest = bundle.read()
    for role in ("teacher", "student"):
        if "test" in manifest.metrics[role]:  # a generator's teacher has nothing that it could be measured by
            output.print(f"{role}   test {scored(manifest.metrics[role]['test'])}", highlight=False)
    for artefact in manifest.artefacts.values():
        export_command.show(artefact)
    profile_command.show(report, bundle.path)
    note(f"{bundle.path}: complete.")
