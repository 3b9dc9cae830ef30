"""What an artefact is compared with its network on: samples of a test split, or noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litdeploy.batch import Batch, moved, picked, size_of
from litdeploy.config.recipe import DataSettings
from litdeploy.config.settings import parse
from litdeploy.data import Data, Objects, check_against, given_objects, open_data, open_objects, prepared
from litdeploy.errors import DataError
from litdeploy.networks import Network
from litdeploy.storage.bundle import TOKENIZER, carried_by
from litdeploy.storage.records import Manifest

# At least as many are compared; more if the largest batch takes more.
LEAST_IMAGES = 1024
_LEAST_NOISE = 64


@dataclass(frozen=True)
class Evidence:
    """Samples as a network takes them, and their labels (N); None: noise, which has none."""

    inputs: Batch
    labels_N: Tensor | None

    @classmethod
    def of(cls, data: Data | None, network: Network, most: int, device: torch.device) -> Evidence:
        """Take samples of the test split, evenly spaced, or all of them if it has fewer; without data, noise.

        Args:
            most: the largest batch.

        Raises:
            DataError: the split is empty.
        """
        if data is None:
            return cls(moved(network.example(max(_LEAST_NOISE, most)), device), None)
        count = max(LEAST_IMAGES, most)
        total = len(data.test)
        if not total:
            raise DataError(f"{data.source}: its test split is empty; give --data a dataset with a test split.")
        count = min(count, total)
        rows = torch.arange(count) * total // count
        [batch] = data.test.pick([rows])
        return cls(prepared(batch.images(), network.spec.input, batch.labels_N), batch.labels_N)

    def in_calls(self, least: int, most: int) -> Evidence:
        """Drop the remainder after calls of `most` images if it is below `least`: an engine does not take it."""
        total = size_of(self.inputs)
        rest = total % most
        count = total - rest if rest < least < total else total
        labels_N = None if self.labels_N is None else self.labels_N[:count]
        return Evidence(picked(self.inputs, slice(count)), labels_N)


def settings_of(data: Any, learned: DataSettings | None = None) -> DataSettings | Objects | None:
    """The settings of a dataset that the caller named, the caller's own objects, or else what a student learned on.

    Args:
        data: settings, some of their fields, the source, or a Dataset, arrays or a DataLoader.

    Raises:
        SettingsError: a field has another value than it can have.
        DataError: the objects are no data.
    """
    objects = given_objects(data)
    if objects is not None:
        return objects
    if data is None or isinstance(data, DataSettings):
        return data or learned
    given = {"source": data} if isinstance(data, str) else data
    if learned is not None:
        base = learned.merged(given)
        # The size is the network's, for any data.
        given = (
            {key: base[key] for key in ("image_size", "text_length", *given) if key in base}
            if "source" in given
            else base
        )
    return parse(DataSettings, given, "command line")


def open_for(
    network: Network,
    settings: DataSettings | Objects | None,
    device: torch.device,
    seed: int = 0,
    learned: DataSettings | None = None,
) -> Data | None:
    """Open a dataset and check that it fits a network; None if there is none.

    Texts are tokenized by the tokenizer next to the network's file if no other is named.

    Args:
        settings: of objects, each split is all of them.
        learned: of the student; its tokenizer may have moved.

    Raises:
        DataError: it is unavailable, or does not fit this network.
    """
    if settings is None:
        return None
    if isinstance(settings, Objects):
        return open_objects(settings.store(network, evaluation=True), DataSettings(), device, seed)
    own = carried_by(network.source, TOKENIZER)
    if own is not None and settings.tokenizer in (None, learned.tokenizer if learned else None):
        settings = settings.model_copy(update={"tokenizer": str(own)})
    opened = open_data(settings, device, seed, network.spec)
    check_against(opened, network.spec, network.class_count())
    return opened


def open_test_data(manifest: Manifest, data: Any, student: Network, device: torch.device) -> Data | None:
    """Open the dataset that the student learned on, or another; None if none is given and it learned on objects of the
    user's, which are gone. Raises as `open_for`.
    """
    learned = manifest.recipe.data
    if data is None and learned.source is None:
        return None
    return open_for(student, settings_of(data, learned), device, manifest.recipe.seed, learned)
