"""Reading the prompts of a file."""

from __future__ import annotations

from pathlib import Path

from mhmoe_np.errors import UserError
from mhmoe_np.storage.reading import parse_json, read_text

SUFFIXES = (".txt", ".jsonl")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a `.txt` file, one a line, or of a `.jsonl` file, under "prompt"; in their order.

    Empty lines are passed over; other keys of a `.jsonl` file's objects too.

    Raises UserError: another suffix, no such file, not UTF-8, a line that holds no prompt, or no line
    at all.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: is neither {' nor '.join(SUFFIXES)}; give one of them")
    text = read_text(path).removeprefix("\ufeff")
    lines = [(i, line.removesuffix("\r")) for i, line in enumerate(text.split("\n"), 1)]
    given = [(f"{path}: line {i}", line) for i, line in lines if line.strip()]
    prompts = [line if path.suffix == ".txt" else _prompt(line, place) for place, line in given]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts


def _prompt(line: str, place: str) -> str:
    value = parse_json(line, source=place)
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f'{place}: must be an object with a string under "prompt"')
    check_text(prompt, place)
    return prompt


def check_text(text: str, source: str) -> None:
    """Refuse what no UTF-8 can hold: halves of characters, as a shell or JSON may hand them over.

    Raises UserError: the line begins with `source`.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{source}: is not UTF-8; convert it") from None
