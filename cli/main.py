"""The door: one command a file, imported when its name is called, so that --help answers at once."""

from __future__ import annotations

import importlib
import sys

import click

from mhmoe_np.errors import UserError

COMMANDS = {
    "train": "Train a language model of any of the paper's kinds.",
    "eval": "Score texts: perplexity per token, word and byte, and bits per byte.",
    "generate": "Continue a prompt.",
    "init": "Write a checkpoint with random weights from a config.json.",
    "trace": "Run one forward and backward and write every tensor down.",
    "replay": "Repeat the step that ended a run, and name the first number that is not finite.",
    "plan": "Forecast a run's memory, time and disk, by a short probe of this machine.",
    "pack": "Pack a BitNet model's weights to 1, 1.6 or 2 bits.",
    "unpack": "Write a packed model as an ordinary checkpoint again.",
    "inspect": "List a checkpoint's tensors: format, size, scale, shares of -1, 0 and +1.",
    "gradcheck": "Check every hand-derived gradient against finite differences.",
    "parity": "Show the paper's FLOPs and parameter parity, or solve for another one.",
}


class LazyGroup(click.Group):
    """Commands by name; a command's module is imported only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command's `command` in its module."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mhmoe_cli.{cmd_name}_command")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list from the table above: nothing is imported."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, naming the nearest command for a misspelt one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from mhmoe_np.settings.model import nearest

            ctx.fail(f"no such command {args[0]!r}{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mhmoe-np", message="%(prog)s %(version)s")
def group() -> None:
    """Multi-Head Mixture-of-Experts (arXiv 2411.16205) on NumPy and Numba, gradients by hand."""


def main() -> None:
    """Run the command line: 0 done, 1 a check or a run failed, 2 bad input (one line, no traceback)."""
    try:
        # Outside standalone mode click hands back the code of a command that ended by Exit.
        code = group(prog_name="mhmoe-np", standalone_mode=False)
    except click.UsageError as error:
        _end(error.format_message(), 2)
    except click.Abort:
        _end("interrupted", 130)
    except UserError as error:
        _end(str(error), 2)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        _end(f"{error.filename or 'a file'}: {error.strerror or error}; nothing was overwritten", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _end(line: str, code: int) -> None:
    click.echo(f"mhmoe-np: {' '.join(line.split())}", err=True)
    sys.exit(code)
