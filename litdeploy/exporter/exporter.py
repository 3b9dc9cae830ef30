"""The verb `export`: from a bundle to a verified artefact in it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from litdeploy.bundle import Artefact, Bundle, Manifest, remove, sha256_of, write_whole
from litdeploy.data import check_against, normalise, open_data
from litdeploy.errors import DataError, ParityError, SettingsError
from litdeploy.exporter.onnx import export_onnx
from litdeploy.exporter.verify import Parity, verify
from litdeploy.networks import Network, NetworkName, load
from litdeploy.recipe import DataSettings
from litdeploy.runtime import open_runner, resolve_device, resolve_target
from litdeploy.target import Target

_BATCH_SIZES = (1, 8)
_LEAST_IMAGES = 64


def export(
    bundle: Bundle | str | Path = "deploy",
    *,
    onnx: bool = True,
    target: Target | str | None = None,
    data: DataSettings | str | None = None,
    network: NetworkName | None = None,
) -> Manifest:
    """Exports a bundle's student to `export/student.onnx`, once it computes on test images what PyTorch computes.

    Beyond the target's tolerance the file is kept as `student.onnx.rejected`, and an artefact of before stays.

    Args:
        bundle: a bundle, or its folder.
        onnx: whether to write ONNX, the one form that there is.
        target: where the student will run, or that target's name or path; None: `cuda` where CUDA is, else `cpu`.
        data: the dataset, or its source, whose test images are compared; None: the one that the student learned on.
        network: needed where the student's network is code of the user's.

    Returns:
        The manifest, with the artefact under `onnx`.

    Raises:
        BundleError: no whole bundle.
        NetworkError: the network cannot be exported, or is the user's code and was not named.
        SettingsError: no such target, an operator set that cannot be had, or nothing to export.
        DeviceError, RunnerError: the target's device is not there, or onnxruntime does not run on it.
        DataError: the images are not to be had, or are none for this network.
        ParityError: the artefact is further from PyTorch than the target's tolerance allows (exit code 3).
    """
    if not onnx:
        raise SettingsError("nothing to export: ONNX is the one form that there is. Leave onnx=False out.")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    manifest = bundle.read_complete()
    chosen = resolve_target(target)
    device = resolve_device(chosen.device)
    student = load(bundle.student_path, network=network)
    batch_sizes = sorted({*_BATCH_SIZES, max(chosen.batch_sizes)})
    images_NCHW = _images(manifest, data, student, device, max(batch_sizes))

    path = bundle.export_path / "student.onnx"
    with write_whole(path) as candidate:
        details = export_onnx(student, candidate, chosen.opset)
        parity = _parity(student, candidate, device, images_NCHW, batch_sizes, chosen)
        artefact = Artefact(
            path=path.relative_to(bundle.path).as_posix(),
            sha256=sha256_of(candidate),
            precision="fp32",
            versions=_versions(),
            details={**details, "parity": parity.model_dump(mode="json")},
        )
        if not parity.within:
            raise _rejected(path, candidate, artefact, parity)
    _write_sidecar(path, artefact)
    for leftover in _rejects(path):
        remove(leftover)
    return bundle.add_artefact("onnx", artefact)


def _images(
    manifest: Manifest, data: DataSettings | str | None, student: Network, device: torch.device, largest: int
) -> Tensor:
    """The first test images, normalised: (N, C, H, W), as many as the largest batch and at least a few dozen."""
    if data is None:
        settings = manifest.recipe.data
    else:
        settings = DataSettings(source=data) if isinstance(data, str) else data
    opened = open_data(settings, device, manifest.recipe.seed)
    check_against(opened, student.spec, student.class_count())
    for images_NCHW, _ in opened.test.batches(max(largest, _LEAST_IMAGES)):
        return normalise(images_NCHW, student.spec.input)
    raise DataError(f"{settings.source}: its test split is empty; give --data a dataset with test images.")


def _parity(
    student: Network,
    onnx_path: Path,
    device: torch.device,
    images_NCHW: Tensor,
    batch_sizes: list[int],
    target: Target,
) -> Parity:
    with (
        open_runner("eager", network=student, device=device) as reference,
        open_runner("onnxruntime", onnx_path=onnx_path, device=device) as candidate,
    ):
        return verify(reference, candidate, images_NCHW, batch_sizes, target.tolerance)


def _rejected(path: Path, candidate: Path, artefact: Artefact, parity: Parity) -> ParityError:
    """Keeps the file that failed, under a name that nothing takes for an artefact, and gives the error."""
    kept, _ = _rejects(path)
    candidate.replace(kept)
    _write_sidecar(kept, artefact.model_copy(update={"path": f"{path.parent.name}/{kept.name}"}))
    return ParityError(
        f"{path.name} does not compute what the student computes:\n{parity.told()}\n"
        f"The file is kept as {kept}. Find out which layer differs, or, where the difference does not matter to you, "
        "raise `tolerance` in a target of your own: litdeploy export --target my-target.yaml"
    )


def _rejects(path: Path) -> tuple[Path, Path]:
    """Where a rejected file is kept, and its sidecar."""
    kept = path.with_name(f"{path.name}.rejected")
    return kept, _sidecar(kept)


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _write_sidecar(path: Path, artefact: Artefact) -> None:
    with write_whole(_sidecar(path)) as temporary:
        temporary.write_text(artefact.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import onnxscript

    libraries = {"torch": torch, "onnx": onnx, "onnxruntime": onnxruntime, "onnxscript": onnxscript}
    return {name: str(library.__version__) for name, library in libraries.items()}
