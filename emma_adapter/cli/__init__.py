"""The command line: ``emma-adapter``, or ``python -m emma_adapter.cli``. One file for each command.

Commands import what they need only when they run, so that ``--help`` is fast.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from ..errors import EmmaError
from ..messages import plain
from ..version import __version__
from .convert import convert
from .diff import diff
from .draw import draw
from .edit import edit
from .evaluate_drawing import evaluate_drawing
from .finetune import finetune
from .info import info
from .report import report

_BAD_INPUT, _INTERRUPTED = 2, 130
#: Packages whose ValueErrors are about the user's input: an argument, or a processor that isn't the model's.
_CHECKS_INPUT = ("transformers", "trl", "accelerate", "torch")


class _Program(click.Group):
    """Reports wrong input on one line; errors of the program itself keep their traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            # In standalone mode click would print the usage too, and use other exit codes.
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
        except ValueError as error:
            if (refused_by := _package(error)) not in _CHECKS_INPUT:
                raise
            code = _complain(
                f"{refused_by} refuses what it was given ({_first_line(error)}): check the arguments, and that the "
                "processor is the model's"
            )
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            code = _complain(
                f"out of memory ({_first_line(error)}): give smaller batches, smaller images, or --dtype bfloat16"
            )
        sys.exit(code)


def _package(error: Exception) -> str:
    """Return the name of the package whose code raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_out_of_memory(error: Exception) -> bool:
    torch: Any = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _complain(message: str) -> int:
    click.echo(f"Error: {plain(message, longest=10_000)}", err=True)
    return _BAD_INPUT


@click.group(cls=_Program, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="emma-adapter")
def main() -> None:
    """Inspect, convert and train EMMA adapters of vision-language models, show what they do, and draw and edit."""


for command in (info, convert, finetune, report, diff, draw, edit, evaluate_drawing):
    main.add_command(command)
