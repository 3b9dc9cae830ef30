"""The test images on which an artefact is compared with the student."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from litdeploy.batch import Batch, picked, size_of
from litdeploy.config.recipe import DataSettings
from litdeploy.data import Data, check_against, open_data, prepared
from litdeploy.errors import DataError
from litdeploy.networks import Network
from litdeploy.storage.bundle import TOKENIZER, carried_by
from litdeploy.storage.records import Manifest

# At least as many are compared; more if the largest batch takes more.
LEAST_IMAGES = 1024


@dataclass(frozen=True)
class Evidence:
    """Test images as a network takes them, and their labels (N)."""

    inputs: Batch
    labels_N: Tensor

    @classmethod
    def of(cls, data: Data, network: Network, count: int) -> Evidence:
        """Take `count` images of the test split, evenly spaced; all of them if it has fewer.

        Raises:
            DataError: it is empty.
        """
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
        return Evidence(picked(self.inputs, slice(count)), self.labels_N[:count])


def open_test_data(manifest: Manifest, data: DataSettings | str | None, student: Network, device: torch.device) -> Data:
    """Open the dataset that the student learned on, or another, and check that it fits the student.

    Texts are tokenized by the bundle's tokenizer if no other is named.

    Raises:
        DataError: it is unavailable, or does not fit this network.
    """
    learned = manifest.recipe.data
    if data is None:
        settings = learned
    elif isinstance(data, str):
        # The size is the network's, for any data.
        settings = DataSettings(source=data, image_size=learned.image_size, text_length=learned.text_length)
    else:
        settings = data
    own = carried_by(student.source, TOKENIZER)
    if own is not None and settings.tokenizer in (None, learned.tokenizer):
        settings = settings.model_copy(update={"tokenizer": str(own)})
    opened = open_data(settings, device, manifest.recipe.seed, student.spec)
    check_against(opened, student.spec, student.class_count())
    return opened
