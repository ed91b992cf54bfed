"""Pages of the site that stand elsewhere in the repository, and links that work in both places."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "specification.md": "mhmoe_np/SPECIFICATION.md",
    "decisions.md": "mhmoe_np/DECISIONS.md",
    "references.md": "mhmoe_np/REFERENCES.md",
}
"""Page of the site -> file of the repository."""
LINK = re.compile(
    r"\[(?P<text>[^\[\]]*)\]\((?P<inline>[^()\s]+)\)|^\[(?P<label>\w+)\]: (?P<to>\S+)$", re.M
)
FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    root = Path(config.config_file_path).parent
    for name, path in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links of the repository's pages to the site's; those to its other files become plain text.

    What leads nowhere is left as it is: then the build fails.
    """
    root = Path(config.config_file_path).parent
    docs = Path(config.docs_dir).relative_to(root).as_posix()
    source = PAGES.get(page.file.src_uri, f"{docs}/{page.file.src_uri}")
    page_of_file = {path: name for name, path in PAGES.items()}

    def led(match: re.Match[str]) -> str:
        target = match["inline"] or match["to"]
        path, sign, anchor = target.partition("#")
        if ":" in path or not path:
            return match[0]
        file = os.path.normpath(PurePosixPath(source).parent / path)
        name = page_of_file.get(file, file.removeprefix(f"{docs}/"))
        if files.get_file_from_path(name) is None and (root / file).exists():
            return match["text"] or ""
        return match[0].replace(target, f"{name}{sign}{anchor}")

    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(led, part) for part in parts[::2]]
    return "".join(parts)
