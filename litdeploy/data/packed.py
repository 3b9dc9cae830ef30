"""A dataset as one safetensors file of decoded images: read with safetensors alone, without `datasets` or Pillow.

    SPLIT.images   uint8 (images, channels, height, width)
    SPLIT.labels   int64 (images), indices into the classes; left out without labels

for each SPLIT of train, validation and test that its source has; the rest is in the file's metadata, see `Header`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator
from safetensors import safe_open
from torch import Tensor

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import Noun
from litdeploy.data.split import SPLITS, OnDemand, Split
from litdeploy.data.table import Columns, row_name
from litdeploy.errors import DataError
from litdeploy.files import sha256_of
from litdeploy.storage.records import Record

SUFFIX = ".safetensors"
METADATA_KEY = "litdeploy-data"
VERSION = 1
_PACK = f"litdeploy data pack SOURCE --out FILE{SUFFIX}"

Count = Annotated[int, Field(ge=1)]
Counts = Annotated[dict[Literal["train", "validation", "test"], Count], Field(min_length=1)]


class Header(Record):
    """A packed file's metadata, as JSON under one key.

    Attributes:
        version: of this format.
        source: what it was packed from, as the user gave it.
        fingerprint: the source's.
        image_column, label_column: columns of the source that were used; no label column: packed without labels.
        classes: names, in the order of the labels; empty without labels.
        shape: (channels, height, width) of every image.
        images: split → number in this file.
        source_images: split → number in the source.
        seed: of the draw, if some images were left out.
        test_share: see `Store`.
    """

    version: int = VERSION
    source: str
    fingerprint: str
    image_column: str
    label_column: str | None = None
    classes: tuple[str, ...]
    shape: tuple[Count, Count, Count]
    images: Counts
    source_images: Counts
    seed: int | None = None
    test_share: Annotated[float, Field(gt=0, lt=1)]

    @field_validator("classes")
    @classmethod
    def _of_labels(cls, classes: tuple[str, ...], known: ValidationInfo) -> tuple[str, ...]:
        if len(classes) == 1 or bool(classes) != (known.data.get("label_column") is not None):
            raise ValueError("labels have two classes or more, and without labels there are none")
        if len(set(classes)) < len(classes):
            raise ValueError("two classes have the same name")
        return classes

    @property
    def labeled(self) -> bool:
        """Whether the images have labels."""
        return self.label_column is not None

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → (dtype as safetensors names it, shape) of each tensor of the file."""
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for split, count in self.images.items():
            expected[images_key(split)] = ("U8", (count, *self.shape))
            if self.labeled:
                expected[labels_key(split)] = ("I64", (count,))
        return expected


class _Version(BaseModel):
    version: int


def images_key(split: str) -> str:
    """Name of the tensor with a split's images."""
    return f"{split}.images"


def labels_key(split: str) -> str:
    """Name of the tensor with a split's labels."""
    return f"{split}.labels"


class PackedStore:
    """The `Store` of a packed file. Its header and labels are read and checked at once, its images on first use.

    Args:
        name: of the file, as the user gave it.

    Raises:
        DataError: truncated, not a packed dataset, of another version, or its parts do not agree.
    """

    noun: Noun = "image"
    value_bytes = 1
    tokens = None

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                self.header = _header(name, file.metadata() or {})
                _check_tensors(name, self.header, file)
                self.splits: tuple[str, ...] = tuple(split for split in SPLITS if split in self.header.images)
                self._labels: dict[str, NDArray[np.int64]] = {
                    split: file.get_tensor(labels_key(split)).numpy().copy()
                    for split in (self.splits if self.header.labeled else ())
                }
        except DataError:
            raise
        except Exception as error:  # SafetensorError, and what torch raises for a type it does not have
            raise DataError(
                f"{name}: not a whole safetensors file ({error}). Copy it again, or pack its source again: {_PACK}."
            ) from None
        _check_labels(name, self.header, self._labels)
        self.classes = self.header.classes
        self.shape = self.header.shape
        self.test_share = self.header.test_share
        self.columns = Columns(self.header.image_column, self.header.label_column)
        if not self.header.labeled:
            self._leave_labels()

    def apply(self, settings: DataSettings) -> None:
        """Check the user's settings against how the data were packed, and leave the labels unused if they say so.

        Raises:
            DataError: they ask for another size or other columns.
        """
        if settings.labels == "none":
            self._leave_labels()
        height, width = self.shape[1:]
        size = settings.image_size
        if size is not None and size != (height, width):
            raise DataError(
                f"{self.name}: was packed with images of {height} × {width} pixels (height × width). Pack its source "
                f"again in the other size: litdeploy data pack {self.header.source} --image-size {size[0]},{size[1]} "
                f"--out FILE{SUFFIX}."
            )
        if not {settings.text_column, settings.text_length, settings.tokenizer} <= {None}:
            raise DataError(
                f"{self.name}: is a file of packed images. Leave --text-column, --text-length and --tokenizer out."
            )
        if settings.attributes is not None:
            raise DataError(
                f"{self.name}: is a packed file, which holds one label an image. Give --data its source, which has a "
                f"column for each attribute: --data {self.header.source}"
            )
        for role, asked, used in (
            ("image", settings.image_column, self.columns.content),
            ("label", settings.label_column, self.columns.label),
        ):
            if asked not in (None, used):
                how = f"the {role}s of column '{used}'" if used else "no labels"
                raise DataError(
                    f"{self.name}: was packed with {how}. Pack its source again: litdeploy "
                    f"data pack {self.header.source} --{role}-column {asked} --out FILE{SUFFIX}."
                )

    def _leave_labels(self) -> None:
        self._labels = {split: np.full(count, -1, np.int64) for split, count in self.header.images.items()}
        self.columns, self.classes = Columns(self.header.image_column, None), ()

    def fingerprint(self) -> str:
        """SHA-256 of the file, as `sha256sum` prints it; the source's own is in the header."""
        return sha256_of(self._path)

    def labels(self, split: str) -> NDArray[np.int64]:
        """See `Store.labels`."""
        return self._labels[split]

    def stored(self, split: str, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """See `Store.stored`."""
        return self._images(split).index_select(0, torch.from_numpy(rows)).to(device)

    def undecodable(self, split: str, rows: NDArray[np.int64]) -> dict[int, str]:
        """See `Store.undecodable`; they are decoded already."""
        return {}

    def streamed(self, split: str, rows: NDArray[np.int64], device: torch.device, workers: int) -> Split:
        """See `Store.streamed`; from the file, which is mapped into memory, so that workers have nothing to do."""
        labels_N = torch.from_numpy(self._labels[split][rows]).to(device)
        images_MCHW = self._images(split)
        return OnDemand(lambda some: images_MCHW.index_select(0, torch.from_numpy(some)), rows, labels_N)

    def _images(self, split: str) -> Tensor:
        """uint8 (images, channels, height, width), mapped from the file."""
        with safe_open(self._path, framework="pt", device="cpu") as file:
            images_MCHW: Tensor = file.get_tensor(images_key(split))
        return images_MCHW


def _header(name: str, metadata: dict[str, str]) -> Header:
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise DataError(f"{name}: a safetensors file, and not a packed dataset (weights?). Pack one: {_PACK}.")
    try:
        version = _Version.model_validate_json(text).version
        if version != VERSION:
            raise DataError(
                f"{name}: packed in version {version} of the format; this litdeploy reads {VERSION}. Pack the source "
                f"again: {_PACK}."
            )
        return Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "JSON"
        raise DataError(
            f"{name}: the metadata are damaged ({at}: {first['msg']}). Pack the source again: {_PACK}."
        ) from None


def _check_tensors(name: str, header: Header, file: Any) -> None:
    expected = header.tensors()
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    found = {key: (str(each.get_dtype()), tuple(each.get_shape())) for key, each in slices.items()}
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise DataError(
                f"{name}: tensor '{key}' is {_described(found.get(key))}; by the file's metadata it is "
                f"{_described(expected.get(key))}. Pack the source again: {_PACK}."
            )


def _described(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if tensor is None else f"{tensor[0]} of shape {tensor[1]}"


def _check_labels(name: str, header: Header, labels: dict[str, NDArray[np.int64]]) -> None:
    for split, values in labels.items():
        wrong = np.flatnonzero((values < 0) | (values >= len(header.classes)))
        if len(wrong):
            raise DataError(
                f"{row_name(name, split, int(wrong[0]))} has the label {values[wrong[0]]}, and there "
                f"are {len(header.classes)} classes, counted from 0. Pack the source again: {_PACK}."
            )
