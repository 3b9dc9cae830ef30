"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from litdeploy.errors import SettingsError
from litdeploy.storage.bundle import DEFAULT_PATH


def blocks(text: str) -> dict[str, int]:
    """Reads `layer1=3,layer2=2`."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): int(count) for name, count in pairs}
    except ValueError:
        raise SettingsError(
            f"--student-blocks {text}: write section=blocks, as in layer1=3,layer3=2; `litdeploy inspect` names the "
            "sections."
        ) from None


Teacher = Annotated[
    Path,
    typer.Argument(
        help="The teacher's weights: .pt .pth .th .ckpt .bin .safetensors, or a folder that transformers saved it in."
    ),
]
BundlePath = Annotated[Path, typer.Argument(help="The bundle.", show_default=True)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Network = Annotated[
    str | None,
    typer.Option(
        help="The network, where the file does not tell: resnet56, timm:NAME, hf:NAME, package.module:function."
    ),
]
Normalise = Annotated[
    str | None, typer.Option(help="imagenet, cifar10, cifar100, half, none, or m1,m2,m3:s1,s2,s3 on the scale 0–1.")
]
InputShape = Annotated[
    str | None,
    typer.Option(
        help="Channels, height and width of an image, as in 3,32,32, or the length of a text.", metavar="C,H,W"
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="A folder of class folders, a Parquet or CSV file, a folder of them, a hub id, a packed file, or digits."
    ),
]
ImageColumn = Annotated[str | None, typer.Option(help="The column that holds the images.")]
TextColumn = Annotated[str | None, typer.Option(help="The column that holds the texts.")]
TextLength = Annotated[
    int | None,
    typer.Option(
        help="Characters or tokens that texts are cut or padded to; else 1,014 characters, or the network's tokens.",
        min=1,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="The folder of the tokeniser, of a network that takes tokens; else that of hf:FOLDER."),
]
LabelColumn = Annotated[str | None, typer.Option(help="The column that holds the labels.")]
Attributes = Annotated[
    str | None,
    typer.Option(
        help="Columns that say whether an image has an attribute, in the place of labels: a generator's domains.",
        metavar="A,B,…",
    ),
]
ImageSize = Annotated[str | None, typer.Option(help="Resize every image to this height and width.", metavar="H,W")]
Workers = Annotated[
    int | None, typer.Option(help="Processes that decode, where the images do not fit in memory.", min=0)
]
SkipBad = Annotated[
    int | None, typer.Option(help="Leave out as many images that cannot be decoded; each is named.", min=0)
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="A recipe's name or path, :paper behind it for the published settings.")
]
TargetName = Annotated[str | None, typer.Option("--target", help="A deployment target's name or path.")]
Out = Annotated[Path, typer.Option(help="The folder that becomes the bundle.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run that is there.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run that is there, from its newest whole checkpoint.")
]
CheckpointEvery = Annotated[
    str,
    typer.Option(
        help="How often to write one: 30s, 10min, 2h, 500steps, 1epoch, several of them, or off.", metavar="N…"
    ),
]
Precision = Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs of all phases together.")]
BatchSize = Annotated[int | None, typer.Option(help="Images or texts a step, of all processes together.")]
LearningRate = Annotated[float | None, typer.Option(help="Highest learning rate of the main phase.")]
Seed = Annotated[int | None, typer.Option(help="Of initialisation, order and augmentation.")]
StudentDepth = Annotated[
    str | None,
    typer.Option(
        help="The student's depth; `litdeploy inspect` lists those possible. Several, as in 17,9, are a chain: each "
        "student teaches the next.",
        metavar="N[,N…]",
    ),
]
StudentBlocks = Annotated[
    str | None,
    typer.Option(help="Blocks a section, as in layer1=3,layer3=2; sections not named stay whole.", metavar="NAME=N,…"),
]
Method = Annotated[
    str | None, typer.Option(help="lit, or another: kd, hint, scratch, born-again, indistill, slimming.")
]
Init = Annotated[str | None, typer.Option(help="copy (the teacher's blocks, evenly spaced) or fresh.")]
Generations = Annotated[int | None, typer.Option(help="Of born-again: networks, each taught by the one before.")]
BornAgainBy = Annotated[
    str | None, typer.Option("--by", help="What born-again's generations learn by: kd or lit.", metavar="kd|lit")
]
StudentNetwork = Annotated[
    str | None,
    typer.Option(help="The student of indistill, as --network takes it: resnet20,width=8.", metavar="NETWORK"),
]
Sparsity = Annotated[float | None, typer.Option(help="Of slimming: weight of the batch norm scales in the loss.")]
PruneRatio = Annotated[float | None, typer.Option(help="Of slimming: share of the channels to remove, 0 to 1.")]
Compile = Annotated[
    str | None, typer.Option("--compile", help="torch.compile for teacher and step: auto (where it pays), on or off.")
]
Beta = Annotated[float | None, typer.Option(help="Weight of distillation in LIT's loss, 0 to 1; 0: sections alone.")]
Discriminator = Annotated[
    Path | None,
    typer.Option(help="Of a network that makes images: its discriminator's weights, to fine-tune the student against."),
]
Parallel = Annotated[
    str | None,
    typer.Option(
        help="How the processes of a launcher share LIT: data (each batch) or sections (for --beta 0).",
        metavar="data|sections",
    ),
]
BatchNorm = Annotated[
    str | None,
    typer.Option(
        help="Batch statistics: per-rank (of each process's part of a batch) or synchronised (of all of it).",
        metavar="per-rank|synchronised",
    ),
]
FeatureCache = Annotated[
    str | None,
    typer.Option(
        help="Views of each image whose teacher's features are kept: off, auto (where it pays and fits) or a number.",
        metavar="off|auto|K",
    ),
]
FeatureCacheDir = Annotated[
    Path | None, typer.Option(help="A folder to keep them in, for further students of the same teacher and data.")
]

DEFAULT_BUNDLE = DEFAULT_PATH


def views_of(text: str | None) -> int | str | None:
    """Reads --feature-cache; words are left to the recipe's own check."""
    return int(text) if text is not None and text.isdecimal() else text


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """Reads --input-shape: three numbers of an image, one of a text."""
    if text is None:
        return None
    return whole_numbers(text, "--input-shape", "3,32,32 (a text: 128)", 1 if text.isdecimal() else 3)


def depths_of(text: str | None) -> list[int] | None:
    """Reads --student-depth: one depth, or those of a chain."""
    return None if text is None else list(whole_numbers(text, "--student-depth", "20, or 17,9 for a chain"))


def size_of(text: str | None) -> list[int] | None:
    """Reads --image-size."""
    return None if text is None else list(whole_numbers(text, "--image-size", "32,32", 2))


def names_of(text: str | None) -> list[str] | None:
    """Reads --attributes."""
    return None if text is None else [name.strip() for name in text.split(",")]


def given(**settings: object) -> dict[str, object]:
    """Those fields of a recipe that were given."""
    return {key: value for key, value in settings.items() if value is not None}


def whole_numbers(text: str, option: str, example: str, count: int | None = None) -> tuple[int, ...]:
    """Reads `3,32,32`.

    Args:
        count: how many there must be; None: one or more.

    Raises:
        SettingsError: they are not, or are below 1.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or len(numbers) != (count or len(numbers)) or min(numbers) < 1:
        needed = "whole numbers" if count is None else f"{count} whole numbers"
        raise SettingsError(f"{option} {text}: {needed} of at least 1 are needed, as in {example}.")
    return numbers
