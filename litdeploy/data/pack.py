"""The verb `pack`: a dataset in one file, decoded once, with its classes and labels if it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file

from litdeploy.config.recipe import DataSettings
from litdeploy.config.settings import parse
from litdeploy.data.data import Store, open_store
from litdeploy.data.packed import METADATA_KEY, SUFFIX, Header, images_key, labels_key
from litdeploy.data.split import free_memory
from litdeploy.errors import DataError
from litdeploy.files import sha256_of, write_whole
from litdeploy.storage.records import Record

_CPU = torch.device("cpu")


class Packing(Record):
    """A packed file: its path, SHA-256, size and header."""

    path: str
    sha256: str
    bytes: int
    header: Header


def pack(
    data: DataSettings | dict[str, Any] | str | Path,
    out: str | Path,
    *,
    limit: int | None = None,
    train_images: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Packing:
    """Write a dataset as one safetensors file, which every verb takes as `data`, with the same batches.

    Images keep their order, so that training on the file is training on its source, image for image. If some are left
    out, the same number of each class is kept, as far as there are enough, drawn by the seed; a smaller draw is part of
    a larger one. Validation and test images are then held out of the training images that are kept.

    Args:
        data: the source, or settings with its columns and image size.
        out: the file, `.safetensors`.
        limit: most images of each split.
        train_images: most training images; overrides `limit`.
        seed: of the draw.
        overwrite: replace an existing file.

    Raises:
        DataError: the source cannot be read or decoded, `out` exists or cannot be written, fewer images than classes
            are requested, or they do not fit in memory.
    """
    path = Path(out)
    _check_out(path, overwrite)
    settings = _settings(data)
    store = open_store(settings)
    if len(store.shape) != 3:
        raise DataError(f"{store.name}: holds texts, and images are packed. Give --data {store.name} itself.")
    if store.columns.attributes:
        raise DataError(f"{store.name}: a packed file holds one label an image, and no attributes. Leave them out.")
    most: dict[str, int | None] = dict.fromkeys(store.splits, limit)
    if train_images is not None:
        if "train" not in store.splits:
            raise DataError(f"{store.name}: has no training images. Leave --train-images out, or use --limit.")
        most["train"] = train_images
    rows = {split: _kept(store, split, count, seed) for split, count in most.items()}
    if settings.skip_bad:
        rows = _without_bad(store, rows, settings.skip_bad)
    header = _header(store, rows, most, seed)
    _check_memory(header)
    tensors = {}
    for split, kept in rows.items():
        images = store.stored(split, kept, _CPU)
        assert isinstance(images, torch.Tensor)
        tensors[images_key(split)] = images
        if header.labeled:
            tensors[labels_key(split)] = torch.from_numpy(store.labels(split)[kept])
    try:
        with write_whole(path) as temporary:
            save_file(tensors, temporary, {METADATA_KEY: header.model_dump_json()})
    except (OSError, SafetensorError) as error:
        raise DataError(f"--out {path}: cannot be written ({error}).") from None
    return Packing(path=str(path), sha256=sha256_of(path), bytes=path.stat().st_size, header=header)


def _check_out(path: Path, overwrite: bool) -> None:
    if path.suffix != SUFFIX:
        raise DataError(f"--out {path}: a packed dataset is written as {SUFFIX}; end the name like that.")
    if path.is_dir():
        raise DataError(f"--out {path}: is a folder; name a file.")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: is there already; it is kept. Choose another --out, or --overwrite it.")


def _settings(data: DataSettings | dict[str, Any] | str | Path) -> DataSettings:
    if isinstance(data, DataSettings):
        return data
    if isinstance(data, dict):
        return parse(DataSettings, data, "command line")
    return DataSettings(source=str(data))


def _kept(store: Store, split: str, most: int | None, seed: int) -> NDArray[np.int64]:
    """Rows of a split to pack, in their order."""
    labels = store.labels(split)
    if most is None or most >= len(labels):
        return np.arange(len(labels))
    if most < len(store.classes):
        raise DataError(
            f"{store.name}: {most} images of split '{split}' are fewer than its {len(store.classes)} classes. Ask for "
            "more with --limit or --train-images."
        )
    # RandomState, since NumPy keeps its sequence the same in every version.
    drawn = np.random.RandomState(seed % 2**32).permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = drawn[labels[drawn] == label]
        turn[members] = np.arange(len(members))
    # First each class's first image, then each one's second, and so on; the stable sort keeps the order of the draw.
    return np.sort(drawn[np.argsort(turn[drawn], kind="stable")][:most])


def _without_bad(store: Store, rows: dict[str, NDArray[np.int64]], most: int) -> dict[str, NDArray[np.int64]]:
    """The rows whose images can be decoded.

    Raises:
        DataError: there are more than `most` others, or only others in a split.
    """
    bad = {split: store.undecodable(split, kept) for split, kept in rows.items()}
    faults = [why for found in bad.values() for why in found.values()]
    good = {split: kept[~np.isin(kept, list(bad[split]))] for split, kept in rows.items()}
    if len(faults) > most or not all(map(len, good.values())):
        raise DataError(
            f"{store.name}: {len(faults)} images cannot be decoded (--skip-bad {most}), or none of a split can:\n  "
            + "\n  ".join(faults[:3])
        )
    return good


def _header(store: Store, rows: dict[str, NDArray[np.int64]], most: dict[str, int | None], seed: int) -> Header:
    """The header of a file with these rows; it has the seed if images were drawn."""
    whole = {split: len(store.labels(split)) for split in rows}
    return Header.model_validate(
        {
            "source": store.name,
            "fingerprint": store.fingerprint(),
            "image_column": store.columns.content,
            "label_column": store.columns.label,
            "classes": store.classes,
            "shape": store.shape,
            "images": {split: len(kept) for split, kept in rows.items()},
            "source_images": whole,
            "seed": None if all(count is None or count >= whole[split] for split, count in most.items()) else seed,
            "test_share": store.test_share,
        }
    )


def _check_memory(header: Header) -> None:
    needed, free = sum(header.images.values()) * int(np.prod(header.shape)), free_memory(_CPU)
    if needed > free:
        raise DataError(
            f"{header.source}: its decoded images take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are "
            "free. Pack fewer (--limit, --train-images) or smaller ones (--image-size)."
        )
