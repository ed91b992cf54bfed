"""The report as one page of HTML that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from latex2mathml.converter import convert
from markupsafe import Markup, escape

from mhmoe_np.audit.agreement import ROUNDINGS
from mhmoe_np.report.report import Report

TEMPLATE = Path(__file__).with_name("page.html")


def page(report: Report) -> str:
    """The whole page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"mathml": _mathml, "prose": _prose, "breakable": _breakable}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, roundings=ROUNDINGS)


def _mathml(latex: str) -> Markup:
    """A formula as MathML."""
    return Markup(convert(latex, display="block"))


def _prose(docstring: str) -> Markup:
    """A docstring's paragraphs; what stands between backticks is code."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    marked = (re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))) for text in paragraphs)
    return Markup("".join(f"<p>{text}</p>" for text in marked))


def _breakable(path: str) -> Markup:
    """A path that may be broken after each slash."""
    return Markup("/<wbr>").join(path.split("/"))
