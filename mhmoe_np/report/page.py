"""The report as one page of HTML that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markupsafe import Markup, escape

from mhmoe_np.audit.agreement import ROUNDINGS
from mhmoe_np.report.report import Report
from mhmoe_np.report.templates import template

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
ElementTree.register_namespace("", NAMESPACE)
PRIME = "\N{PRIME}"
FUNCTIONS = "cos", "exp", "sin"


def page(report: Report) -> str:
    """The whole page."""
    filters = {"mathml": _mathml, "marked": _marked, "prose": _prose, "breakable": _breakable}
    return template("page.html", filters).render(report=report, roundings=ROUNDINGS)


def _mathml(latex: str) -> Markup:
    """A formula as MathML, mended where the converter leaves something to be wished.

    A single upright letter, the d of a gradient, comes out as a character reference and not marked as
    upright; a function without a space before its argument; a prime as an exponent, though its glyph
    is one already, and browsers that make it small once more show a dot.
    """
    text = convert(latex, display="block")
    text = re.sub("<mi>(&#x000[46][0-9A-F];)</mi>", r'<mi mathvariant="normal">\1</mi>', text)
    formula = ElementTree.fromstring(text)
    for node in list(formula.iter()):
        for i in reversed(range(len(node) - 1)):
            if node[i].text in FUNCTIONS and not node[i + 1].tag.endswith("}mo"):
                node.insert(i + 1, ElementTree.Element(f"{{{NAMESPACE}}}mspace", width="0.17em"))
        if node.tag.endswith(("}msup", "}msubsup")) and node[-1].text == PRIME:
            base, *index, prime = node
            if index:
                inner = ElementTree.Element(f"{{{NAMESPACE}}}msub")
                inner.extend([base, *index])
                base = inner
            prime.tag = f"{{{NAMESPACE}}}mo"
            prime.attrib |= {"lspace": "0", "rspace": "0"}
            node.tag = f"{{{NAMESPACE}}}mrow"
            node[:] = [base, prime]
    return Markup(ElementTree.tostring(formula, encoding="unicode"))


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
