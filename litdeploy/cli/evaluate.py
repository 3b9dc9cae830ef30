"""`litdeploy evaluate`: accuracy of any checkpoint or artefact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json, scored
from litdeploy.errors import GateError, SettingsError

if TYPE_CHECKING:
    from litdeploy.evaluation.quality import Judged
    from litdeploy.evaluation.retrieval import Retrieval


def command(
    file: Annotated[
        Path,
        typer.Argument(
            help="Weights, a folder that transformers saved, an exported file (.onnx, .pt2), or a bundle (its student)."
        ),
    ],
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
    attributes: o.Attributes = None,
    image_size: o.ImageSize = None,
    text_length: o.TextLength = None,
    tokenizer: o.Tokenizer = None,
    workers: o.Workers = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Of a network that makes images: the teacher's file, whose they are held against."),
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Fail with exit code 3 below this, in percent.", min=0, max=100)
    ] = None,
    retrieval: Annotated[
        bool,
        typer.Option(
            "--retrieval", help="Of weights: how well test images find training images of their class, by embedding."
        ),
    ] = False,
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="FEATURES",
            help="Of what makes images: FID and Inception score by a classifier's weights, or by `inception`.",
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Measure the accuracy of weights or of an exported file; of one that makes images, how near to the teacher's."""
    from litdeploy.evaluation import evaluate, evaluate_quality, evaluate_retrieval
    from litdeploy.storage.records import Likeness

    where_from = (
        o.given(
            source=data,
            image_column=image_column,
            text_column=text_column,
            label_column=label_column,
            attributes=o.names_of(attributes),
            image_size=o.size_of(image_size),
            text_length=text_length,
            tokenizer=tokenizer,
            workers=workers,
        )
        or None
    )
    shared: dict[str, Any] = {
        "data": where_from,
        "batch_size": batch_size,
        "device": device,
        "seed": seed,
        "network": network,
        "normalise": normalise,
        "input_shape": o.shape_of(input_shape),
    }
    if quality is not None:
        if retrieval or min_accuracy is not None:
            raise SettingsError("--quality: judges images, not classes. Leave --retrieval and --min-accuracy out.")
        judged = evaluate_quality(
            file,
            features=quality,
            split=split,
            precision=precision,
            teacher=teacher,
            **shared,
        )
        show_quality(file, split, judged, json)
        return
    if retrieval:
        if split != "test" or precision != "fp32" or min_accuracy is not None:
            raise SettingsError(
                "--retrieval: the test split is the queries and the training split the database, in fp32, and there is "
                "no accuracy. Leave --split, --precision and --min-accuracy out."
            )
        show(file, evaluate_retrieval(file, **shared), json)
        return
    found = evaluate(file, split=split, precision=precision, teacher=teacher, **shared)
    if isinstance(found, Likeness) and min_accuracy is not None:
        raise SettingsError(f"--min-accuracy {min_accuracy:g}: {file} makes images, which have none. Leave it out.")
    if json:
        print_json({"file": str(file), "split": split, **found.model_dump()})
    else:
        loss = "" if isinstance(found, Likeness) else f"   loss {found.loss:.4f}"
        output.print(f"{file}   {split} {scored(found)}{loss}   {found.images} samples", highlight=False)
    if min_accuracy is not None and not isinstance(found, Likeness) and 100 * found.top1 < min_accuracy:
        raise GateError(f"accuracy {scored(found)} is below --min-accuracy {min_accuracy:g} %.")


def show(file: Path, found: tuple[Retrieval, ...], json: bool) -> None:
    """Prints what queries found."""
    if json:
        print_json({"file": str(file), "retrieval": [each.model_dump() for each in found]})
        return
    for each in found:
        output.print(
            f"{file}   {each.metric:<6} mean average precision {each.mean_average_precision:.2%}   "
            f"of the nearest {each.top} {each.top_precision:.2%}   {each.queries} queries in {each.database} samples",
            highlight=False,
        )


def show_quality(file: Path, split: str, judged: Judged, json: bool) -> None:
    """Prints how good images are, the teacher's below."""
    if json:
        print_json({"file": str(file), "split": split, "quality": judged.model_dump()})
    else:
        for name, found in ((str(file), judged.student), ("its teacher", judged.teacher)):
            if found is not None:
                output.print(f"{name}   {split} {found.told()}   {judged.images} images", highlight=False)
    for line in judged.notes:
        note(line)
