"""The command line: ``emma-adapter``, also ``python -m emma_adapter.cli``. One file a command.

Commands import what they need when they run: ``--help`` waits for nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from ..errors import EmmaError
from ..untrusted import plain
from ..version import __version__
from .convert import convert
from .diff import diff
from .finetune import finetune
from .info import info
from .report import report

_BAD_INPUT, _INTERRUPTED = 2, 130


class _Program(click.Group):
    """Says on one line what is wrong with the input; errors of the program itself keep their traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            # Not standalone: click would print the usage too, and has other exit codes.
            code = super().main(*args, **{**options, "standalone_mode": False})
        except click.Abort:
            code = _INTERRUPTED
        except click.UsageError as error:
            where = "emma-adapter" if error.ctx is None else error.ctx.command_path
            code = _complain(f"{error.format_message().rstrip('. ')}. See {where} --help")
        except click.ClickException as error:
            code = _complain(error.format_message())
        except (EmmaError, OSError) as error:
            code = _complain(str(error))
        sys.exit(code)


def _complain(message: str) -> int:
    click.echo(f"Error: {plain(message, longest=10_000)}", err=True)
    return _BAD_INPUT


@click.group(cls=_Program, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="emma-adapter")
def main() -> None:
    """EMMA for vision-language models: look at adapters, convert them, train them, show what they do."""


for command in (info, convert, finetune, report, diff):
    main.add_command(command)
