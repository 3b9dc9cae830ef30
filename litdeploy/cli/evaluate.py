"""`litdeploy evaluate`: how good a file is: accuracy, or what else its task is measured by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json, scored
from litdeploy.cli.recipe_options import OF_DATA, changes, recipe_options
from litdeploy.errors import GateError, SettingsError

if TYPE_CHECKING:
    from litdeploy.evaluation.quality import Judged
    from litdeploy.evaluation.retrieval import Retrieval


@recipe_options({*OF_DATA, "network", "normalise", "input_shape", "task"})
def command(
    file: o.AnyFile,
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    batch_size: Annotated[int, typer.Option(help="Images or texts per call.", min=1)] = 256,
    precision: Annotated[str, typer.Option(help="fp32 or bf16; for weights only.")] = "fp32",
    device: o.Device = "auto",
    seed: Annotated[
        int | None, typer.Option(help="Random seed of the held-out validation data; by default the bundle's, or 0.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="The teacher's file, whose outputs its own are compared with if labels are not."),
    ] = None,
    retrieval: Annotated[
        bool,
        typer.Option(
            "--retrieval", help="For weights: how well test images find training images of their class, by embedding."
        ),
    ] = False,
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="FEATURES",
            help="For a generator: FID and Inception score by a classifier's weights, or by `inception`.",
        ),
    ] = None,
    json: o.Json = False,
    min_accuracy: Annotated[
        float | None,
        typer.Option(help="Exit with code 3 below this accuracy, in percent.", min=0, max=100, rich_help_panel="Gates"),
    ] = None,
    **given: Any,
) -> None:
    """Measure the accuracy of weights or of an exported file.

    The images of a generator are compared with its teacher's instead.
    """
    shared: dict[str, Any] = {"batch_size": batch_size, "device": device, "seed": seed, **changes(given)}
    if quality is not None:
        if retrieval or min_accuracy is not None:
            raise SettingsError("--quality: judges images, not classes. Leave --retrieval and --min-accuracy out.")
        judged = litdeploy.evaluate_quality(
            file, features=quality, split=split, precision=precision, teacher=teacher, **shared
        )
        show_quality(file, split, judged, json)
        return
    if retrieval:
        if split != "test" or precision != "fp32" or min_accuracy is not None:
            raise SettingsError(
                "--retrieval: the test split is the queries and the training split the database, in fp32, and there is "
                "no accuracy. Leave --split, --precision and --min-accuracy out."
            )
        show_retrieval(file, litdeploy.evaluate_retrieval(file, **shared), json)
        return
    score = litdeploy.evaluate(file, split=split, precision=precision, teacher=teacher, **shared)
    if score.correct is None and min_accuracy is not None:
        raise SettingsError(
            f"--min-accuracy {min_accuracy:g}: {file} is not measured by labels and has no accuracy. Leave it out."
        )
    if json:
        print_json({"file": str(file), "split": split, **score.model_dump()})
    else:
        shown = "   ".join(filter(None, (scored(score), score.details(), f"{score.images} samples")))
        output.print(f"{file}   {split} {shown}", highlight=False)
    if min_accuracy is not None and score.correct is not None and 100 * score.correct < min_accuracy:
        raise GateError(f"accuracy {scored(score)} is below --min-accuracy {min_accuracy:g} %.")


def show_retrieval(file: Path, found: tuple[Retrieval, ...], json: bool) -> None:
    """Print what the queries found."""
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
    """Print the quality of the images, and of the teacher's below."""
    if json:
        print_json({"file": str(file), "split": split, "quality": judged.model_dump()})
    else:
        for name, found in ((str(file), judged.student), ("its teacher", judged.teacher)):
            if found is not None:
                output.print(f"{name}   {split} {found.summary()}   {judged.images} images", highlight=False)
    for line in judged.notes:
        note(line)
