"""A dataset with its three splits, each loaded on first use; and whether it fits a network."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from litdeploy.batch import Batch
from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import MOST_VALUES, CharacterInput, NetworkSpec, Noun, TensorInput, TokenInput
from litdeploy.data import sources
from litdeploy.data.objects import ObjectStore
from litdeploy.data.packed import PackedStore
from litdeploy.data.split import SPLITS, Resident, Split, free_memory
from litdeploy.data.table import Columns, holds_texts
from litdeploy.data.texts import Characters, Encoder, TextStore, Tokens
from litdeploy.errors import DataError
from litdeploy.storage.records import DataRecord
from litdeploy.tasks import task_of

# Fixed: every run is tested on the same images, whatever its seed.
_TEST_SEED = 0


class Store(Protocol):
    """Where a dataset's images or texts are stored: in tables and folders, or packed in one file.

    Attributes:
        name: of the source, as the user gave it.
        noun: what it holds.
        splits: those of train, validation and test that the source itself has.
        classes: names, in the order of the labels; empty without labels.
        columns: of images or texts, and of labels.
        test_share: share of the training images that is held out if there is neither a test nor a validation split.
        value_bytes: size of a stored value.
    """

    name: str
    noun: Noun
    splits: tuple[str, ...]
    classes: tuple[str, ...]
    columns: Columns
    test_share: float
    value_bytes: int

    @property
    def tokens(self) -> Tokens | None:
        """The tokenizer; None for texts read as characters, and for images."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of every image, or (characters,) or (tokens,) of every text.

        Raises:
            DataError: the first image cannot be decoded.
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the contents."""
        ...

    def labels(self, split: str) -> NDArray[np.int64]:
        """One index into the classes for each row; of attributes 0 or 1 for each (rows, attributes); −1 without labels.

        Raises:
            DataError: the split cannot be read, or a label is missing or not one of the classes.
        """
        ...

    def stored(self, split: str, rows: NDArray[np.int64], device: torch.device) -> Batch:
        """What is stored of these rows: (rows, *shape), uint8 (tokens: int16 or int32), on the device; the caller's own
        copy. See `prepared`.

        Raises:
            DataError: an image cannot be decoded, or a text cannot be read.
        """
        ...

    def undecodable(self, split: str, rows: NDArray[np.int64]) -> dict[int, str]:
        """Rows that cannot be decoded → why."""
        ...

    def streamed(self, split: str, rows: NDArray[np.int64], device: torch.device, workers: int) -> Split:
        """The same rows as a split whose batches are read on demand."""
        ...


def open_data(settings: DataSettings, device: torch.device, seed: int, spec: NetworkSpec | None = None) -> Data:
    """Find a dataset and read its class names; images are decoded when a split is first used.

    Args:
        device: of the batches.
        seed: of the draw of training images for validation, if there is no validation split.
        spec: of the network that will take it: texts become tokens if it takes tokens. None: texts are read as
            characters.

    Raises:
        DataError: no such dataset, its columns or labels cannot be used, or there is no tokenizer for the network.
        DependencyError: a tokenizer is needed, and transformers is not installed.
    """
    return Data(open_store(settings, spec), settings, device, seed)


def open_objects(store: ObjectStore, settings: DataSettings, device: torch.device, seed: int) -> Data:
    """The user's own objects as a dataset; the store decides what is kept in memory. See `open_data`."""
    return Data(store, settings.model_copy(update={"resident": False}), device, seed)


def open_store(settings: DataSettings, spec: NetworkSpec | None = None) -> Store:
    """Find a dataset. Raises as `open_data`."""
    if settings.image_size is not None and min(settings.image_size) < 1:
        raise DataError(f"--image-size {settings.image_size[0]},{settings.image_size[1]}: both are at least 1 (H,W).")
    if settings.image_size is not None and 3 * settings.image_size[0] * settings.image_size[1] > MOST_VALUES:
        raise DataError(
            f"--image-size {settings.image_size[0]},{settings.image_size[1]}: an image is no larger than 2364,2364."
        )
    found = sources.find(settings.source)
    if isinstance(found, PackedStore):
        found.apply(settings)
        return found
    if holds_texts(found.load(found.first), settings):
        return TextStore(found, settings, _encoder(settings, spec))
    # Imported here: a packed file is for machines without Pillow.
    from litdeploy.data.images import ImageStore

    return ImageStore(found, settings)


def _encoder(settings: DataSettings, spec: NetworkSpec | None) -> Encoder:
    if spec is not None and isinstance(spec.input, TokenInput):
        return Tokens(settings, spec)
    if spec is not None and settings.tokenizer is not None:
        raise DataError(
            f"--tokenizer {settings.tokenizer}: {spec.name} takes {spec.input.summary()}, and no tokens. Leave it out."
        )
    return Characters(settings.text_length)


class Data:
    """A dataset, its classes and its splits.

    `train` is the split of that name, or the only one, without what is held out of it. `test` is the test split; else
    the validation split; else a tenth of the training images (of `digits` a fifth), stratified by label (if there are
    labels) and the same for every seed. `validation` is the validation split if there is a test split too; else the
    share `settings.validation` of the training images, stratified, drawn by the seed. No image is in two of them.

    Attributes:
        source: its name, as the user gave it.
        noun: what it holds, in messages.
        classes: names, in the order of the labels; those of the training images; empty without labels.
        tokens: the tokenizer; None for texts read as characters, and for images.
    """

    def __init__(self, store: Store, settings: DataSettings, device: torch.device, seed: int) -> None:
        self.source = store.name
        self.noun = store.noun
        self.classes = store.classes
        self.tokens = store.tokens
        self._store = store
        self._settings = settings
        self._device = device
        self._seed = seed
        self._bad: dict[str, dict[int, str]] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of every image, as of the first one; (characters,) or (tokens,) of every text.

        Raises:
            DataError: that image cannot be decoded.
        """
        return self._store.shape

    @property
    def given(self) -> bool:
        """Whether these are the user's own objects: nothing is augmented."""
        return isinstance(self._store, ObjectStore)

    @property
    def labeled(self) -> bool:
        """Whether the data have labels, and they are used; else each label is −1."""
        return self._store.columns.label is not None

    @property
    def has_attributes(self) -> bool:
        """Whether an image has several labels, each 0 or 1, instead of one class."""
        return bool(self._store.columns.attributes)

    @cached_property
    def train(self) -> Split:
        """The images to train on.

        Raises:
            DataError: there are none, or one cannot be decoded.
        """
        return self._split("train")

    @cached_property
    def validation(self) -> Split:
        """The images that decide between models during training. Raises as `train`."""
        return self._split("validation")

    @cached_property
    def test(self) -> Split:
        """The images of the final accuracy. Raises as `train`."""
        return self._split("test")

    def record(self) -> DataRecord:
        """The dataset's entry in the manifest. Decodes nothing.

        Raises:
            DataError: a split cannot be read.
        """
        present = SPLITS if "train" in self._store.splits else tuple(self._own)
        return DataRecord(
            noun=self.noun,
            source=self.source,
            fingerprint=self._fingerprint,
            labeled=self.labeled,
            tokenizer=None if self.tokens is None else self.tokens.fingerprint,
            images={split: len(self._rows(split)[1]) - len(self._bad.get(split, ())) for split in present},
            test_is_held_out="test" not in self._own,
        )

    def left_out(self) -> list[str]:
        """Why images of any split cannot be decoded, one entry each; without `settings.skip_bad` none is tried.

        Call it before training, since the test split is used only after it. Texts of the test split are read at once.

        Raises:
            DataError: there are more than `settings.skip_bad`, or a text of the test split cannot be read.
        """
        if not self._settings.skip_bad:
            if self.noun == "text":
                for why in self._store.undecodable(*self._rows("test")).values():
                    raise DataError(why)
            return []
        return self._allowed([why for split in SPLITS for why in self._undecodable(split).values()])

    def _allowed(self, faults: list[str]) -> list[str]:
        most = self._settings.skip_bad
        if len(faults) > most:
            raise DataError(
                f"{self.source}: {len(faults)} {self.noun}s cannot be decoded, and --skip-bad allows {most}:\n  "
                + "\n  ".join(faults[:3])
                + f"\nMend or remove them, or leave them out: --skip-bad {len(faults)}"
            )
        return faults

    def _undecodable(self, split: str) -> dict[int, str]:
        if split not in self._bad:
            self._bad[split] = self._store.undecodable(*self._rows(split))
            self._allowed(list(self._bad[split].values()))
        return self._bad[split]

    @cached_property
    def _fingerprint(self) -> str:
        return self._store.fingerprint()

    @cached_property
    def _own(self) -> dict[str, str]:
        """Split → the dataset's own split used for it, except those that are held out of `train`."""
        own: dict[str, str] = {split: split for split in ("validation", "test") if split in self._store.splits}
        if "test" not in own and "validation" in own:
            return {"test": own["validation"]}
        return own

    @cached_property
    def _shares(self) -> dict[str, NDArray[np.int64]]:
        """The dataset's `train`, divided: split → its rows there, disjoint."""
        labels = self._store.labels("train")
        shares = {"train": np.arange(len(labels))}
        if "test" not in self._own:
            shares["train"], shares["test"] = self._hold_out(
                shares["train"], labels, self._store.test_share, _TEST_SEED
            )
        if "validation" not in self._own:
            shares["train"], shares["validation"] = self._hold_out(
                shares["train"], labels, self._settings.validation, self._seed
            )
        return shares

    def _hold_out(
        self, rows: NDArray[np.int64], labels: NDArray[np.int64], share: float, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(kept, held out): of each class this share, at least one image, and never all of them."""
        # RandomState, since NumPy keeps its sequence the same in every version.
        random = np.random.RandomState(seed % 2**32)
        out = np.zeros(len(rows), dtype=bool)
        # Images with the same attributes are a class here.
        classed = labels.ndim == 1 or self.has_attributes
        _, class_of = np.unique(labels[rows] if classed else np.zeros(len(rows)), axis=0, return_inverse=True)
        for each in range(class_of.max() + 1):
            members = random.permutation(np.flatnonzero(class_of.reshape(-1) == each))
            out[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
        if not out.any():
            why = "for every class has only one" if self.labeled else "for there is only one left"
            raise DataError(
                f"{self.source}: none of its {len(rows)} training {self.noun}s can be held out, {why}. Give it more "
                f"{self.noun}s, or a validation and a test split."
            )
        return rows[~out], rows[out]

    def _rows(self, split: str) -> tuple[str, NDArray[np.int64]]:
        """The store's split that a split is in, and its rows there."""
        if split in self._own:
            own = self._own[split]
            return own, np.arange(len(self._store.labels(own)))
        if "train" not in self._store.splits:
            raise DataError(
                f"{self.source}: has no training {self.noun}s, only the split {', '.join(self._store.splits)}; it can "
                "be evaluated on and not trained on. Give --data a dataset with a train split."
            )
        return "train", self._shares[split]

    def _split(self, split: str) -> Split:
        own, rows = self._rows(split)
        if self._settings.skip_bad:
            rows = rows[~np.isin(rows, list(self._undecodable(split)))]
        resident = self._settings.resident
        if resident is None:
            size = len(rows) * int(np.prod(self.shape)) * self._store.value_bytes
            resident = size <= free_memory(self._device) // 2
        if not resident:
            return self._store.streamed(own, rows, self._device, self._settings.workers)
        labels_M = torch.from_numpy(self._store.labels(own)[rows]).to(self._device)
        return Resident(self._store.stored(own, rows, self._device), labels_M)


def check_against(data: Data, spec: NetworkSpec, classes: int) -> None:
    """Check a dataset against the network that will take it. The user's own objects were when they were opened.

    Args:
        classes: number of the network's classes or domains.

    Raises:
        DataError: another number or order of classes, other channels, another image size, or another kind of input.
    """
    if data.given:
        return
    task = task_of(spec)
    if data.labeled:
        _check_classes(data, spec, classes)
    elif task.needs_labels:
        raise DataError(
            f"{data.source} has no labels, or they are not used, and {spec.name} {task.makes} of the domains that the "
            "labels name. Give --data a dataset with labels (--label-column NAME, or --attributes A,B)."
        )
    if isinstance(spec.input, TensorInput):
        raise DataError(
            f"{data.source} has {data.noun}s, and {spec.name} takes plain tensors ({spec.input.summary()}). Give "
            "them in Python, as a Dataset or DataLoader: litdeploy.compress(…, data=loader)."
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


def _check_classes(data: Data, spec: NetworkSpec, classes: int) -> None:
    task_of(spec).check_classes(data.source, data.classes, data.has_attributes, spec, classes)
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


def _check_texts(data: Data, spec: NetworkSpec) -> None:
    wanted = spec.input
    if wanted.images is not None:
        raise DataError(
            f"{data.source} has texts, and {spec.name} takes images. Give --data images, or name their column: "
            "--image-column image."
        )
    if isinstance(wanted, TokenInput):
        # The tokenizer was checked against the network when the data were opened.
        assert data.tokens is not None, "opened without the network's spec"
        return
    assert isinstance(wanted, CharacterInput)
    if data.shape != wanted.shape:
        raise DataError(
            f"{data.source}: its texts are cut to {data.shape[0]} characters, and {spec.name} takes {wanted.length}. "
            f"Say so: --text-length {wanted.length}."
        )


def _channels(count: int) -> str:
    return "1 channel (gray)" if count == 1 else f"{count} channels" + (" (RGB)" if count == 3 else "")
