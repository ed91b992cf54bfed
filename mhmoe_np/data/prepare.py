"""From sources of text to a token store, in memory that does not grow with the text.

The text is read three times: to measure its documents, to write the held-out ones and to sample for the
tokenizer, and to encode. Only the last is slow. What it has done stays when it is interrupted: the same
preparation of the same files goes on behind the last whole shard, and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mhmoe_np.data.chunks import Chunk, in_chunks
from mhmoe_np.data.encoder import DTYPES, LEAST_ID_BYTES, dtype_name
from mhmoe_np.data.encoding_pool import encode_chunks
from mhmoe_np.data.json_lines import JsonLines
from mhmoe_np.data.pieces import Piece
from mhmoe_np.data.read_file import TEXT_KEY, OnBytes, read_pieces
from mhmoe_np.data.sample import Sample, train_on_sample
from mhmoe_np.data.shards import PROGRESS, Shards
from mhmoe_np.data.shared_lines import SharedLines
from mhmoe_np.data.sources import Source, is_token_file
from mhmoe_np.data.split import Split, split_by_size, split_pieces
from mhmoe_np.data.store import (
    DATA,
    HEADER,
    TOKENIZER,
    VALIDATION,
    Shared,
    StoredDomain,
    StoreHeader,
)
from mhmoe_np.data.token_files import read_token_pieces
from mhmoe_np.data.tokenizer import (
    end_of_text_id,
    id_count,
    load_tokenizer,
    save_tokenizer,
    tokenizer_sha256,
)
from mhmoe_np.errors import UserError
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.storage.checksums import seal
from mhmoe_np.storage.disk import check_disk
from mhmoe_np.storage.files import (
    new_locked_directory,
    remove_leftovers,
    write_json,
)
from mhmoe_np.storage.memory import return_free_memory, size_text
from mhmoe_np.storage.reading import check_regular


@dataclass(frozen=True)
class PreparationSettings:
    """How text is prepared.

    Attributes:
        vocab_size: of a tokenizer that is trained; at most.
        validation_fraction: of each domain's bytes that are held out.
        seed: of what is held out.
        text_key: where the text stands in a line of JSON, or the column of a table.
        weights: name of a domain -> its share of a batch, relative to the others'.
    """

    vocab_size: int
    validation_fraction: float = 0.05
    seed: int = 0
    text_key: str = TEXT_KEY
    weights: Mapping[str, float] = field(default_factory=dict)


def prepare_text(
    folder: Path,
    sources: Sequence[Source],
    settings: PreparationSettings,
    *,
    tokenizer: Tokenizer | None,
    workers: int,
    on_progress: OnProgress = unseen,
) -> StoreHeader:
    """Fill a folder with a store of these sources, all but its `checksums.json`.

    folder: exists; empty, or as an interrupted preparation left it.
    tokenizer: None: a byte-level BPE is trained on a sample of the text.
    workers: processes that encode; the result does not depend on it.

    Returns the store's header.

    Raises UserError: the text, the tokenizer or a weight is unfit; OSError: the disk refuses.
    """
    header = _Preparation(folder, sources, settings, tokenizer, workers, on_progress).run()
    return_free_memory()
    return header


class _Measured(NamedTuple):
    source: Source
    size: int  # bytes, or tokens
    training_size: int
    split: Split


class _Preparation:
    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        settings: PreparationSettings,
        tokenizer: Tokenizer | None,
        workers: int,
        on_progress: OnProgress,
    ) -> None:
        check_weights(settings.weights, [source.name for source in sources])
        self._folder, self._sources, self._settings = folder, sources, settings
        self._tokenizer, self._workers = tokenizer, workers
        self._on_progress = on_progress
        self._size = sum(source.size for source in sources)
        self._shared = SharedLines()
        self._held_out_documents: Counter[str] = Counter()
        for source in sources:
            for file in source.files:
                if tokenizer is None and is_token_file(file):
                    raise UserError(f"{file}: holds tokens; name the tokenizer that they are of")

    def run(self) -> StoreHeader:
        for name in (DATA, VALIDATION):
            (self._folder / name).mkdir(exist_ok=True)
            remove_leftovers(self._folder / name)
        shards = Shards(self._folder / DATA, self._identity())
        self._check_disk()
        report = self._stage("reading")
        measured = [self._measure(source, report) for source in self._sources]
        sample = self._hold_out(measured)
        tokenizer = self._tokenizer or self._train(sample)
        del sample
        return_free_memory()
        save_tokenizer(tokenizer, self._folder / TOKENIZER)
        report = self._stage("tokenising")
        domains = [self._encode(part, tokenizer, shards, report) for part in measured]
        header = StoreHeader(
            dtype=dtype_name(tokenizer),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            vocab_size=id_count(tokenizer),
            end_of_text=end_of_text_id(tokenizer),
            lines_in_both=Shared(
                held_out_lines=self._shared.lines,
                shared=self._shared.shared,
                is_estimate=self._shared.is_estimate,
            ),
            domains=domains,
        )
        write_json(self._folder / DATA / HEADER, header.model_dump())
        shards.end()
        return header

    def _check_disk(self) -> None:
        """Refuse what the disk cannot hold, before hours are spent on it."""
        made = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        names = ", ".join(source.name for source in self._sources[:5])
        check_disk(
            self._folder.parent,
            int(self._size * (self._settings.validation_fraction + LEAST_ID_BYTES)) - made,
            f"{names}: {size_text(self._size)} of text need",
            remedy="free some, or take less text",
        )

    def _identity(self) -> str:
        """A digest of all that decides the result."""
        found = {
            "settings": asdict(self._settings),
            "tokenizer": None if self._tokenizer is None else tokenizer_sha256(self._tokenizer),
            "files": [
                [source.name, str(file), status.st_size, status.st_mtime_ns]
                for source in self._sources
                for file in source.files
                for status in [check_regular(file)]
            ],
        }
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def _stage(self, name: str) -> OnBytes:
        on_bytes = counting(self._on_progress, name, self._size)
        on_bytes(0)
        return on_bytes

    def _pieces(self, source: Source, on_bytes: OnBytes) -> Iterator[Piece]:
        for file in source.files:
            if is_token_file(file):
                assert self._tokenizer is not None
                yield from read_token_pieces(
                    file,
                    end_of_text=end_of_text_id(self._tokenizer),
                    id_count=id_count(self._tokenizer),
                )
                on_bytes(check_regular(file).st_size)
            else:
                yield from read_pieces(file, text_key=self._settings.text_key, on_bytes=on_bytes)

    def _measure(self, source: Source, on_bytes: OnBytes) -> _Measured:
        sizes = array("q")
        for piece in self._pieces(source, on_bytes):
            if piece.begins:
                sizes.append(0)
            sizes[-1] += piece.size
        if not sizes:
            raise UserError(
                f"{source.files[0] if len(source.files) == 1 else source.name}: has no document with "
                "text in it; add some text"
            )
        size_of_document = np.frombuffer(sizes, dtype=np.int64)
        split = split_by_size(
            size_of_document,
            fraction=self._settings.validation_fraction,
            seed=self._settings.seed,
        )
        training = int(size_of_document[~split.held_out].sum()) if split.cut is None else split.cut
        return _Measured(source, int(size_of_document.sum()), training, split)

    def _hold_out(self, measured: Sequence[_Measured]) -> list[str]:
        """Write the held-out documents, and return a sample of the others where one is wanted."""
        report = self._stage("holding out")
        sample = Sample(sum(part.training_size for part in measured))
        for source, _, _, split in measured:
            path = self._folder / VALIDATION / f"{source.name}.jsonl"
            with JsonLines(path) as lines:
                for piece, held_out in split_pieces(self._pieces(source, report), split):
                    text = self._text(piece) if held_out or self._tokenizer is None else ""
                    if held_out:
                        self._held_out_documents[source.name] += piece.begins
                        lines.write(text, begins=piece.begins)
                        if isinstance(piece.content, str):
                            self._shared.add_held_out(text)
                    elif self._tokenizer is None:
                        sample.add(text)
        return sample.texts

    def _text(self, piece: Piece) -> str:
        if isinstance(piece.content, str):
            return piece.content
        assert self._tokenizer is not None
        return self._tokenizer.decode(piece.content.tolist(), skip_special_tokens=False)

    def _train(self, sample: Sequence[str]) -> Tokenizer:
        path = self._folder / TOKENIZER
        if path.exists():  # of the same preparation, before it was interrupted
            return load_tokenizer(path)
        self._on_progress("training the tokenizer", 0, 0)
        return train_on_sample(sample, vocab_size=self._settings.vocab_size)

    def _encode(
        self, part: _Measured, tokenizer: Tokenizer, shards: Shards, on_bytes: OnBytes
    ) -> StoredDomain:
        source, size, _, split = part
        done = shards.of(source.name)
        skipped = sum(record.pieces for record in done)
        training = self._training_pieces(source, split, on_bytes)
        for _ in range(skipped):
            next(training)
        lengths: deque[int] = deque()

        def chunks() -> Iterator[Chunk]:
            for chunk in in_chunks(training):
                lengths.append(len(chunk))
                yield chunk

        encoded = encode_chunks(chunks(), tokenizer, self._folder / TOKENIZER, workers=self._workers)
        width = DTYPES[dtype_name(tokenizer)].itemsize
        is_first = source is self._sources[0]
        with contextlib.closing(encoded):
            shards.write(source.name, encoded, lengths, width=width, is_first=is_first)
        records = shards.of(source.name)
        written = [record.shard for record in records]
        return StoredDomain(
            name=source.name,
            weight=self._settings.weights.get(source.name),
            sources=[str(file) for file in source.files],
            size=size,
            documents=sum(shard.documents for shard in written),
            held_out_documents=self._held_out_documents[source.name],
            tokens=sum(shard.tokens for shard in written),
            shards=written,
        )

    def _training_pieces(self, source: Source, split: Split, on_bytes: OnBytes) -> Iterator[Piece]:
        for piece, held_out in split_pieces(self._pieces(source, on_bytes), split):
            if not held_out:
                if isinstance(piece.content, str):
                    self._shared.add_training(piece.content)
                yield piece


def is_unfinished(folder: Path) -> bool:
    """Whether a preparation was interrupted here that can go on."""
    return (folder / DATA / PROGRESS).exists()


def prepare_store(
    out: Path,
    sources: Sequence[Source],
    settings: PreparationSettings,
    *,
    tokenizer: Tokenizer | None,
    workers: int,
    on_progress: OnProgress = unseen,
) -> StoreHeader:
    """Make a store of its own: `prepare_text` into a new folder that is there whole or not at all.

    Raises UserError: `out` exists, or as `prepare_text`; OSError: the disk is full or refuses.
    """

    def fill(folder: Path) -> StoreHeader:
        header = prepare_text(
            folder, sources, settings, tokenizer=tokenizer, workers=workers, on_progress=on_progress
        )
        seal(folder, store_files(folder))
        return header

    made: list[StoreHeader] = []
    new_locked_directory(
        out, lambda folder: made.append(fill(folder)), is_unfinished=is_unfinished
    ).release()
    return made[0]


def store_files(folder: Path) -> list[str]:
    """The names of the files that `prepare_text` made in a folder."""
    inside = [*(folder / DATA).iterdir(), *(folder / VALIDATION).iterdir()]
    return sorted([TOKENIZER, *(path.relative_to(folder).as_posix() for path in inside)])


def check_weights(weights: Mapping[str, float], names: Sequence[str]) -> None:
    """Refuse weights that are not of all these domains, or of others.

    Raises UserError: it names the domain.
    """
    if not weights:
        return
    for name in weights:
        if name not in names:
            raise UserError(
                f"weight of {name!r}: there is no such domain; there are {', '.join(names)}"
            )
    for name in names:
        if name not in weights:
            raise UserError(f"domain {name!r}: has no weight, and others have; give every domain one")
