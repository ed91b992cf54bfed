"""The door: one command a file, imported when its name is called, so that --help answers at once."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mhmoe_cli.printing import printable
from mhmoe_cli.progress import tell
from mhmoe_np.errors import Interrupted, UserError
from mhmoe_np.training.stopping import ignore_from_here

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

CLOSED_PIPE = 141  # what a shell gives a command that SIGPIPE ended
COMPLETION = "_MHMOE_NP_COMPLETE"  # the variable by which a shell asks
COMMANDS = {
    "train": "Train a language model of any of the paper's kinds.",
    "prepare": "Turn text of any size into a store of tokens, in parallel and resumable.",
    "tokenizer": "Train a tokenizer on text, or look at one.",
    "report": "Write a page on one run or several: curves, experts, tokens, settings.",
    "eval": "Score texts: perplexity per token, word and byte, and bits per byte.",
    "generate": "Continue a prompt.",
    "presets": "List the named settings of train and plan.",
    "init": "Write a checkpoint with random weights from a config.json.",
    "trace": "Run one forward and backward and write every tensor down.",
    "compare": "Compare two traces, or a trace with a checkpoint, and name what differs and why.",
    "replay": "Repeat the step that ended a run, and name the first number that is not finite.",
    "plan": "Forecast a run's memory, time and disk, by a short probe of this machine.",
    "pack": "Pack a BitNet model's weights to 1, 1.6 or 2 bits.",
    "unpack": "Write a packed model as an ordinary checkpoint again.",
    "import": "Read a model of Hugging Face or llama.cpp as a checkpoint.",
    "export": "Write a checkpoint for Hugging Face transformers or llama.cpp.",
    "inspect": "List a checkpoint's tensors: format, size, scale, shares of -1, 0 and +1.",
    "upcycle": "Make a mixture of experts of a dense model, with the same function at first.",
    "audit": "Hold everything that is claimed against its bounds; as tables, JSON or a page.",
    "gradcheck": "Check every hand-derived gradient against finite differences.",
    "vectors": "Write conformance vectors, and a script that checks a port against them.",
    "parity": "Show the paper's FLOPs and parameter parity, or solve for another one.",
}


@contextmanager
def _code_of_a_closed_pipe() -> Iterator[None]:
    """Click would end with code 1, which means that a check failed."""
    try:
        yield
    except BrokenPipeError:
        raise click.exceptions.Exit(CLOSED_PIPE) from None


class LazyGroup(click.Group):
    """Commands by name; a command's module is imported only to run it or to show its own help."""

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        """As click does; here --help and --version print."""
        with _code_of_a_closed_pipe():
            return super().make_context(*arguments, **named)

    def invoke(self, ctx: click.Context) -> object:
        """As click does."""
        with _code_of_a_closed_pipe():
            return super().invoke(ctx)

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

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands from the table above, too, and the group's own options."""
        from click.shell_completion import CompletionItem

        commands = [
            CompletionItem(name, help=help)
            for name, help in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, naming the nearest command for a misspelt one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from mhmoe_np.settings.model import nearest

            ctx.fail(f"no such command {args[0]!r}{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="mhmoe-np", message="%(prog)s %(version)s")
@click.pass_context
def group(context: click.Context) -> None:
    """Multi-Head Mixture-of-Experts (arXiv 2411.16205) on NumPy, Numba and CuPy, gradients by hand."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """Run the command line: 0 done, 1 a check or a run failed, 2 bad input (one line, no traceback)."""
    _open_standard_streams()
    _drop_odd_sizes()
    _unwind_on_signals()
    if COMPLETION in os.environ:
        from mhmoe_cli.completion import complete_whole_words

        complete_whole_words()
    try:
        # Outside standalone mode click hands back the code of a command that ended by Exit.
        code = group(prog_name="mhmoe-np", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        _end(error.format_message(), 2)
    except click.Abort:
        _end("interrupted", 130)
    except Interrupted as stop:
        name = signal.Signals(stop.signal).name
        _end("interrupted" if name == "SIGINT" else f"stopped by {name}", 128 + stop.signal)
    except UserError as error:
        _end(f"{error}{_of_the_locale()}", 2)
    except BrokenPipeError:
        _leave(CLOSED_PIPE)
    except MemoryError as error:
        _end(f"out of memory: {error or 'no more to be had'}; make the model or the batch smaller", 2)
    except OSError as error:
        place = error.filename or "a file or standard output"
        _end(f"{place}: {error.strerror or error}; nothing was overwritten", 2)
    _leave(code if isinstance(code, int) else 0)


def _of_the_locale() -> str:
    """What else may be to blame for a name that is not found, or a text that is not UTF-8."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return ""
    return f" (this locale's encoding is {encoding}; for names beyond it set PYTHONUTF8=1)"


def _unwind_on_signals() -> None:
    """End by an exception where a signal would end the process: half-written files are removed then.

    A signal that is ignored, as SIGHUP by nohup, stays ignored; and once the program is on its way out,
    all are, so that it gets there.
    """

    def unwind(kind: int, _frame: FrameType | None) -> None:
        ignore_from_here(kinds)
        raise Interrupted(kind)

    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for kind in kinds:
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, unwind)


def _open_standard_streams() -> None:
    """Streams that were closed lead nowhere, and those that are open can write any text.

    A file that is opened in the place of a closed stream would otherwise receive what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_odd_sizes() -> None:
    """Forget a size of the terminal that is none: tables and bars stumble over it."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]{0,4}", os.environ.get(name, "80")):
            del os.environ[name]


def _end(line: str, code: int) -> NoReturn:
    # Whoever cannot be told still gets the code.
    with contextlib.suppress(OSError):
        tell(f"mhmoe-np: {printable(' '.join(line.split()))}")
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit. What cannot be written is dropped: the interpreter would end with code 120 over it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    sys.exit(code)
