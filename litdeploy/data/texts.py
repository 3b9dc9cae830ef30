"""Datasets of texts: stored one byte a character, or as the token ids of a tokenizer; see `prepared`.

Shape suffixes: N texts of a batch, L characters or tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import NetworkSpec, Noun, TokenInput
from litdeploy.data.augment import FOREIGN
from litdeploy.data.sources import TableSource, TableStore
from litdeploy.data.split import OnDemand, Split
from litdeploy.data.table import LONGEST, find_text_columns, row_name
from litdeploy.errors import DataError, first_line, import_library
from litdeploy.networks import is_hub, tokenizer_folder
from litdeploy.networks.embedder import lower_cases

DEFAULT_LENGTH = 1014
# Stored after the end of a text: no id, so that a padding token written in a text is one of its tokens.
NOTHING = -1
_ROWS_AT_ONCE = 1024
_TYPES = ("string", "large_string", "binary", "large_binary")


class Encoder(Protocol):
    """Texts → what is stored of them.

    Attributes:
        length: of each text; longer ones are cut, and shorter ones padded at the end.
        dtype: of what is stored.
    """

    length: int

    @property
    def dtype(self) -> type[np.integer[Any]]: ...

    def __call__(self, texts: Sequence[str]) -> NDArray[Any]:
        """(N, length)."""
        ...


class Characters:
    """One byte a character, 0 after the end."""

    def __init__(self, length: int | None) -> None:
        self.length = length or DEFAULT_LENGTH
        self.dtype = np.uint8

    def __call__(self, texts: Sequence[str]) -> NDArray[Any]:
        """See `Encoder`."""
        bytes_NL = np.zeros((len(texts), self.length), self.dtype)
        for row, text in zip(bytes_NL, texts, strict=True):
            points = np.frombuffer(text[: self.length].encode("utf-32-le", "surrogatepass"), np.uint32)
            row[: len(points)] = np.where((points > 0) & (points < FOREIGN), points, FOREIGN)
        return bytes_NL


class Tokens:
    """The `Encoder` for a network that takes tokens. Texts are cut (special tokens are kept), and padded at the end.

    Args:
        settings: the tokenizer, and the number of tokens of a text if the network leaves it open.
        spec: of the network, which takes tokens.

    Attributes:
        length: tokens of a text.
        dtype: int16 if the network's vocabulary allows it, else int32.
        fingerprint: SHA-256 (hexadecimal) of everything that decides a text's ids.

    Raises:
        DataError: there is no such tokenizer, or it does not fit the network.
        DependencyError: transformers is not installed.
    """

    def __init__(self, settings: DataSettings, spec: NetworkSpec) -> None:
        assert isinstance(spec.input, TokenInput)
        self._takes = spec.input
        self.source = _tokenizer_source(settings, spec)
        self._tokenizer = _open_tokenizer(self.source)
        self.length = settings.text_length or self._takes.length
        _check_fits(self._tokenizer, self.source, spec.name, self._takes)
        self._check_length(spec.name)
        self.dtype: type[np.signedinteger[Any]] = np.int16 if self._takes.vocabulary <= 2**15 else np.int32
        self.fingerprint = _fingerprint(self._tokenizer)

    def __call__(self, texts: Sequence[str]) -> NDArray[Any]:
        """See `Encoder`: ids (N, L), `NOTHING` after their ends.

        Raises:
            DataError: the tokenizer fails on a text, or gives ids that the network does not take: it is damaged.
        """
        ids_NL = np.full((len(texts), self.length), NOTHING, np.int64)
        try:
            for row, ids in zip(ids_NL, self._ids(texts), strict=True):
                row[: len(ids)] = ids
        except Exception as error:  # whatever a tokenizer raises that names tokens it does not have
            raise self._failed(first_line(error)) from None
        # The special tokens it adds need not be in its vocabulary.
        if ids_NL.max(initial=NOTHING) >= self._takes.vocabulary:
            raise self._failed(f"it gives the id {ids_NL.max()}, and the network takes less")
        return ids_NL.astype(self.dtype)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=self.length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return found

    def _failed(self, why: str) -> DataError:
        return DataError(
            f"{self.source}: the tokenizer fails on a text ({why}). Copy its files again, or name another: --tokenizer "
            "FOLDER"
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder; opened from there, it is the same."""
        self._tokenizer.save_pretrained(folder)

    def _check_length(self, network: str) -> None:
        most, special = self._takes.length, self._tokenizer.num_special_tokens_to_add()
        if self.length > most or (self._takes.fixed and self.length != most):
            raise DataError(
                f"--text-length {self.length}: {network} takes texts of {'' if self._takes.fixed else 'up to '}{most} "
                f"tokens. Say so: --text-length {most}"
            )
        if self.length <= special:
            raise DataError(
                f"--text-length {self.length}: the tokenizer {self.source} adds {special} tokens of its own to each "
                f"text, so that none of the text is left. Give more: --text-length {min(most, 128)}"
            )


def _tokenizer_source(settings: DataSettings, spec: NetworkSpec) -> str:
    if settings.tokenizer is not None:
        return settings.tokenizer
    if is_hub(spec.name):
        return tokenizer_folder(spec.name)
    raise DataError(
        f"{spec.name}: takes tokens, and no tokenizer for them is named. Name the folder that it was "
        "saved in: --tokenizer FOLDER"
    )


def _open_tokenizer(source: str) -> Any:
    """Open the tokenizer; no code in the folder is run.

    Raises:
        DataError: there is none, or it is damaged or needs its own code.
        DependencyError: transformers is not installed.
    """
    transformers = import_library("transformers", f"the tokenizer {source}", "pip install transformers")
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            source, use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever transformers and tokenizers raise for a damaged file
        raise DataError(
            f"{source}: no tokenizer can be opened there ({first_line(error)}). Give the folder that holds its "
            "tokenizer.json (or vocab.txt): --tokenizer FOLDER. Nothing is downloaded, and no code in it is run."
        ) from None
    if not getattr(found, "is_fast", False):
        raise DataError(
            f"{source}: its tokenizer ({type(found).__name__}) is written in Python, and litdeploy takes only those "
            "that the library tokenizers runs. Save it as a tokenizer.json: AutoTokenizer.from_pretrained(…, "
            "use_fast=True).save_pretrained(FOLDER)"
        )
    if found.pad_token is None and found.eos_token is not None:
        found.pad_token = found.eos_token  # GPT-2's kin have no other; what is padded is masked
    if lower_cases(Path(source)):
        _lower_case(found.backend_tokenizer)
    # From a folder without a vocabulary transformers makes a tokenizer that knows only its special tokens.
    if len(found) <= len(found.all_special_ids):
        raise DataError(
            f"{source}: holds no tokenizer: its vocabulary has nothing but {len(found)} special tokens. Copy its "
            "tokenizer.json (or vocab.txt) there, or name the folder that holds it: --tokenizer FOLDER"
        )
    return found


def _lower_case(tokenizer: Any) -> None:
    """Let a tokenizer lower-case texts first, as sentence-transformers does."""
    normalizers: Any = import_library("tokenizers", "a tokenizer", "pip install tokenizers").normalizers
    if "Lowercase" not in str(tokenizer.normalizer):
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])


def _check_fits(tokenizer: Any, source: str, network: str, takes: TokenInput) -> None:
    highest = max(tokenizer.get_vocab().values())
    if highest >= takes.vocabulary:
        raise DataError(
            f"{source}: the tokenizer has ids up to {highest:,}, and {network} takes 0 to {takes.vocabulary - 1:,}. "
            "Name the one that the network was made for: --tokenizer FOLDER"
        )
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"{source}: the tokenizer has no token to pad with. Write one into its "
            'tokenizer_config.json: "pad_token": "[PAD]"'
        )
    if tokenizer.pad_token_id != takes.pad:
        raise DataError(
            f"{source}: the tokenizer pads with id {tokenizer.pad_token_id}, and {network} with {takes.pad} "
            "(pad_token_id in its config.json; for your own network `pad` of its TokenInput). Name the tokenizer that "
            "it was made for: --tokenizer FOLDER"
        )


def _fingerprint(tokenizer: Any) -> str:
    """Hash the tokenizer as its library writes it, without its truncation and padding, which change when it is used."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole |= {"truncation": tokenizer.truncation_side, "padding": tokenizer.pad_token_id}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


class TextStore(TableStore):
    """The `Store` of a dataset of texts. They are cut to one length, and shorter ones padded at the end.

    Args:
        encoder: makes what is stored of a text.

    Raises:
        DataError: as `TableStore`.
    """

    noun: Noun = "text"

    def __init__(self, source: TableSource, settings: DataSettings, encoder: Encoder) -> None:
        columns = find_text_columns(source.load(source.first), source.name, settings)
        super().__init__(source, columns, any_numbers=True)
        self.shape = (encoder.length,)
        self.value_bytes = np.dtype(encoder.dtype).itemsize
        self.tokens = encoder if isinstance(encoder, Tokens) else None
        self._encode = encoder

    def stored(self, split: str, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """See `Store.stored`: (rows, length)."""
        kind = torch.from_numpy(np.empty(0, self._encode.dtype)).dtype
        texts_NL = torch.empty((len(rows), *self.shape), dtype=kind, device=device)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            texts_NL[start : start + len(some)] = self.read(split, some)
        return texts_NL

    def undecodable(self, split: str, rows: NDArray[np.int64]) -> dict[int, str]:
        """See `Store.undecodable`."""
        bad: dict[int, str] = {}
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            try:
                self._texts(split, some)
            except DataError:
                bad |= self._undecodable(split, some)
        return bad

    def _undecodable(self, split: str, rows: NDArray[np.int64]) -> dict[int, str]:
        bad = {}
        for row in rows.tolist():
            try:
                self._checked(split, row, self._cell(split, row))
            except DataError as error:
                bad[row] = str(error)
        return bad

    def streamed(self, split: str, rows: NDArray[np.int64], device: torch.device, workers: int) -> Split:
        """See `Store.streamed`; from the memory map of `datasets`, so quickly that workers would not help."""
        return OnDemand(partial(self.read, split), rows, torch.from_numpy(self.labels(split)[rows]).to(device))

    def read(self, split: str, rows: NDArray[np.int64]) -> Tensor:
        """What is stored of the texts of these rows: (rows, length), on the CPU.

        Raises:
            DataError: a text that is missing, empty, not UTF-8 or absurdly long; names split and row.
        """
        return torch.from_numpy(self._encode(self._texts(split, rows)))

    def _texts(self, split: str, rows: NDArray[np.int64]) -> list[str]:
        cells = zip(rows.tolist(), self._cells(split, rows), strict=True)
        return [self._checked(split, row, cell) for row, cell in cells]

    def _cells(self, split: str, rows: NDArray[np.int64]) -> list[Any]:
        column = self._column(split)
        try:
            cells: list[Any] = column[rows.tolist()][self.columns.content]
        except UnicodeDecodeError:  # Arrow does not check UTF-8; Python does
            cells = [self._cell(split, row) for row in rows.tolist()]
        return cells

    def _cell(self, split: str, row: int) -> Any:
        try:
            return self._column(split)[row][self.columns.content]
        except UnicodeDecodeError as error:
            raise self._not_utf8(split, row, error) from None

    def _checked(self, split: str, row: int, cell: Any) -> str:
        where = row_name(self.name, split, row)
        if isinstance(cell, bytes):
            try:
                cell = cell.decode("utf-8")
            except UnicodeDecodeError as error:
                raise self._not_utf8(split, row, error) from None
        if cell is None or not cell.strip():
            raise DataError(f"{where} has no text in column '{self.columns.content}'. Remove the row.")
        if len(cell) > LONGEST:
            raise DataError(
                f"{where} has a text of {len(cell):,} characters, and {LONGEST:,} are the most. Is a quote in the file "
                "never closed? Mend the row, or cut its text."
            )
        return str(cell)

    def _not_utf8(self, split: str, row: int, error: UnicodeDecodeError) -> DataError:
        return DataError(
            f"{row_name(self.name, split, row)} holds a text that is not UTF-8 "
            f"({error.reason} at byte {error.start}). Write the file again in UTF-8, or remove the row."
        )

    def _column(self, split: str) -> Any:
        dataset = self.source.load(split)
        dtype = str(getattr(dataset.features.get(self.columns.content), "dtype", "nothing"))
        if dtype not in _TYPES:
            raise DataError(
                f"{self.name}: column '{self.columns.content}' of split '{split}' holds {dtype}, and texts are needed. "
                "Name another with --text-column."
            )
        return dataset.select_columns([self.columns.content])
