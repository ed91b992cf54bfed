"""GGUF files as tests make them: one of ours, taken apart by `gguf`, changed and put together again."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np


class Stored(NamedTuple):
    """A tensor as a file has it."""

    data: np.ndarray  # floats, or rows of packed bytes
    kind: gguf.GGMLQuantizationType

    @classmethod
    def quantised(cls, data: np.ndarray, kind: gguf.GGMLQuantizationType) -> Stored:
        return cls(gguf.quantize(data, kind), kind)

    @property
    def values(self) -> np.ndarray:
        return gguf.dequantize(self.data, self.kind)


class Parts(NamedTuple):
    """Everything in a file."""

    values: dict[str, Any]
    tensors: dict[str, Stored]


def take_apart(path: Path) -> Parts:
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if "GGUF." not in key}
    tensors = {t.name: Stored(np.array(t.data), t.tensor_type) for t in reader.tensors}
    return Parts(values, tensors)


def put_together(parts: Parts, path: Path) -> None:
    architecture = parts.values.get("general.architecture", "")
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        for key, value in parts.values.items():
            if key != "general.architecture" and value is not None:
                of_list = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
                writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value), of_list)
        for name, stored in parts.tensors.items():
            writer.add_tensor(name, stored.data, raw_dtype=stored.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
