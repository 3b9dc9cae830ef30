"""`litdeploy train`: a network from new weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from litdeploy.cli import options as o
from litdeploy.cli.console import output, print_json, scored, training_progress


def command(
    network: Annotated[str, typer.Argument(help="resnet56, vdcnn17, timm:NAME, hf:NAME, package.module:function.")],
    data: o.Data = None,
    recipe: o.RecipeName = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    batch_norm: o.BatchNorm = None,
    learning_rate: o.LearningRate = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    device: o.Device = "auto",
    seed: o.Seed = None,
    normalise: o.Normalise = None,
    input_shape: o.InputShape = None,
    image_column: o.ImageColumn = None,
    text_column: o.TextColumn = None,
    label_column: o.LabelColumn = None,
    image_size: o.ImageSize = None,
    text_length: o.TextLength = None,
    tokenizer: o.Tokenizer = None,
    workers: o.Workers = None,
    skip_bad: o.SkipBad = None,
    out: Annotated[Path, typer.Option(help="The file of weights to write.")] = Path("teacher.safetensors"),
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    checkpoint_every: o.CheckpointEvery = "10min",
    json: o.Json = False,
) -> None:
    """Train a teacher, or the from-scratch baseline."""
    from litdeploy.trainer import train
    from litdeploy.trainer.launch import launched

    trained = train(
        network,
        recipe=recipe,
        out=out,
        device=device,
        overwrite=overwrite,
        resume=resume,
        checkpoint_every=checkpoint_every,
        progress=training_progress(),
        data=o.given(
            source=data,
            image_column=image_column,
            text_column=text_column,
            label_column=label_column,
            image_size=o.size_of(image_size),
            text_length=text_length,
            tokenizer=tokenizer,
            workers=workers,
            skip_bad=skip_bad,
        ),
        epochs=epochs,
        batch_size=batch_size,
        batch_norm=batch_norm,
        learning_rate=learning_rate,
        precision=precision,
        compile=compile,
        seed=seed,
        normalise=normalise,
        input_shape=o.shape_of(input_shape),
    )
    if launched().rank:
        return
    if json:
        print_json(
            {
                "path": str(trained.path),
                "validation": trained.validation.model_dump(),
                "test": trained.test.model_dump(),
            }
        )
    else:
        output.print(
            f"{trained.path}   validation {scored(trained.validation)}   test {scored(trained.test)}", highlight=False
        )
