"""Arguments and options that several commands share, and how lists in their texts are read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from litdeploy.config.formats import described_suffixes
from litdeploy.errors import SettingsError

# As in storage.bundle, whose import takes longer than all else that --help needs. A test compares the two.
DEFAULT_BUNDLE = Path("deploy")
_OUTPUT = "Output and resuming"

TeacherFile = Annotated[
    Path,
    typer.Argument(
        help="The teacher's weights (.pt .pth .th .ckpt .bin .safetensors), or a folder that transformers saved."
    ),
]
BundlePath = Annotated[Path, typer.Argument(help="The bundle.", show_default=True)]
AnyFile = Annotated[
    Path,
    typer.Argument(
        help=f"Weights, a folder that transformers saved, an exported file ({described_suffixes()}), or a bundle."
    ),
]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="Name or path of a recipe; with :paper after it, its published settings."),
]
TargetName = Annotated[str | None, typer.Option("--target", help="Name or path of a deployment target.")]
MovedTeacherFile = Annotated[
    Path | None, typer.Option(help="The teacher's file, if it is no longer where the bundle says.")
]

Out = Annotated[Path, typer.Option(help="The folder of the bundle.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another run in that place.", rich_help_panel=_OUTPUT)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Resume the run in that place from its newest complete checkpoint.", rich_help_panel=_OUTPUT
    ),
]
CheckpointEvery = Annotated[
    str,
    typer.Option(
        help="How often to write a checkpoint: 30s, 10min, 2h, 500steps, 1epoch, several of them, or off.",
        metavar="N…",
        rich_help_panel=_OUTPUT,
    ),
]
Tensorboard = Annotated[
    bool, typer.Option("--tensorboard", help="Write the metrics for TensorBoard too.", rich_help_panel=_OUTPUT)
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Track the run with tensorboard, mlflow, wandb or trackio. May be repeated.",
        rich_help_panel=_OUTPUT,
    ),
]
FeatureCacheDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps the teacher's features for more students of the same teacher and data.",
        rich_help_panel="Distillation",
    ),
]

ColdCache = Annotated[bool, typer.Option("--cold-cache", help="Empty the caches before each timed call.")]
Pace = Annotated[
    str | None, typer.Option(help="Call at even intervals instead of one call after another.", metavar="N/s")
]
MinSpeedup = Annotated[
    float | None,
    typer.Option(
        help="Exit with code 3 if the low end of the headline speedup's 95 % interval is below this.",
        min=0,
        rich_help_panel="Gates",
    ),
]
MaxAccuracyDrop = Annotated[
    float | None,
    typer.Option(
        help="Exit with code 3 if the student's accuracy is more percentage points than this below its teacher's.",
        min=0,
        rich_help_panel="Gates",
    ),
]
Csv = Annotated[Path | None, typer.Option(help="Write the measurements as CSV too.", metavar="FILE")]
Html = Annotated[Path | None, typer.Option(help="Write an HTML page too.", metavar="FILE.html")]


Command = TypeVar("Command", bound=Callable[..., None])


def with_options(command: Command, options: Mapping[str, Any]) -> Command:
    """Add generated options to a command, which receives them in its `**` parameter.

    They follow the command's arguments and precede its own options, in --help too. Typer reads the signature that is
    set here; no function is wrapped.

    Args:
        options: parameter name → its annotation, `Annotated[TYPE | None, typer.Option(...)]`; the default is None.
    """
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    own = [each for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword = inspect.Parameter.KEYWORD_ONLY
    arguments = [each for each in own if each.default is inspect.Parameter.empty]
    generated = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in options.items()]
    rest = [each.replace(kind=keyword) for each in own if each.default is not inspect.Parameter.empty]
    command.__signature__ = inspect.Signature([*arguments, *generated, *rest])  # type: ignore[attr-defined]
    return command


def pace(text: str | None) -> float | None:
    """Read `--pace 100/s`; the unit may be left out.

    Raises:
        SettingsError: not a number above zero.
    """
    if text is None:
        return None
    try:
        calls = float(text.removesuffix("/s"))
    except ValueError:
        calls = math.nan
    if not 0 < calls < math.inf:
        raise SettingsError(f"--pace {text}: a number of calls per second is needed, as in --pace 100/s.")
    return calls


def words(text: str) -> list[str]:
    """Read `a,b,c`."""
    return [word.strip() for word in text.split(",")]


def whole_numbers(text: str, option: str, example: str, count: int | None = None) -> tuple[int, ...]:
    """Read `3,32,32`.

    Args:
        count: how many numbers there must be; None: one or more.

    Raises:
        SettingsError: another count, not whole numbers, or a number below 1.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or len(numbers) != (count or len(numbers)) or min(numbers) < 1:
        needed = "whole numbers" if count is None else f"{count} whole numbers"
        raise SettingsError(f"{option} {text}: {needed} of at least 1 are needed, as in {example}.")
    return numbers
