"""`litdeploy verify`: what compression changed, and what export changed after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json, print_table, scored
from litdeploy.cli.recipe_options import OF_DATA, changes, recipe_options
from litdeploy.config.formats import described_suffixes
from litdeploy.errors import ParityError

if TYPE_CHECKING:
    from litdeploy.evaluation.verify import Verification
    from litdeploy.storage.records import Difference


@recipe_options({*OF_DATA, "network", "normalise", "input_shape", "task"})
def command(
    source: Annotated[
        Path,
        typer.Argument(
            help=f"A bundle, a folder that a network was exported to, or one exported file ({described_suffixes()})."
        ),
    ] = o.DEFAULT_BUNDLE,
    against: Annotated[
        Path | None, typer.Option(help="The weights of the network that one file is compared with.", metavar="FILE")
    ] = None,
    artefact: Annotated[
        list[str] | None,
        typer.Option(help="Verify only this artefact: onnx, onnx-fp16, aoti, …; may be repeated."),
    ] = None,
    bisect: Annotated[
        bool,
        typer.Option("--bisect", help="Name the first layer that differs in ONNX files beyond their tolerance."),
    ] = False,
    target: o.TargetName = None,
    teacher: o.MovedTeacherFile = None,
    json: o.Json = False,
    **given: Any,
) -> None:
    """Compare every exported file with its network, and a bundle's student with its teacher."""
    found = litdeploy.verify(
        source,
        against=against,
        artefacts=artefact,
        teacher=teacher,
        target=target,
        bisect=bisect,
        progress=note,
        **changes(given),
    )
    if json:
        print_json(found)
    else:
        _show(found, bisect)
    if not found.within:
        beyond = [
            f"{kind}:\n{parity.summary()}" + (f"\n  kept as {found.rejected[kind]}" if kind in found.rejected else "")
            for kind, parity in found.beyond.items()
        ]
        aside = " and set aside" if found.rejected else ""
        raise ParityError(f"beyond the tolerance{aside}:\n" + "\n".join(beyond))


def _show(found: Verification, bisect: bool) -> None:
    from litdeploy.profiler.report.tables import TextTable, cells

    scores = [each.score for each in found.differences if each.score is not None]
    score = "accuracy" if not scores or scores[0].correct is not None else "score"
    print_table(
        TextTable(
            "compression: teacher → student; conversion: student or network → artefact",
            cells("error of", "artefact", "largest", "relative", "same class", score, "points", ""),
            (tuple(cells(*_cells(each)) for each in found.differences),),
        )
    )
    for kind in found.not_run:
        output.print(f"{kind}: not run here; it was built ahead of time for other GPUs", highlight=False)
    for name, parting in found.partings.items():
        if parting is None:
            output.print(f"{name}: no layer's outputs differ on the compared inputs", highlight=False)
        else:
            by = (
                "NaN or infinite"
                if parting.max_relative is None
                else f"{parting.max_relative:.2e} of its largest value"
            )
            output.print(
                f"{name}: differs from {parting.layer} on ({by}), layer {parting.compared} of those compared",
                highlight=False,
            )
    if bisect and not found.partings:
        output.print("nothing to bisect: no ONNX file is beyond its tolerance", highlight=False)


def _cells(each: Difference) -> tuple[str, ...]:
    before, after = (score.correct if score else None for score in (each.reference_accuracy, each.candidate_accuracy))
    return (
        each.error,
        each.candidate,
        "not finite" if each.max_absolute is None else f"{each.max_absolute:.2e}",
        "–" if each.max_relative is None else f"{each.max_relative:.2e}",
        "–" if each.top1 is None else f"{each.top1:.2%}",
        scored(each.score),
        "–" if before is None or after is None else f"{100 * (after - before):+.2f}",
        "" if each.parity is None or each.parity.within else "beyond",
    )
