"""A dataset held against the network that shall take it."""

from __future__ import annotations

from litdeploy.config.spec import CharacterInput, NetworkSpec, TokenInput
from litdeploy.data.data import Data
from litdeploy.errors import DataError
from litdeploy.tasks import task_of


def check_against(data: Data, spec: NetworkSpec, classes: int) -> None:
    """Holds a dataset against the network that shall take it.

    Args:
        classes: how many the network tells apart.

    Raises:
        DataError: another number or order of classes, other channels, another image size, or another kind of input.
    """
    task = task_of(spec)
    task.check_classes(data.source, data.classes, data.has_attributes, spec, classes)
    if spec.classes != data.classes and sorted(spec.classes) == sorted(data.classes):
        raise DataError(
            f"{data.source} has the network's classes in another order: {', '.join(data.classes[:5])}, … and not "
            f"{', '.join(spec.classes[:5])}, …. "
            + (
                f"Name them in the network's order: --attributes {','.join(spec.classes)}"
                if data.has_attributes
                else f"Label the {data.noun}s by number, in the network's order."
            )
        )
    if len(data.shape) == 1:
        _check_texts(data, spec)
        return
    image = spec.input.images
    if image is None:
        raise DataError(
            f"{data.source} has images, and {spec.name} takes texts ({spec.input.summary()}). Give --data texts: a "
            "Parquet or CSV file with a text and a label column (--text-column, --label-column)."
        )
    channels, height, width = data.shape
    wanted_channels, *wanted_size = image.shape
    if channels != wanted_channels:
        raise DataError(
            f"{data.source} has images of {_channels(channels)}, and {spec.name} takes {_channels(wanted_channels)}. "
            "Save the images so, or give --data another dataset."
        )
    if [height, width] != wanted_size:
        raise DataError(
            f"{data.source} has images of {height} × {width} pixels (height × width), and {spec.name} takes "
            f"{wanted_size[0]} × {wanted_size[1]}. Resize them: --image-size {wanted_size[0]},{wanted_size[1]}"
            + (f", or say that it takes these: --input-shape {channels},{height},{width}." if task.any_size else ".")
        )


def _check_texts(data: Data, spec: NetworkSpec) -> None:
    wanted = spec.input
    if wanted.images is not None:
        raise DataError(
            f"{data.source} has texts, and {spec.name} takes images. Give --data images, or name their column: "
            "--image-column image."
        )
    if isinstance(wanted, TokenInput):
        # Of what makes tokens, all has been held against the network as it was opened.
        assert data.tokens is not None, "opened without the network's spec"
        return
    assert isinstance(wanted, CharacterInput)
    if data.shape != wanted.shape:
        raise DataError(
            f"{data.source}: its texts are cut to {data.shape[0]} characters, and {spec.name} takes {wanted.length}. "
            f"Say so: --text-length {wanted.length}."
        )


def _channels(count: int) -> str:
    return "1 channel (grey)" if count == 1 else f"{count} channels" + (" (RGB)" if count == 3 else "")
