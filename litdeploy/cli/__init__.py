"""The command line: one file per command. Each parses, calls a public verb and prints; only here is typer or rich."""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from litdeploy.cli.console import errors, note, output
from litdeploy.errors import LitdeployError, interrupting_signals
from litdeploy.limits import usable_cores
from litdeploy.version import __version__

_FROM_TEACHER_TO_STUDENT = "From teacher to student"
_MEASURE = "Measure and compare"
_PREPARE = "Prepare and inspect"

# Command → its panel and summary in `litdeploy --help`; the module of the same name is imported when it is called.
COMMANDS = {
    "demo": (
        _FROM_TEACHER_TO_STUDENT,
        "Train a ResNet-56 on scikit-learn's digits, compress it to a ResNet-20, export, verify and profile it.",
    ),
    "deploy": (_FROM_TEACHER_TO_STUDENT, "Compress, export and profile; finished stages are not repeated."),
    "train": (_FROM_TEACHER_TO_STUDENT, "Train a network from new weights: a teacher, or the from-scratch baseline."),
    "compress": (_FROM_TEACHER_TO_STUDENT, "Make a trained network shallower, by LIT."),
    "export": (
        _FROM_TEACHER_TO_STUDENT,
        "Export a bundle's student, or a network uncompressed, and verify that each file computes the same.",
    ),
    "verify": (_MEASURE, "Compare every exported file with its network, and a bundle's student with its teacher."),
    "profile": (_MEASURE, "Measure teacher and student in every runner of the target."),
    "predict": (_MEASURE, "Measure students of several depths before any is trained."),
    "diff": (_MEASURE, "Compare two reports."),
    "evaluate": (_MEASURE, "Measure the accuracy of weights or of an exported file."),
    "compare": (_MEASURE, "Train every method at every depth on the same teacher, data and epochs, and compare them."),
    "inspect": (_PREPARE, "Show which network a file holds, its sections, and the possible depths of a student."),
    "data": (_PREPARE, "Prepare datasets."),
    "schema": (_PREPARE, "Print the JSON Schema of report.json, with the meaning of each field."),
}

# Former modes of `profile` → the commands that they are now. Their values have become arguments.
_FORMER_MODES = {"--predict": "predict", "--compare": "diff", "--schema": "schema"}


class _Commands(TyperGroup):
    """Imports a command when it is called: `litdeploy --help` needs no other library than typer and rich."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, _renamed(args))
        return name, _load(name) if name in COMMANDS else command, rest


def _load(name: str) -> Any:
    module = import_module(f"litdeploy.cli.{name}")
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(name)(module.command)
    return typer.main.get_command(alone)


def _renamed(args: list[str]) -> list[str]:
    """The arguments with a former mode of `profile` replaced by its command."""
    name, *rest = args
    for position, word in enumerate(rest if name == "profile" else ()):
        option, _, value = word.partition("=")
        if command := _FORMER_MODES.get(option):
            note(f"litdeploy: `profile {option}` is now a command of its own: litdeploy {command}")
            if command == "schema":  # it ignored all other options
                return [command]
            return [command, *rest[:position], *([value] if value else []), *rest[position + 1 :]]
    return args


app = typer.Typer(
    name="litdeploy",
    cls=_Commands,
    help="Make a trained deep network shallower by LIT, export it, verify it and measure the gain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _name, (_panel, _summary) in COMMANDS.items():
    app.command(_name, help=_summary, rich_help_panel=_panel)(lambda: None)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"litdeploy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line: a user's error becomes a message and an exit code, ours a traceback and 1."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        # Started by torchrun, whose last lines show each rank's traceback from that file.
        from torch.distributed.elastic.multiprocessing.errors import record

        record(_main)()
    else:
        _main()


def _discard_output() -> None:
    """Send standard output nowhere from now on: what is still in its buffer cannot be written either."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main() -> None:
    # All as Ctrl-C: the work under way ends the same way, with the same exit code.
    before = {number: signal.signal(number, signal.default_int_handler) for number in interrupting_signals()}
    # A container's quota of processor time limits no thread count by itself: 64 threads would share the time of two.
    if (cores := usable_cores()) < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    try:
        try:
            app(prog_name="litdeploy")
        finally:
            output.file.flush()  # here, where a failure gets its message, and not when Python exits
    except LitdeployError as error:
        process = f" (rank {rank})" if (rank := os.environ.get("RANK", "0")) != "0" else ""
        message = "\n".join([f"litdeploy{process}: {error}", *getattr(error, "__notes__", ())])
        errors.print(message, style="red" if error.exit_code == 2 else None, markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("litdeploy: interrupted; nothing was left half written.", markup=False)
        sys.exit(130)
    except MemoryError:
        errors.print("litdeploy: out of memory on this machine. End other programs, and run it again.", style="red")
        sys.exit(2)
    except OSError as error:
        # Every file that litdeploy opens has an error of its own; what is left is where the output goes.
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            errors.print(f"litdeploy: no file can have this name: {error.filename} ({error.strerror}).", style="red")
            sys.exit(2)
        _discard_output()
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EDQUOT):
            raise
        errors.print(f"litdeploy: the output cannot be written ({error.strerror}).", style="red")
        sys.exit(2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
