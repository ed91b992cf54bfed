"""The processor, as the system describes it."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def processor_facts() -> dict[str, str]:
    """What Linux says of the first processor, by its keys (`vendor_id`, `flags`); elsewhere nothing."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return facts


def processor() -> str:
    """The processor, as it names itself."""
    return processor_facts().get("model name") or platform.processor()
