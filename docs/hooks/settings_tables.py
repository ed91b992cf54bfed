"""The tables of configuration.md, made from the models that read the settings."""

from __future__ import annotations

import re
from typing import Any

import tomli_w
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from mhmoe_np.settings.model import StrictModel
from mhmoe_np.settings.run import OPTIONS, TABLES

MARK = re.compile(r"^<!-- settings: (\w+) -->$", re.MULTILINE)
TYPES = {"string": "text", "boolean": "true or false", "object": "table", "array": "list"}
BOUNDS = {
    "exclusiveMinimum": ">\u00a0{}",
    "minimum": "≥\u00a0{}",
    "exclusiveMaximum": "<\u00a0{}",
    "maximum": "≤\u00a0{}",
}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put each table in the place of its mark."""
    return MARK.sub(lambda mark: table(mark[1]), markdown)


def table(name: str) -> str:
    """The keys of one table of the settings, in Markdown."""
    model = TABLES[name]
    schema = model.model_json_schema()
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, entry in schema["properties"].items():
        # What may be left out altogether is null or a value of its type.
        value = next((kind for kind in entry.get("anyOf", []) if kind["type"] != "null"), entry)
        required = key in schema.get("required", [])
        meaning = entry["description"]
        option = OPTIONS.get(f"{name}.{key}")
        if option is not None:
            meaning += f" (`{option}`)"
        cells = (
            f"`{key}`",
            ", ".join([_type(value), *_bounds(value)]),
            "required" if required else _default(model, key),
            meaning,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _type(entry: dict[str, Any]) -> str:
    if "enum" in entry or "const" in entry:
        return ", ".join(f'`"{value}"`' for value in entry.get("enum", [entry.get("const")]))
    if entry["type"] == "array":
        return f"list of {TYPES[entry['items']['type']]}"
    if entry["type"] == "object":
        kind = entry["additionalProperties"]["type"]
        return f"table of {TYPES.get(kind, kind)}"
    return TYPES.get(entry["type"], entry["type"])


def _default(model: type[StrictModel], key: str) -> str:
    field = model.model_fields[key]
    if field.default_factory_takes_validated_data:
        return "by other keys"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    return f"`{tomli_w.dumps({'value': value}).partition(' = ')[2].strip() or '{}'}`"


def _bounds(entry: dict[str, Any]) -> list[str]:
    found = [text.format(_number(entry[bound])) for bound, text in BOUNDS.items() if bound in entry]
    if "minLength" in entry:
        found.append("not empty")
    if entry["type"] == "object":
        found += _bounds(entry["additionalProperties"])
    return found


def _number(value: float) -> str:
    exponent = (int(value) + 1).bit_length() - 1
    if value > 1e6 and int(value) + 1 == 2**exponent:
        return f"2^{exponent}-1"
    return f"{value:g}"
