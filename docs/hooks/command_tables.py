"""The commands of commands.md, made from click's own: what `--help` says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from mhmoe_cli.main import group

PROGRAM = "mhmoe-np"
MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put all commands in the place of the mark."""
    if MARK not in markdown:
        return markdown
    described = "\n\n".join(_described(click.Context(group, info_name=PROGRAM)))
    return markdown.replace(MARK, described)


def _described(context: click.Context) -> Iterator[str]:
    """Each command below this one, in Markdown, in the order of use."""
    above = context.command
    assert isinstance(above, click.Group)
    for name in above.list_commands(context):
        command = above.get_command(context, name)
        assert command is not None
        here = click.Context(command, info_name=name, parent=context)
        yield f"## {here.command_path}"
        yield _code_spans(inspect.cleandoc(command.help or ""))
        usage = " ".join([here.command_path, *command.collect_usage_pieces(here)])
        yield f"```text\n{usage}\n```"
        yield _options(command, here)
        if isinstance(command, click.Group):
            yield from _described(here)


def _code_spans(help: str) -> str:
    """What a line of help writes as it is typed, as code."""
    return re.sub(r"(?<![`\w-])--[a-z-]+\b(?!`)", r"`\g<0>`", help)


def _options(command: click.Command, context: click.Context) -> str:
    lines = ["| option | meaning |", "|---|---|"]
    for option in command.get_params(context):
        record = option.get_help_record(context)
        if isinstance(option, click.Option) and record is not None and option.name != "help":
            spelling, meaning = (text.replace("|", r"\|") for text in record)
            lines.append(f"| `{spelling}` | {_code_spans(meaning)} |")
    return "\n".join(lines) if len(lines) > 2 else ""
