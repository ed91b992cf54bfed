"""A Hugging Face directory as a model of ours: every key and every tensor accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mhmoe_np.checkpoints.checkpoint import GENERATION, MODEL_CONFIG, TOKENIZER, read_end_of_text
from mhmoe_np.data.tokenizer import check_saves, has_end_of_text, load_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.exchange.bit_linear import PER_BYTE, LinearClass, scale_of, unpack_rows
from mhmoe_np.exchange.foreign import Foreign, SourceTensor, fill
from mhmoe_np.exchange.hf_classes import QWEN2_MOE
from mhmoe_np.exchange.hf_config import HfModel, read_hf_config
from mhmoe_np.exchange.hf_files import FLOATS, StoredTensor, stored_tensors
from mhmoe_np.exchange.hf_names import their_tensors
from mhmoe_np.exchange.shared_gate import check_gate, gate_tensors, shared_down_names
from mhmoe_np.model.packed import floats_of
from mhmoe_np.model.parameters import Parameters, Part
from mhmoe_np.model.room import check_room
from mhmoe_np.model.weights import EMBEDDING
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.types import FloatArray

SMALLEST_SCALE = np.float32(1e-5)  # of a quantised weight [spec 5]
# The angles' frequencies, which older releases stored beside the weights and no release reads.
UNREAD = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def import_hf(directory: Path, *, on_progress: OnProgress = unseen) -> Foreign:
    """Read a model of transformers: configuration, weights, tokenizer, the ids that end a text.

    on_progress: counts parameters.

    Raises UserError: a file is missing or damaged; a key or a tensor is unknown, missing or of another
    shape, or says what our mathematics cannot. The line names it.
    """
    model = read_hf_config(directory / MODEL_CONFIG)
    check_room(model.config, copies=1, source=str(directory / MODEL_CONFIG))
    found = _Sources(model, directory).by_our_names()
    parameters = Parameters(model.config, np.float32)
    fill(parameters, found, source=directory, on_progress=on_progress)
    if model.hf_class is QWEN2_MOE:
        for name in shared_down_names(model.config):
            parameters.tensors[name] *= np.float32(0.5)
    end_of_text = read_end_of_text(directory / GENERATION) or read_end_of_text(directory / MODEL_CONFIG)
    return Foreign(parameters, _tokenizer(directory / TOKENIZER, end_of_text), end_of_text)


def _tokenizer(path: Path, end_of_text: tuple[int, ...]) -> Tokenizer | None:
    if not path.is_file():
        return None
    tokenizer = load_tokenizer(path)
    check_saves(tokenizer, str(path))
    if not end_of_text and not has_end_of_text(tokenizer):
        raise UserError(
            f"{path}: has none of the usual ends of text, and no file names one; give eos_token_id in "
            f"{path.with_name(GENERATION)}"
        )
    return tokenizer


class _Sources:
    """The tensors of a directory, each taken once; what nobody takes is an error."""

    def __init__(self, model: HfModel, directory: Path) -> None:
        self._config, self._hf_class, self._bit_form = model
        self._directory = directory
        self._stored = stored_tensors(directory)
        self._left = dict(self._stored)

    def by_our_names(self) -> dict[str, SourceTensor]:
        """Where each tensor of ours is read from."""
        spelling = min(
            self._hf_class.spellings,
            key=lambda spelling: sum(
                tensor.name not in self._left for tensor in their_tensors(self._config, spelling)
            ),
        )
        found: dict[str, SourceTensor] = {}
        for tensor in their_tensors(self._config, spelling):
            if self._bit_form in ("autobitlinear", "bitlinear") and tensor.entry.quantised:
                (part,) = tensor.parts
                found[part.tensor] = self._packed(tensor.name, tensor.shape, self._bit_form)
                continue
            stored = self._taken(tensor.name, tensor.shape)
            shapes = np.broadcast_to(np.float32(0), tensor.shape)
            for part in tensor.parts:
                found[part.tensor] = SourceTensor(
                    stored.name, shapes[part.where].shape, _reader(stored, part)
                )
        if self._hf_class is QWEN2_MOE:
            for name, zeros in gate_tensors(self._config).items():
                check_gate(self._taken(name, zeros.shape), self._config, source=str(self._directory))
        self._refuse_what_is_left()
        return found

    def _taken(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = tuple(FLOATS)
    ) -> StoredTensor:
        stored = self._left.pop(name, None)
        if stored is None:
            raise UserError(
                f"{self._directory}: lacks tensor {name!r}, which {self._hf_class.architecture} has"
            )
        if stored.dtype not in dtypes:
            raise UserError(
                f"{self._directory}: tensor {name!r} is {stored.dtype}; needs {' or '.join(dtypes)}"
            )
        if stored.shape != shape:
            raise UserError(
                f"{self._directory}: tensor {name!r} has shape {list(stored.shape)}, its configuration "
                f"says {list(shape)}"
            )
        return stored

    def _packed(self, name: str, shape: tuple[int, ...], linear_class: LinearClass) -> SourceTensor:
        """A packed matrix and its scale, as floats that quantise to them [D11]."""
        outputs, inputs = shape
        if outputs % PER_BYTE:
            raise UserError(
                f"{self._directory}: tensor {name!r} would have {outputs} rows; packed ones are a "
                f"multiple of {PER_BYTE}"
            )
        code = self._taken(name, (outputs // PER_BYTE, inputs), ("U8",))
        scale = self._taken(f"{name}_scale", (1,))

        def read() -> FloatArray:
            q_OI = unpack_rows(code.read())
            if q_OI.max() > 1:
                raise UserError(f"{self._directory}: tensor {name!r} holds a code that is no weight")
            (stored,) = scale.read().astype(np.float32)
            beta = scale_of(stored, linear_class) if 0 < stored < np.inf else np.float32(0)
            if not SMALLEST_SCALE <= beta < np.inf:
                raise UserError(
                    f"{self._directory}: tensor {scale.name!r} is {stored}, which is not the scale of "
                    f"weights whose mean magnitude is at least {SMALLEST_SCALE}"
                )
            return floats_of(q_OI.astype(np.float32), beta)

        return SourceTensor(name, shape, read)

    def _refuse_what_is_left(self) -> None:
        for name, stored in self._left.items():
            if UNREAD.fullmatch(name):
                continue
            if name == "lm_head.weight" and self._config.tie_word_embeddings:
                self._check_tied(stored)
                continue
            raise UserError(
                f"{self._directory}: has tensor {name!r}, which {self._hf_class.architecture} with "
                "this configuration has not"
            )

    def _check_tied(self, stored: StoredTensor) -> None:
        """A tied output head may be stored once more, as it is."""
        if not np.array_equal(stored.read(), self._stored[EMBEDDING].read()):
            raise UserError(
                f"{self._directory}: tensor {stored.name!r} is not {EMBEDDING!r}, but "
                "tie_word_embeddings is true"
            )


def _reader(stored: StoredTensor, part: Part) -> Callable[[], FloatArray]:
    return lambda: stored.read()[part.where].astype(np.float32)
