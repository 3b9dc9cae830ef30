"""Texts as the ids of a tokeniser that was saved beside a network of `transformers`.

Shape suffixes: N texts, L tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import NetworkSpec, TokenInput
from litdeploy.errors import DataError
from litdeploy.networks import is_hub
from litdeploy.networks.library import library

# Stored behind the end of a text: no id, so that a padding token written in a text is one of its tokens.
NOTHING = -1


class Tokens:
    """The `Encoder` of a network that takes tokens. Texts are cut with their special tokens kept, and padded behind.

    Args:
        settings: says where the tokeniser is, and how many tokens a text has, where the network does not.
        spec: of the network; takes tokens.

    Attributes:
        length: tokens of a text.
        dtype: int16 where the network's vocabulary allows it, else int32.
        fingerprint: SHA-256 (hexadecimal) of all by which a text becomes ids.

    Raises:
        DataError: there is no such tokeniser, or it is none for this network.
        DependencyError: transformers is not installed.
    """

    def __init__(self, settings: DataSettings, spec: NetworkSpec) -> None:
        assert isinstance(spec.input, TokenInput)
        self._takes = spec.input
        self.source = _source(settings, spec)
        self._tokenizer = _opened(self.source)
        self.length = settings.text_length or self._takes.length
        _check_fits(self._tokenizer, self.source, spec.name, self._takes)
        self._check_length(spec.name)
        self.dtype: type[np.signedinteger[Any]] = np.int16 if self._takes.vocabulary <= 2**15 else np.int32
        self.fingerprint = _fingerprint(self._tokenizer)

    def __call__(self, texts: Sequence[str]) -> NDArray[Any]:
        """See `Encoder`: ids (N, L), `NOTHING` behind their ends.

        Raises:
            DataError: the tokeniser cannot make tokens of a text, or not such as the network takes: it is damaged.
        """
        ids_NL = np.full((len(texts), self.length), NOTHING, np.int64)
        try:
            for row, ids in zip(ids_NL, self._tokenised(texts), strict=True):
                row[: len(ids)] = ids
        except Exception as error:  # whatever a tokeniser raises that names tokens that it does not have
            raise self._failed(_first_line(error)) from None
        # Those that it puts round a text need not be in its vocabulary.
        if ids_NL.max(initial=NOTHING) >= self._takes.vocabulary:
            raise self._failed(f"it gives the id {ids_NL.max()}, and the network takes less")
        return ids_NL.astype(self.dtype)

    def _tokenised(self, texts: Sequence[str]) -> list[list[int]]:
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
            f"{self.source}: the tokeniser fails on a text ({why}). Copy its files again, or name another: --tokenizer "
            "FOLDER"
        )

    def save(self, folder: Path) -> None:
        """Writes the tokeniser's files into a folder, from which it is opened again as the same."""
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
                f"--text-length {self.length}: the tokeniser {self.source} puts {special} tokens of its own round each "
                f"text, so that none of the text is left. Give more: --text-length {min(most, 128)}"
            )


def _source(settings: DataSettings, spec: NetworkSpec) -> str:
    if settings.tokenizer is not None:
        return settings.tokenizer
    if is_hub(spec.name):
        return spec.name.partition(":")[2]
    raise DataError(
        f"{spec.name}: takes tokens, and nothing says which tokeniser makes them of texts. Name the folder that it was "
        "saved in: --tokenizer FOLDER"
    )


def _opened(source: str) -> Any:
    """The tokeniser, which runs no code of the folder's.

    Raises:
        DataError: there is none, or it is damaged, or one that only code of its own opens.
        DependencyError: transformers is not installed.
    """
    transformers = library("transformers", f"the tokeniser {source}", "pip install transformers")
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            source, use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever transformers and tokenizers make of a damaged file
        raise DataError(
            f"{source}: no tokeniser can be opened there ({_first_line(error)}). Give the folder that holds its "
            "tokenizer.json (or vocab.txt): --tokenizer FOLDER. Nothing is downloaded, and no code in it is run."
        ) from None
    if not getattr(found, "is_fast", False):
        raise DataError(
            f"{source}: its tokeniser ({type(found).__name__}) is written in Python alone, and litdeploy takes those "
            "that the library tokenizers runs. Save it as a tokenizer.json: AutoTokenizer.from_pretrained(…, "
            "use_fast=True).save_pretrained(FOLDER)"
        )
    # Of a folder without a vocabulary transformers makes a tokeniser that knows its special tokens alone.
    if len(found) <= len(found.all_special_ids):
        raise DataError(
            f"{source}: holds no tokeniser: its vocabulary has nothing but {len(found)} special tokens. Copy its "
            "tokenizer.json (or vocab.txt) there, or name the folder that holds it: --tokenizer FOLDER"
        )
    return found


def _check_fits(tokenizer: Any, source: str, network: str, takes: TokenInput) -> None:
    highest = max(tokenizer.get_vocab().values())
    if highest >= takes.vocabulary:
        raise DataError(
            f"{source}: the tokeniser has ids up to {highest:,}, and {network} takes 0 to {takes.vocabulary - 1:,}. "
            "Name the one that the network was made for: --tokenizer FOLDER"
        )
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"{source}: the tokeniser has no token to pad with. Write the one that it shall take into its "
            'tokenizer_config.json: "pad_token": "[PAD]"'
        )
    if tokenizer.pad_token_id != takes.pad:
        raise DataError(
            f"{source}: the tokeniser pads with id {tokenizer.pad_token_id}, and {network} with {takes.pad} "
            "(pad_token_id in its config.json; of a network of yours `pad` of its TokenInput). Name the tokeniser that "
            "it was made for: --tokenizer FOLDER"
        )


def _fingerprint(tokenizer: Any) -> str:
    """Of the tokeniser as its library writes it, less how it cuts and pads, which is changed by using it."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole |= {"truncation": tokenizer.truncation_side, "padding": tokenizer.pad_token_id}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")[:200]
