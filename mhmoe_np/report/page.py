"""The report as one page of HTML that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import re
from collections.abc import Callable

from markupsafe import Markup, escape

from mhmoe_np.audit.agreement import ROUNDINGS
from mhmoe_np.report.formulas import mathml
from mhmoe_np.report.report import Report
from mhmoe_np.report.templates import template


def page(report: Report) -> str:
    """The whole page."""
    filters: dict[str, Callable[..., Markup]] = {
        "mathml": mathml,
        "marked": _marked,
        "prose": _prose,
        "breakable": _breakable,
    }
    return template("page.html", filters).render(report=report, roundings=ROUNDINGS)


def _marked(text: str) -> Markup:
    """What stands between backticks is code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _prose(docstring: str) -> Markup:
    """A docstring's paragraphs."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    return Markup("".join(f"<p>{_marked(text)}</p>" for text in paragraphs))


def _breakable(path: str) -> Markup:
    """A path that may be broken after each slash."""
    return Markup("/<wbr>").join(path.split("/"))
