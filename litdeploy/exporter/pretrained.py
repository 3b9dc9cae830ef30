"""A student of transformers as a folder that `from_pretrained` loads, and `SentenceTransformer` if it embeds texts."""

from __future__ import annotations

import copy
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, forward
from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import DepthPlan, TokenInput
from litdeploy.data import prepared
from litdeploy.data.texts import Tokens
from litdeploy.errors import BundleError, ParityError, StudentError, first_line
from litdeploy.files import is_file, read_small, sync_folder, write_text
from litdeploy.networks import Network
from litdeploy.networks.embedder import EMBEDDING, SentenceEmbedder, write_modules
from litdeploy.networks.hub import class_arguments, is_hub, quiet, transformer_of
from litdeploy.networks.output import named_tensors
from litdeploy.networks.sections import whole
from litdeploy.storage.bundle import CONFIG, TOKENIZER
from litdeploy.storage.staging import staged

CARD = "README.md"
# A tag of the model card, by which a folder that litdeploy wrote is known.
TAG = "litdeploy"
# Largest difference of an output, as a share of the largest magnitude.
_TOLERANCE = 1e-5
# What litdeploy writes into the folder, besides what a tokenizer is saved in.
_WRITTEN = (CARD, "*.json", "*.txt", "*.model", "*.jinja", "*.bpe", "*.tiktoken", "model*.safetensors")
_FOLDERS = ("1_Pooling", "2_Normalize")
# Short and long ones, and one that is cut.
_SENTENCES = (
    "A short sentence.",
    "The Teacher knows, and the student LEARNS: layer by layer, on what the teacher's own layers compute.",
    "Words. " * 400,
)
# Names of a stack's depth in configurations, and of lists with an entry a stage.
_DEPTHS = ("num_hidden_layers", "encoder_layers", "num_layers", "n_layers", "n_layer", "depth")
_STAGES = "depths"


def write_pretrained(student: Network, carried: Path | None, folder: Path, card: str, overwrite: bool) -> None:
    """Write the folder, whole or not at all, and check that what transformers loads from it is the student.

    Args:
        student: of transformers.
        carried: the folder of its tokenizer and the other files that are copied; None: there are none.
        folder: made, or replaced if litdeploy wrote it and `overwrite`.
        card: the model card.

    Raises:
        StudentError: it is no network of transformers, or its configuration cannot express the kept blocks.
        BundleError: the folder holds something that is not to be replaced, or cannot be written.
        ParityError: what is loaded from the folder computes something else.
    """
    if not is_hub(student.spec.name):
        raise StudentError(
            f"{student.source}: a network of {student.spec.name}, and --transformers writes networks of transformers "
            "(hf:FOLDER). Export another form: litdeploy export --onnx"
        )
    _check_place(folder, overwrite)
    rebuilt = shortened(student)
    with staged(folder) as place:
        place.mkdir()
        if getattr(rebuilt.config, "use_cache", None) is False:
            rebuilt.config.use_cache = True  # it was off for the sections' sake; generation is slow without
        with quiet():
            rebuilt.save_pretrained(place)
        for path in sorted(carried.iterdir()) if carried is not None else ():
            if path.name not in (CONFIG, EMBEDDING):
                shutil.copyfile(path, place / path.name)
        if isinstance(student.module, SentenceEmbedder):
            width = forward(student.module, student.example(1)).shape[-1]
            write_modules(student.module.embedding, width, student.spec.input.shape[0], place)
        write_text(place / CARD, card)
        _settle(place)
        _compare(student, place, folder)
        if folder.exists():
            folder.rename(place.with_name("replaced"))  # removed with the temporary folder
        place.rename(folder)
        sync_folder(folder.parent)


def _settle(place: Path) -> None:
    """Bring the files to the disk, readable for whom the card is: safetensors' are for their owner alone."""
    mode = (place / CARD).stat().st_mode
    for path in place.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _check_place(folder: Path, overwrite: bool) -> None:
    """Check that the folder is absent or empty, or that litdeploy wrote all of it and it may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder}: is a file; --transformers names a folder.")
    held = sorted(folder.iterdir()) if folder.is_dir() else []
    if not held:
        return
    tagged = is_file(folder / CARD) and f"\n- {TAG}\n".encode() in read_small(folder / CARD)
    foreign = [
        path.name
        for path in held
        if not (path.name in _FOLDERS if path.is_dir() else any(path.match(pattern) for pattern in _WRITTEN))
    ]
    if folder.is_symlink() or not tagged or foreign:
        shown = ", ".join((foreign or [path.name for path in held])[:3])
        raise BundleError(
            f"{folder}: holds files that litdeploy did not write ({shown}); "
            "they are kept. Name another folder: --transformers DIR"
        )
    if not overwrite:
        raise BundleError(
            f"{folder}: holds an earlier student; it is kept. Name another folder, or replace it: --overwrite"
        )


def shortened(student: Network) -> Any:
    """The student's transformers module, built anew by a configuration of its own depth.

    Raises:
        StudentError: no configuration builds it; names blocks with which one does.
    """
    module = transformer_of(student.module)
    config = copy.deepcopy(module.config)
    inside = "transformer." if isinstance(student.module, SentenceEmbedder) else ""
    plan = {name.removeprefix(inside): kept for name, kept in (student.spec.plan or {}).items()}
    bare = class_arguments(module)
    with torch.device("meta"):
        teacher = type(module)(config, **bare)
    blocks = {name: len(whole(teacher, name).paths) for name in plan}
    cut = {name: kept for name, kept in plan.items() if len(kept) < blocks[name]}
    try:
        for name, kept in cut.items():
            _shorten(config, name, blocks[name], kept)
        rebuilt = type(module)(config, **bare).eval()
        rebuilt.load_state_dict(module.state_dict())
        _check_alike(student, rebuilt)
    except (_Inexpressible, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise StudentError(_refusal(type(module).__name__, cut, first_line(error))) from None
    return rebuilt


class _Inexpressible(Exception):
    """A configuration has no such network."""


def _shorten(config: Any, name: str, blocks: int, kept: tuple[int, ...]) -> None:
    """Give a configuration the depth of one container, and its lists with an entry a block those of the kept blocks."""
    stages = getattr(config, _STAGES, None)
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if numbers and isinstance(stages, list | tuple) and numbers[-1] < len(stages) and stages[numbers[-1]] == blocks:
        setattr(config, _STAGES, [len(kept) if at == numbers[-1] else depth for at, depth in enumerate(stages)])
        return
    depth = next((key for key in _DEPTHS if getattr(config, key, None) == blocks), None)
    if depth is None:
        raise _Inexpressible(f"it states no depth of {blocks} for {name}")
    lists = {
        key: [value[index] for index in kept]
        for key, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == blocks and re.search(r"layer|block|types", key)
    }
    setattr(config, depth, len(kept))
    for key, value in lists.items():
        setattr(config, key, value)


def _check_alike(student: Network, rebuilt: nn.Module) -> None:
    """Check that a module computes what the student does: blocks may differ in what is no weight, as in attention."""
    apart = _apart(student.module, _around(student, rebuilt), student.example())
    if not apart <= _TOLERANCE:
        raise _Inexpressible(f"its blocks compute something else, by {apart:.2g} of the output's scale")


def _around(student: Network, transformer: nn.Module) -> nn.Module:
    """A network like the student, of another transformers module."""
    if not isinstance(student.module, SentenceEmbedder):
        return transformer
    assert isinstance(student.spec.input, TokenInput)
    return SentenceEmbedder(transformer, student.module.embedding, student.spec.input)


@torch.no_grad()
def _apart(first: nn.Module, second: nn.Module, batch: Batch) -> float:
    """The largest difference of two networks' outputs, as a share of the first one's largest magnitude."""
    ours, theirs = (named_tensors(forward(module.eval(), batch)) for module in (first, second))
    return max(_difference(tensor, theirs[name]) for name, tensor in ours.items())


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-9))


def _refusal(kind: str, cut: DepthPlan, why: str) -> str:
    """The message for blocks that no configuration has; the first ones of a container are those that one has."""
    kept = "; ".join(f"{', '.join(map(str, indices)) or 'none'} of {name}" for name, indices in cut.items())
    first = "; ".join(f"{', '.join(map(str, range(max(1, len(indices)))))} of {name}" for name, indices in cut.items())
    return (
        f"--transformers: no configuration of {kind} has the blocks that the student keeps ({kept}): {why}. It has the "
        f"first ones ({first}), each of the kind that the configuration states for its place. Export another form: "
        "litdeploy export --onnx"
    )


def _compare(student: Network, place: Path, folder: Path) -> None:
    """Load the folder as anyone would, and compare outputs.

    Args:
        place: where the folder is being written.
        folder: its name, for messages.
    """
    module = transformer_of(student.module)
    with quiet():
        loaded, info = type(module).from_pretrained(place, local_files_only=True, output_loading_info=True)
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    apart = _apart(student.module, _around(student, loaded), student.example())
    if missing or not apart <= _TOLERANCE:
        raise ParityError(
            f"{folder}: what from_pretrained loads computes something else than the student, by {apart:.2g} of the "
            f"output's scale ({_TOLERANCE:g} is allowed)"
            + (f", and lacks weights: {', '.join(missing[:4])}" if missing else "")
            + ". Nothing was written. transformers may have changed since the student was trained."
        )
    if (
        isinstance(student.module, SentenceEmbedder)
        and is_file(place / TOKENIZER)
        and find_spec("sentence_transformers")
    ):
        _compare_sentences(student, place, folder)


def _compare_sentences(student: Network, place: Path, folder: Path) -> None:
    """Compare the embeddings of sentences with those of sentence-transformers, its tokenizer included."""
    from sentence_transformers import SentenceTransformer

    tokens = Tokens(DataSettings(tokenizer=str(place), text_length=student.spec.input.shape[0]), student.spec)
    with quiet(), torch.no_grad():
        theirs = SentenceTransformer(str(place), device="cpu", local_files_only=True)
        found = theirs.encode(list(_SENTENCES), convert_to_tensor=True, prompt="", show_progress_bar=False)
        ours = forward(student.module, prepared(torch.from_numpy(tokens(_SENTENCES)), student.spec.input))
    apart = _difference(ours, found.to(ours.device))
    if not apart <= _TOLERANCE:
        raise ParityError(
            f"{folder}: SentenceTransformer gives other embeddings than the student, by {apart:.2g} of their scale "
            f"({_TOLERANCE:g} is allowed). Nothing was written. Is the tokenizer the student's own?"
        )
