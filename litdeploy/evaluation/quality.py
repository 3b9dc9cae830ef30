"""The verb `evaluate_quality`: FID and Inception score of a network that makes images."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from litdeploy.config.recipe import DataSettings
from litdeploy.data import check_against, normalised_batches, open_data
from litdeploy.errors import DataError, SettingsError
from litdeploy.evaluation.evaluate import open_file, teacher_of, what_on
from litdeploy.evaluation.features import Judge, Quality, open_features
from litdeploy.files import is_folder
from litdeploy.networks import NetworkName
from litdeploy.networks.batch import tensors_of
from litdeploy.runtime import open_runner, resolve_device
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Record
from litdeploy.tasks import task_of


class Judged(Record):
    """The images of a network, and its teacher's, beside the real ones of one split.

    Attributes:
        judge: by whose features: a file, or `inception`.
        features: how many numbers it gives an image.
        images: of the split; as many are made, each in another domain than its own.
        student: of the network that was named.
        teacher: None where none was named.
        notes: what to know of the figures.
    """

    judge: str
    features: int
    images: int
    student: Quality
    teacher: Quality | None
    notes: tuple[str, ...]


def evaluate_quality(
    path: str | Path,
    *,
    features: str,
    data: DataSettings | dict[str, Any] | str | None = None,
    split: str = "test",
    batch_size: int = 256,
    precision: str = "fp32",
    device: str = "auto",
    seed: int | None = None,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    teacher: str | Path | None = None,
) -> Judged:
    """Judges the images of a split as a network translates them to other domains, the same as `evaluate` compares.

    Args:
        path: weights, an exported file, or a bundle, whose student is taken.
        features: see `runtime.quality.open_features`.
        teacher: weights; of a bundle None is the one that its student was made from, of a file: none is judged.
        others: as for `evaluate`.

    Raises:
        LitdeployError: one of its kinds.
    """
    path = Path(path)
    judges = [Judge()]
    bundle = Bundle(path) if is_folder(path) else None
    path, settings, seed = what_on(path, data, seed, split)
    where = resolve_device(device)
    runner, spec, domains = open_file(path, where, precision, network, normalise, input_shape)
    images = spec.input.images
    if task_of(spec).output != "images" or images is None:
        raise SettingsError(f"--quality {features}: judges made images, and {path} makes none. Leave it out.")
    with ExitStack() as opened:
        of = opened.enter_context(open_features(features, images, where))
        given = open_data(settings, where, seed)
        check_against(given, spec, domains)
        runners = [opened.enter_context(runner)]
        if bundle is not None or teacher is not None:
            reference = teacher_of(path, spec, bundle, teacher, network)
            runners.append(opened.enter_context(open_runner("eager", network=reference, device=where)))
            judges.append(Judge())
        count = size = 0
        for batch, _ in normalised_batches(getattr(given, split), spec.input, batch_size):
            real_NE, _ = of(tensors_of(batch)[0])
            for judge, each in zip(judges, runners, strict=True):
                judge.real(real_NE)
                judge.made(*of(each.run(batch)))
            count, size = count + len(real_NE), real_NE.shape[1]
    if count < 2:
        raise DataError(
            f"--quality {features}: FID needs two images or more, and the {split} split has {count}. Give --data a "
            "dataset with such a split."
        )
    found = [judge.found() for judge in judges]
    return Judged(
        judge=features,
        features=size,
        images=count,
        student=found[0],
        teacher=found[1] if len(found) > 1 else None,
        notes=_notes(count, size),
    )


def _notes(images: int, features: int) -> tuple[str, ...]:
    if images > features:
        return ()
    return (
        f"FID of {images} images by {features} features: their covariance is singular, and the figure is higher than "
        f"it would be of many images. Take {features + 1} or more, and hold it against figures of as many only.",
    )
