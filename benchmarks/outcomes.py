"""What a run left in its folder: whether it is whole, and what must not depend on how often the run was stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def outcome(out: Path) -> dict[str, Any]:
    """What must not depend on how often a run was stopped."""
    from litdeploy.storage.bundle import Bundle
    from litdeploy.storage.checkpoint import read_checkpoint

    manifest = Bundle(out).read_complete()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = {"seconds", "images_per_second"}
    return {
        # Not the file's hash: safetensors writes the header's two keys in any order.
        "weights": _digest(read_checkpoint(out / "student.safetensors").weights),
        "accuracies": manifest.model_dump()["metrics"],
        "metrics": [{key: value for key, value in row.items() if key not in timed} for row in rows],
    }


def _digest(weights: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def exported(out: Path) -> dict[str, Any]:
    """The exported files and their hashes, each checked against the manifest."""
    from litdeploy.storage.bundle import Bundle

    bundle = Bundle(out)
    artefacts = bundle.read_complete().artefacts
    for artefact in artefacts.values():
        bundle.artefact_path(artefact)
    return {kind: artefact.sha256 for kind, artefact in artefacts.items()}


def torn(out: Path) -> list[str]:
    """Which files under final names are not what they say that they are, and whether the lock is held."""
    from litdeploy.errors import LitdeployError
    from litdeploy.files import sha256_of
    from litdeploy.storage.bundle import Bundle
    from litdeploy.storage.checkpoint import read_checkpoint
    from litdeploy.storage.records import Artefact

    bundle, found = Bundle(out), []
    try:
        if bundle.manifest_path.exists():
            for artefact in bundle.read().artefacts.values():
                bundle.artefact_path(artefact)
        if bundle.student_path.exists():
            read_checkpoint(bundle.student_path)
        if bundle.metrics_path.exists():
            for line in bundle.metrics_path.read_text().splitlines():
                json.loads(line)
        for path in bundle.checkpoints_path.glob("[!.]*"):
            if sha256_of(path) not in path.name:
                found.append(f"{path.name} is torn")
        for path in bundle.export_path.glob("[!.]*.json"):
            Artefact.model_validate_json(path.read_bytes())
        if out.is_dir():
            with bundle.lock():
                pass
    except (LitdeployError, ValueError) as error:
        found.append(str(error))
    return found
