"""`litdeploy export`: from a bundle, or any network, to artefacts that other people's servers load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json
from litdeploy.cli.recipe_options import OF_DATA, changes, recipe_options
from litdeploy.config.formats import FORMATS
from litdeploy.errors import SettingsError

if TYPE_CHECKING:
    from litdeploy.config.target import Precision
    from litdeploy.storage.records import Artefact


def _format_options() -> dict[str, Any]:
    """Parameter name → its annotation, of a flag for each format and of each of its options."""
    flags = {
        name: Annotated[bool | None, typer.Option(f"--{name}", help=row.help, rich_help_panel="Formats")]
        for name, row in FORMATS.items()
    }
    return flags | {
        option.name: Annotated[
            (bool if option.default is False else str) | None,
            typer.Option(option.flag, help=option.help, metavar=option.metavar, rich_help_panel=f"{row.title} options"),
        ]
        for row in FORMATS.values()
        for option in row.options
    }


def _read(formats: dict[str, Any]) -> dict[str, Any]:
    """The values of those options as `export` takes them: lists as lists, options not given left out."""
    lists = {option.name for row in FORMATS.values() for option in row.options if isinstance(option.default, tuple)}
    given = {name: o.words(value) if name in lists else value for name, value in formats.items() if value is not None}
    return dict.fromkeys(FORMATS, False) | given


@recipe_options({*OF_DATA, "network", "normalise", "input_shape", "task"})
def command(
    source: Annotated[
        Path,
        typer.Argument(help="A bundle; or the weights of any network, or a folder that transformers saved."),
    ] = o.DEFAULT_BUNDLE,
    out: Annotated[
        Path | None, typer.Option(help="The folder for the files of an uncompressed network.", metavar="DIR")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, int8, or several of them.", metavar="NAME,…")
    ] = "fp32",
    io_precision: Annotated[str, typer.Option(help="Precision of images and logits: fp32, fp16 or bf16.")] = "fp32",
    embed_preprocessing: Annotated[
        bool, typer.Option("--embed-preprocessing", help="Take pixels, uint8 (N, H, W, C), and normalize them inside.")
    ] = False,
    calibration_images: Annotated[
        int, typer.Option(help="Training images on which fp16, bf16 and int8 measure activations.", min=1)
    ] = 512,
    triton_repository: Annotated[
        Path | None, typer.Option(help="Also write a model repository for Triton Inference Server.", metavar="DIR")
    ] = None,
    transformers: Annotated[
        Path | None,
        typer.Option(
            help="Write a folder that transformers' from_pretrained loads, and SentenceTransformer if the student "
            "embeds texts; with a model card.",
            metavar="DIR",
            rich_help_panel="Formats",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder of --transformers if litdeploy wrote it.")
    ] = False,
    target: o.TargetName = None,
    json: o.Json = False,
    **given: Any,
) -> None:
    """Export a bundle's student, or a network uncompressed, and verify that each file computes the same."""
    from litdeploy.storage.exports import DEFAULT_EXPORTS
    from litdeploy.storage.records import Manifest

    formats = _read({name: given.pop(name) for name in _format_options() if name in given})
    wanted = any(formats[name] for name in FORMATS)
    if not wanted and transformers is None:
        raise SettingsError(f"say what to export: {', '.join(f'--{name}' for name in (*FORMATS, 'transformers DIR'))}")
    if transformers is not None:
        litdeploy.save_pretrained(
            source, transformers, overwrite=overwrite, network=given.get("network"), progress=note
        )
    if not wanted:
        return
    manifest = litdeploy.export(
        source,
        out=out,
        # Other words are refused by `export`.
        precisions=cast("list[Precision]", o.words(precision)),
        io_precision=cast("Precision", io_precision),
        embed_preprocessing=embed_preprocessing,
        calibration_images=calibration_images,
        triton_repository=triton_repository,
        target=target,
        progress=note,
        **formats,
        **changes(given),
    )
    if json:
        print_json({kind: artefact.model_dump(mode="json") for kind, artefact in manifest.artefacts.items()})
        return
    for artefact in manifest.artefacts.values():
        show(artefact)
    if isinstance(manifest, Manifest):
        note(f"Next: litdeploy profile{'' if source == o.DEFAULT_BUNDLE else f' {source}'}")
    else:
        if manifest.data is None:
            note("compared on noise; with --data, on the samples that the network is for")
        note(f"The files are in {out or DEFAULT_EXPORTS}. Again later: litdeploy verify {out or DEFAULT_EXPORTS}")


command = o.with_options(command, _format_options())


def show(artefact: Artefact) -> None:
    """Print an exported file, what became of its precision, and how it compares with PyTorch."""
    from litdeploy.runtime.engine import Precisions
    from litdeploy.storage.records import Parity

    details = artefact.details
    opset = f"opset {details['opset']}   " if "opset" in details else ""
    output.print(f"{artefact.path}   {opset}{artefact.precision}   {details['bytes']:,} bytes", highlight=False)
    if "largest_activation" in details:
        largest, kept = details["largest_activation"], details["kept_in_fp32"]
        output.print(
            f"  largest activation {largest['value']:.4g} (in {largest['layer'] or 'the network itself'}); "
            f"kept in fp32: {', '.join(name or 'the network itself' for name in kept) or 'nothing'}",
            highlight=False,
        )
    if "latency" in details:
        fp32_ms, int8_ms = details["latency"]["fp32_ms"], details["latency"]["int8_ms"]
        output.print(
            f"  a call of batch {details['latency']['batch_size']}: {int8_ms:.2f} ms, in fp32 {fp32_ms:.2f} ms"
            + ("  ← int8 is slower than fp32 here" if int8_ms > fp32_ms else ""),
            highlight=False,
        )
    if "precisions" in details:
        output.print(f"  {Precisions.model_validate(details['precisions']).summary()}", highlight=False)
    if details["parity"] is None:
        capabilities = ", ".join(details["compute_capabilities"])
        output.print(f"  not run here: built ahead of time for compute capability {capabilities}", highlight=False)
        return
    output.print(Parity.model_validate(details["parity"]).summary(), highlight=False)
