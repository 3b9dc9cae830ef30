"""Identity: what must be equal for a run to be resumed, and in what two runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import DepthPlan, NetworkSpec
from litdeploy.data import Data
from litdeploy.networks import Network
from litdeploy.storage.records import Ancestor, TeacherRecord
from litdeploy.trainer.distributed import Ranks

# Paths and loader settings change no image: the fingerprint identifies the data, as the hash does the discriminator.
_OF_NO_EFFECT: dict[str, Any] = {"data": {"source", "workers", "resident", "tokenizer"}, "discriminator": True}


def identity_of(
    teacher: Network,
    record: TeacherRecord | None,
    plan: DepthPlan | None,
    recipe: Recipe,
    data: Data,
    precision: str,
    device: torch.device,
    ranks: Ranks,
    lineage: Sequence[Ancestor] = (),
    discriminator: str | None = None,
) -> dict[str, Any]:
    """What must be equal for a run of `compress` to be resumed. Plain JSON.

    Args:
        teacher, record: the first of a chain.
        lineage: of a chain, from that teacher to the student that teaches this one.
        discriminator: SHA-256 of its file; None if there is none.
    """
    return {
        **({"lineage": [each.sha256 for each in lineage]} if lineage else {}),
        "teacher": digest_of(teacher) if record is None else record.sha256,
        "network": teacher.spec.model_dump(mode="json"),
        "plan": None if plan is None else {name: list(kept) for name, kept in plan.items()},
        "discriminator": discriminator,
        **common_identity(recipe, data, precision, device, ranks),
    }


def identity_of_new(
    spec: NetworkSpec, recipe: Recipe, data: Data, precision: str, device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    """What must be equal for a run of `train` to be resumed."""
    return {"network": spec.model_dump(mode="json"), **common_identity(recipe, data, precision, device, ranks)}


def common_identity(recipe: Recipe, data: Data, precision: str, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """What must be equal for any run to be resumed."""
    record = data.record()
    return {
        "recipe": recipe_identity(recipe),
        "data": record.fingerprint,
        **({} if record.tokenizer is None else {"tokenizer": record.tokenizer}),
        "precision": precision,
        "device": device.type,
        "processes": ranks.size,
    }


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that decides what a run trains."""
    return recipe.model_dump(mode="json", exclude=_OF_NO_EFFECT)


def completed(identity: Any) -> Any:
    """The identity with the defaults of recipe fields that are newer than it."""
    try:
        recipe = Recipe.model_validate_json(json.dumps(identity["recipe"]))
    except (KeyError, TypeError, ValueError):
        return identity
    return {**identity, "recipe": recipe_identity(recipe)}


def differences(theirs: Any, ours: Any, at: str = "") -> list[str]:
    """The keys in which two JSON values differ, a line each."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted({*theirs, *ours})
        return [line for key in keys for line in differences(theirs.get(key), ours.get(key), f"{at}.{key}".lstrip("."))]
    return [] if theirs == ours else [f"{at}: {_short(theirs)} there, {_short(ours)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def digest_of(network: Network) -> str:
    """SHA-256 of a network's weights in memory. A file's SHA-256 covers its header too."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
