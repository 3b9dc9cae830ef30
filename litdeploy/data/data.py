"""A dataset with its three splits, each loaded when it is first used."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import MOST_VALUES, NetworkSpec, Noun, TokenInput
from litdeploy.data import sources
from litdeploy.data.memory import free_memory
from litdeploy.data.packed import Packed
from litdeploy.data.split import SPLITS, Resident, Split
from litdeploy.data.table import Columns, holds_texts
from litdeploy.data.texts import Characters, Encoder, Texts
from litdeploy.data.tokens import Tokens
from litdeploy.errors import DataError
from litdeploy.storage.records import DataRecord

# Fixed: every run is tested on the same images, whatever its own seed.
_TEST_SEED = 0


class Store(Protocol):
    """Where a dataset's images or texts are: in tables and folders, or packed in one file.

    Attributes:
        name: of the source, as the user gave it.
        noun: what it holds.
        splits: those of train, validation and test that the source itself has.
        classes: names, in the order of the labels.
        columns: what held images or texts, and labels.
        test_share: share of the training images that is held out where there is neither test nor validation split.
        value_bytes: of each value that is stored.
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
        """What makes tokens of the texts; None where they are read as characters, and of images."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of every image, or (characters,) or (tokens,) of every text.

        Raises:
            DataError: the image that tells it cannot be decoded.
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the contents."""
        ...

    def labels(self, split: str) -> NDArray[np.int64]:
        """One index into the classes a row; of attributes 0 or 1 for each (rows, attributes).

        Raises:
            DataError: the split cannot be read, or a label is missing or none of the classes.
        """
        ...

    def stored(self, split: str, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """What is stored of these rows: (rows, *shape), uint8 but for tokens, on the device, nobody else's. See
        `prepared`.

        Raises:
            DataError: an image that cannot be decoded, or a text that cannot be read.
        """
        ...

    def undecodable(self, split: str, rows: NDArray[np.int64]) -> dict[int, str]:
        """Those of the rows whose images cannot be decoded, and why."""
        ...

    def streamed(self, split: str, rows: NDArray[np.int64], device: torch.device, workers: int) -> Split:
        """The same rows as a split whose batches are read when they are asked for."""
        ...


def open_data(settings: DataSettings, device: torch.device, seed: int, spec: NetworkSpec | None = None) -> Data:
    """Finds a dataset and reads its class names; images are decoded when a split is first used.

    Args:
        device: where batches will be.
        seed: decides which training images are held out for validation, where there is no validation split.
        spec: of the network that shall take it: one of tokens has texts tokenised. None: they are read as characters.

    Raises:
        DataError: no such dataset, or one whose columns or labels do not serve, or no tokeniser for the network.
        DependencyError: a tokeniser is needed, and transformers is not installed.
    """
    return Data(open_store(settings, spec), settings, device, seed)


def open_store(settings: DataSettings, spec: NetworkSpec | None = None) -> Store:
    """Finds a dataset. Raises as `open_data`."""
    if settings.image_size is not None and min(settings.image_size) < 1:
        raise DataError(f"--image-size {settings.image_size[0]},{settings.image_size[1]}: both are at least 1 (H,W).")
    if settings.image_size is not None and 3 * settings.image_size[0] * settings.image_size[1] > MOST_VALUES:
        raise DataError(
            f"--image-size {settings.image_size[0]},{settings.image_size[1]}: an image is no larger than 2364,2364."
        )
    found = sources.find(settings.source)
    if isinstance(found, Packed):
        found.check(settings)
        return found
    first = next(split for split in SPLITS if split in found.splits)
    dataset = found.splits[first]()
    found = replace(found, splits={**found.splits, first: lambda: dataset})
    if holds_texts(dataset, settings):
        return Texts(found, settings, _encoder(settings, spec))
    # Imported here: a packed file is for machines without Pillow.
    from litdeploy.data.encoded import Encoded

    return Encoded(found, settings)


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

    `train` is the split of that name, or the only one, less what is held out of it. `test` is the test split; else the
    validation split; else a tenth of the training images (of `digits` a fifth), stratified by label and the same for
    every seed. `validation` is the validation split where there is a test split too; else the share
    `settings.validation` of the training images, stratified, drawn by the seed. No image is in two of them.

    Attributes:
        source: as the user named it.
        noun: what it holds, as messages call it.
        classes: names, in the order of the labels; those of the training images.
        tokens: what makes tokens of the texts; None where they are read as characters, and of images.
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
        """(channels, height, width) of every image, told by the first one; (characters,) or (tokens,) of every text.

        Raises:
            DataError: that image cannot be decoded.
        """
        return self._store.shape

    @property
    def has_attributes(self) -> bool:
        """Whether an image has several labels, each 0 or 1, in place of one class."""
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
        """What the manifest says of the dataset. Decodes nothing.

        Raises:
            DataError: a split cannot be read.
        """
        present = SPLITS if "train" in self._store.splits else tuple(self._own)
        return DataRecord(
            noun=self.noun,
            source=self.source,
            fingerprint=self._fingerprint,
            tokenizer=None if self.tokens is None else self.tokens.fingerprint,
            images={split: len(self._rows(split)[1]) - len(self._bad.get(split, ())) for split in present},
            test_is_held_out="test" not in self._own,
        )

    def left_out(self) -> list[str]:
        """Of all splits, the images that cannot be decoded, each with the reason; none is looked for without
        `settings.skip_bad`. To be asked before a training: the test split is used after it. Its texts are read at once.

        Raises:
            DataError: they are more than that.
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
                + f"\nMend or remove them, or leave out as many: --skip-bad {len(faults)}"
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
        """Split → the dataset's own split that serves as it; those that are held out of `train` are not in here."""
        own: dict[str, str] = {split: split for split in ("validation", "test") if split in self._store.splits}
        if "test" not in own and "validation" in own:
            return {"test": own["validation"]}
        return own

    @cached_property
    def _shares(self) -> dict[str, NDArray[np.int64]]:
        """The dataset's `train` shared out: split → its rows there, disjoint."""
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
        _, class_of = np.unique(labels[rows], axis=0, return_inverse=True)
        for each in range(class_of.max() + 1):
            members = random.permutation(np.flatnonzero(class_of.reshape(-1) == each))
            out[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
        if not out.any():
            raise DataError(
                f"{self.source}: none of its {len(rows)} training {self.noun}s can be held out, for every class "
                f"has only one. Give it more {self.noun}s, or a validation and a test split."
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
