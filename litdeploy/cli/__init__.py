"""The command line: one file a command. Each parses, calls and prints; nothing else imports typer or rich."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

import typer

from litdeploy import __version__
from litdeploy.cli import data
from litdeploy.cli.console import errors
from litdeploy.errors import LitdeployError

app = typer.Typer(
    name="litdeploy",
    help="Makes a trained deep network shallower by LIT, exports it, verifies it and measures what it gained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS = ("compress", "export", "verify", "profile", "deploy", "compare", "inspect", "evaluate", "train", "demo")
for _name in COMMANDS:
    _command = import_module(f"litdeploy.cli.{_name}").command
    app.command(_name)(_command)
app.add_typer(data.app, name="data")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"litdeploy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Runs the command line; errors of the user's become a message and an exit code, ours a traceback and 1."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        # Started by torchrun, whose last lines tell each rank's traceback from such a file.
        from torch.distributed.elastic.multiprocessing.errors import record

        record(_main)()
    else:
        _main()


def _main() -> None:
    # As Ctrl-C: what is under way ends as it would, and with the same exit code.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name="litdeploy")
    except LitdeployError as error:
        process = f" (rank {rank})" if (rank := os.environ.get("RANK", "0")) != "0" else ""
        told = "\n".join([f"litdeploy{process}: {error}", *getattr(error, "__notes__", ())])
        errors.print(told, style="red" if error.exit_code == 2 else None, markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("litdeploy: interrupted; nothing was left half written.", markup=False)
        sys.exit(130)
    except MemoryError:
        errors.print("litdeploy: out of memory on this machine. End what else takes it, and run it again.", style="red")
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)
