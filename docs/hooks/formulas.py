"""The formulas of a page, drawn."""

from __future__ import annotations

import html
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from mhmoe_np.report.formulas import mathml

# What pymdownx.arithmatex makes of a formula.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAYED = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw the formulas of a page."""

    def displayed(found: re.Match[str]) -> str:
        return f'<div class="formula">{mathml(html.unescape(found[1]).strip())}</div>'

    content = INLINE.sub(lambda found: mathml(html.unescape(found[1]), "inline"), content)
    return DISPLAYED.sub(displayed, content)
