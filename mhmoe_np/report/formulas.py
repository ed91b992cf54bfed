"""Formulas as MathML, which browsers draw themselves: a page needs neither a script nor a font."""

from __future__ import annotations

import re
from typing import Literal
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markupsafe import Markup

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
ElementTree.register_namespace("", NAMESPACE)
PRIME = "\N{PRIME}"
FUNCTIONS = "cos", "exp", "sin"


def mathml(latex: str, display: Literal["block", "inline"] = "block") -> Markup:
    """A formula as MathML, mended where the converter leaves something to be wished.

    A single upright letter, the d of a gradient, comes out as a character reference and not marked as
    upright; a function without a space before its argument; a prime as an exponent, though its glyph
    is one already, and browsers that make it small once more show a dot.
    """
    text = convert(latex, display=display)
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
