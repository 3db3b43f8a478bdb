"""The command line: one file a command, each a thin face of the library.

Exit codes: 0 = done, 1 = ran and failed, 2 = the input is wrong. Failures say so in one line on standard error.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Sequence

import click

from niwaki.cli.bench import bench
from niwaki.cli.compare import compare
from niwaki.cli.groups import groups
from niwaki.cli.inspect import inspect
from niwaki.cli.methods import methods
from niwaki.cli.options import Group
from niwaki.cli.prune import prune
from niwaki.cli.run import run
from niwaki.cli.sweep import sweep
from niwaki.errors import InputError, NiwakiError

PATIENCE = 5.0
"""Seconds that other processes than the first one wait before they say what went wrong."""


def _print_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        from niwaki import __version__

        click.echo(f"niwaki {__version__}")
        context.exit()


@click.group(
    cls=Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: niwaki run rigl --task digits --sparsity 0.9 --out runs/rigl",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version and exit.")
@click.pass_context
def niwaki(context: click.Context) -> None:
    """Sparsity in deep learning: prune and grow neural networks, and see what it brings."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (run, prune, compare, sweep, inspect, groups, methods, bench):
    niwaki.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; the entry point ``niwaki``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character gets another one, not an error
            stream.reconfigure(errors="replace")
    try:
        code = niwaki.main(args=None if arguments is None else list(arguments), prog_name="niwaki", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        return _fail(_usage(error), 2)
    except InputError as error:
        return _fail(str(error), 2, error.details)
    except NiwakiError as error:
        return _fail(str(error), 1, error.details)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 1)
    except BrokenPipeError:  # the reader, such as `head`, has gone; so that Python's own flush at exit does not complain:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)


def _usage(error: click.ClickException) -> str:
    """Return click's complaint as one line that says where help is."""
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        known = error.possibilities or []
        message = f"there is no option {error.option_name!r}" + (f"; did you mean {' or '.join(map(repr, known))}?" if known else "")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return message if context is None else f"{message}; see: {context.command_path} --help"


def _fail(message: str, code: int, details: str = "") -> int:
    """Say in one line what went wrong.

    Of several processes the first one says it at once. The others wait: if it failed too, torchrun ends them before they say the same.
    """
    rank = os.environ.get("RANK", "0")
    who = "niwaki" if rank == "0" else f"niwaki: process {rank}"
    if rank != "0":
        time.sleep(PATIENCE)
    click.echo(f"{details}{who}: error: {' '.join(message.split())}", err=True)
    return code
