"""Formulas as MathML, which browsers draw themselves: no script and no font is fetched."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

# What pymdownx.arithmatex makes of a formula.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAYED = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw the formulas of a page."""
    content = INLINE.sub(lambda found: convert(html.unescape(found[1])), content)
    return DISPLAYED.sub(
        lambda found: (
            f'<div class="formula">{convert(html.unescape(found[1]).strip(), display="block")}</div>'
        ),
        content,
    )
