"""Sentence embedders: a text encoder of transformers with the pooling that makes one vector of a text.

A folder that sentence-transformers saved describes it in modules.json, 1_Pooling/config.json and
sentence_bert_config.json; a bundle in `embedding.json`.

Shape suffixes: N texts of a batch, L tokens, D width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from torch import Tensor, nn

from litdeploy.config.recipe import Pooling
from litdeploy.config.settings import Settings
from litdeploy.config.spec import TaskName, TokenInput
from litdeploy.errors import NetworkError
from litdeploy.files import is_file, is_inside, parse_json, read_small, write_text

POOLINGS: tuple[str, ...] = get_args(Pooling)

# In a folder of sentence-transformers, and in a bundle.
MODULES, EMBEDDING = "modules.json", "embedding.json"
# The file of a Transformer module; the first that exists is read, as sentence-transformers does.
_TRANSFORMER = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
# Before version 5.5 sentence-transformers wrote a key for each pooling.
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Embedding(Settings):
    """How a text's embedding is made around the encoder.

    Attributes:
        pooling: of the last hidden states over a text's tokens.
        normalize: whether embeddings have length 1.
        max_seq_length: tokens of a text; None: as many as the encoder takes.
        do_lower_case: whether texts are lower-cased before the tokenizer.
    """

    pooling: Pooling = "mean"
    normalize: bool = False
    max_seq_length: int | None = Field(None, ge=1)
    do_lower_case: bool = False

    def with_pooling(self, pooling: str | None, source: str) -> Embedding:
        """The same with another pooling; None: its own.

        Raises:
            NetworkError: there is no such pooling.
        """
        if pooling is None:
            return self
        if pooling not in POOLINGS:
            raise NetworkError(f"{source}: no pooling '{pooling}'. Write one of {', '.join(POOLINGS)}: --pooling mean")
        return self.model_copy(update={"pooling": pooling})


class SentenceEmbedder(nn.Module):
    """A text encoder and its pooling as one network.

    Args:
        transformer: of transformers, without a head; takes `input_ids` and `attention_mask`.
        embedding: pooling and normalization.
        takes: the input of the encoder.

    Attributes:
        input_spec: the input: the encoder's, up to `embedding.max_seq_length` tokens.
        task: of its output; see `output.detect_task`.
    """

    task: TaskName = "embedding"

    def __init__(self, transformer: nn.Module, embedding: Embedding, takes: TokenInput) -> None:
        super().__init__()
        self.transformer = transformer
        self.embedding = embedding
        self.input_spec = takes.within(embedding.max_seq_length)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 (N, L) both, padded at the end → embeddings (N, D)."""
        hidden_NLD = self.transformer(input_ids=input_ids, attention_mask=attention_mask)[0]
        embedding_ND = pooled(hidden_NLD, attention_mask, self.embedding.pooling)
        return F.normalize(embedding_ND, p=2, dim=-1) if self.embedding.normalize else embedding_ND


def pooled(hidden_NLD: Tensor, mask_NL: Tensor, pooling: Pooling) -> Tensor:
    """Reduce hidden states to (N, D), over the tokens that the mask keeps, which come first."""
    if pooling == "cls":
        return hidden_NLD[:, 0]
    if pooling == "lasttoken":
        last_N1D = (mask_NL.sum(1) - 1)[:, None, None].expand(-1, 1, hidden_NLD.shape[-1])
        return hidden_NLD.gather(1, last_N1D)[:, 0]
    kept_NL1 = mask_NL[..., None]
    if pooling == "max":
        return hidden_NLD.masked_fill(kept_NL1 == 0, -torch.inf).amax(1)
    kept_NL1 = kept_NL1.to(hidden_NLD.dtype)
    count_N1 = kept_NL1.sum(1).clamp(min=1e-9)
    return (hidden_NLD * kept_NL1).sum(1) / (count_N1 if pooling == "mean" else count_N1.sqrt())


def encoder_folder(folder: Path) -> Path:
    """The folder of the encoder's config.json and weights: for sentence-transformers that of its first module.

    Raises:
        NetworkError: modules.json cannot be read, or its first module is outside the folder.
    """
    if not is_file(folder / MODULES):
        return folder
    modules = _modules(folder)
    return folder / (modules[0][1] if modules else "")


def read_embedding(folder: Path) -> Embedding | None:
    """The embedding that a folder describes; None if it describes none.

    Raises:
        NetworkError: its modules are not an encoder, a pooling and perhaps a normalization, or a pooling that is not
            known, or a file is damaged.
    """
    if is_file(folder / EMBEDDING):
        return _checked(_read(folder / EMBEDDING), folder / EMBEDDING)
    if not is_file(folder / MODULES):
        return None
    modules = _modules(folder)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise NetworkError(
            f"{folder / MODULES}: a sentence embedder of the modules {', '.join(kinds) or 'none'}; litdeploy takes "
            "Transformer, Pooling and perhaps Normalize. Give the folder of its encoder alone, which is then pooled: "
            f"{encoder_folder(folder) if kinds[:1] == ['Transformer'] else 'FOLDER'} --pooling mean"
        )
    if len(modules) == 3:
        place = folder / modules[2][1] / "config.json"
        normalized = _read(place).get("module_input_name", "sentence_embedding") if is_file(place) else None
        if normalized not in (None, "sentence_embedding"):
            raise NetworkError(
                f"{place}: normalizes {normalized!r}; litdeploy takes one that normalizes the embedding."
            )
    encoder = encoder_folder(folder)
    settings = _encoder_settings(encoder)
    place = folder / modules[1][1] / "config.json"
    found = {
        "pooling": _pooling_of(_read(place), place),
        "normalize": len(modules) == 3,
        "max_seq_length": settings.get("max_seq_length") or _tokens_of(encoder),
        "do_lower_case": bool(settings.get("do_lower_case", False)),
    }
    return _checked(found, folder / MODULES)


def lower_cases(folder: Path) -> bool:
    """Whether a folder says that texts are lower-cased before its tokenizer."""
    settings = _read(folder / EMBEDDING) if is_file(folder / EMBEDDING) else _encoder_settings(folder)
    return bool(settings.get("do_lower_case", False))


def _encoder_settings(folder: Path) -> dict[str, Any]:
    files = [folder / f"sentence_{kind}_config.json" for kind in _TRANSFORMER]
    found: dict[str, Any] = next((_read(path) for path in files if is_file(path)), {})
    return found


def write_modules(embedding: Embedding, width: int, length: int, folder: Path) -> None:
    """Write what makes a folder with an encoder one that sentence-transformers loads.

    Args:
        width: of the embedding.
        length: tokens of a text; longer ones are cut.
        folder: exists.
    """
    kinds = ["Transformer", "Pooling", *(["Normalize"] if embedding.normalize else [])]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    modes = {key: pooling == embedding.pooling for key, pooling in _LEGACY.items()}
    files: dict[str, Any] = {
        MODULES: listed,
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": embedding.do_lower_case},
        # The keys that all versions of sentence-transformers read.
        f"{paths[1]}/config.json": {"word_embedding_dimension": width, **modes},
    }
    for path in paths[1:]:
        (folder / path).mkdir()
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=2) + "\n")


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Class and path of each module, in order."""
    path = folder / MODULES
    listed = _read(path, list)
    found = []
    for each in listed:
        kind, inner = (each.get(key) if isinstance(each, dict) else None for key in ("type", "path"))
        if not isinstance(kind, str) or not isinstance(inner, str) or not is_inside(folder / inner, folder):
            raise NetworkError(f"{path}: not a list of modules, each with its type and a path in the folder.")
        found.append((kind.rpartition(".")[2], inner))
    return found


def _pooling_of(config: dict[str, Any], path: Path) -> str:
    stated = config.get("pooling_mode")
    if stated is None:
        stated = [pooling for key, pooling in _LEGACY.items() if config.get(key)] or "mean"
    several = stated if isinstance(stated, list) else [stated]
    if len(several) != 1 or several[0] not in POOLINGS:
        raise NetworkError(
            f"{path}: pools by {' and '.join(map(str, several))}; litdeploy takes one of {', '.join(POOLINGS)}."
        )
    return str(several[0])


def _tokens_of(folder: Path) -> int | None:
    """The longest text that the tokenizer states; newer versions of sentence-transformers state it there alone."""
    path = folder / "tokenizer_config.json"
    most = _read(path).get("model_max_length") if is_file(path) else None
    # 1e30 is how transformers writes that there is no limit.
    return most if isinstance(most, int) and 1 <= most < 2**31 else None


def _read(path: Path, kind: type = dict) -> Any:
    try:
        found = parse_json(read_small(path))
    except (OSError, ValueError) as error:
        raise NetworkError(f"{path}: cannot be read ({str(error).splitlines()[0]}). Copy the folder again.") from None
    if not isinstance(found, kind):
        raise NetworkError(f"{path}: holds a {type(found).__name__}, and a {kind.__name__} is needed.")
    return found


def _checked(values: dict[str, Any], path: Path) -> Embedding:
    try:
        return Embedding.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise NetworkError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
