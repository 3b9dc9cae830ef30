"""`litdeploy evaluate`: accuracy of any checkpoint or artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from litdeploy.cli import options as o
from litdeploy.cli.console import output, percent, print_json
from litdeploy.errors import GateError


def command(
    file: Annotated[Path, typer.Argument(help="Weights, an exported file (.onnx, .pt2), or a bundle (its student).")],
    data: o.Data = None,
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    batch_size: Annotated[int, typer.Option(help="Images a call.", min=1)] = 256,
    precision: Annotated[str, typer.Option(help="fp32 or bf16; of weights only.")] = "fp32",
    device: o.Device = "auto",
    seed: o.Seed = None,
    network: o.Network = None,
    normalise: o.Normalise = None,
    input_shape: o.InputShape = None,
    image_column: o.ImageColumn = None,
    text_column: o.TextColumn = None,
    label_column: o.LabelColumn = None,
    image_size: o.ImageSize = None,
    text_length: o.TextLength = None,
    workers: o.Workers = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Fail with exit code 3 below this, in percent.", min=0, max=100)
    ] = None,
    json: o.Json = False,
) -> None:
    """Measure the accuracy of weights or of an exported file."""
    from litdeploy.exporter import evaluate

    found = evaluate(
        file,
        data=o.data_settings(
            source=data,
            image_column=image_column,
            text_column=text_column,
            label_column=label_column,
            image_size=o.size_of(image_size),
            text_length=text_length,
            workers=workers,
        )
        or None,
        split=split,
        batch_size=batch_size,
        precision=precision,
        device=device,
        seed=seed,
        network=network,
        normalise=normalise,
        input_shape=o.shape_of(input_shape),
    )
    if json:
        print_json({"file": str(file), "split": split, **found.model_dump()})
    else:
        output.print(
            f"{file}   {split} {percent(found)}   loss {found.loss:.4f}   {found.images} images", highlight=False
        )
    if min_accuracy is not None and 100 * found.top1 < min_accuracy:
        raise GateError(f"accuracy {percent(found)} is below --min-accuracy {min_accuracy:g} %.")
