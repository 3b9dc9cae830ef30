"""Whether a run that is to be gone on with is this one, and what there is to go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import DepthPlan, NetworkSpec
from litdeploy.data import Data
from litdeploy.errors import BundleError
from litdeploy.networks import Network
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Ancestor, TeacherRecord
from litdeploy.trainer.checkpoints import Checkpoints, Saved, differences
from litdeploy.trainer.parallel import Ranks

# Where the data lie and who reads them changes no image: the fingerprint tells whether they are the same. As little
# changes where the discriminator lies: its hash tells.
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
    """What must be the same for a run of `compress` to be gone on with. Plain JSON.

    Args:
        teacher, record: of a chain, those that it began with.
        lineage: of a chain, from that teacher to the student that teaches this one.
        discriminator: SHA-256 of its file; None where there is none.
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
    """The same of a run of `train`."""
    return {"network": spec.model_dump(mode="json"), **common_identity(recipe, data, precision, device, ranks)}


def common_identity(recipe: Recipe, data: Data, precision: str, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """What any run must have in common with the one that it goes on with."""
    record = data.record()
    return {
        "recipe": recipe.model_dump(mode="json", exclude=_OF_NO_EFFECT),
        "data": record.fingerprint,
        **({} if record.tokenizer is None else {"tokenizer": record.tokenizer}),
        "precision": precision,
        "device": device.type,
        "processes": ranks.size,
    }


def going_on(
    bundle: Bundle, checkpoints: Checkpoints, identity: dict[str, Any], note: Callable[[str], None]
) -> tuple[bool, Saved | None]:
    """Makes a bundle ready to go on with the run that it holds.

    Returns:
        Whether that run is complete; and what it goes on from: None where it begins anew.

    Raises:
        BundleError: it holds another run, or none that can be gone on with.
    """
    if not bundle.exists():
        return False, None
    bundle.tidy()
    checkpoints.tidy()
    if bundle.manifest_path.is_file():
        manifest = bundle.read()
        if manifest.status == "complete":
            theirs: dict[str, Any] = {
                "recipe": manifest.recipe.model_dump(mode="json", exclude=_OF_NO_EFFECT),
                "data": manifest.data.fingerprint,
                "network": manifest.teacher.spec.model_dump(mode="json"),
                "discriminator": manifest.discriminator_sha256,
            }
            if manifest.data.tokenizer is not None or "tokenizer" in identity:
                theirs["tokenizer"] = manifest.data.tokenizer
            if "lineage" in identity:
                theirs["lineage"] = [each.sha256 for each in manifest.lineage]
            differing = differences(theirs, {key: identity.get(key) for key in theirs})
            if differing:
                raise BundleError(
                    f"{bundle.path}: holds another run, complete; it is kept:\n  "
                    + "\n  ".join(differing)
                    + "\nChoose another folder with --out, or --overwrite it."
                )
            note(f"{bundle.path}: the student is trained already")
            checkpoints.clear()
            return True, None
    saved = checkpoints.newest()
    if saved is None:
        if bundle.manifest_path.is_file() and bundle.read().run.epochs:
            raise BundleError(
                f"{bundle.path}: its training was interrupted, and there are no checkpoints to go on from. Begin anew: "
                "the same command with --overwrite."
            )
        note(f"{bundle.path}: no checkpoint was written yet; the run begins anew")
        bundle.claim(overwrite=True, keep=bundle.chain_path.name)
        return False, None
    position = saved.facts.get("position", {})
    note(f"{bundle.path}: going on after {position.get('epochs_done')} epochs and {position.get('step')} steps")
    return False, saved


def digest_of(network: Network) -> str:
    """SHA-256 of a network in memory: of the weights alone, where that of a file is of its header too."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
