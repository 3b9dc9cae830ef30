"""The test images that an artefact is held against the student on."""

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

# That an artefact is held against the student on, besides what its largest batch takes.
LEAST_IMAGES = 1024


@dataclass(frozen=True)
class Evidence:
    """Test images that an artefact is held against the student on: as a network takes them, and labels (N)."""

    inputs: Batch
    labels_N: Tensor

    @classmethod
    def of(cls, data: Data, network: Network, count: int) -> Evidence:
        """That many images of the test split, evenly spaced over it; all, where it has fewer.

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
        """Without the rest that calls of `most` images leave, where it is below `least`: an engine does not take it."""
        total = size_of(self.inputs)
        rest = total % most
        count = total - rest if rest < least < total else total
        return Evidence(picked(self.inputs, slice(count)), self.labels_N[:count])


def open_test_data(manifest: Manifest, data: DataSettings | str | None, student: Network, device: torch.device) -> Data:
    """The dataset that the student learned on, or another, held against the student. Tokens are made by what the bundle
    carries, where no other tokeniser is named.

    Raises:
        DataError: it is not to be had, or is none for this network.
    """
    learned = manifest.recipe.data
    if data is None:
        settings = learned
    elif isinstance(data, str):
        # The size is the network's, whatever the data.
        settings = DataSettings(source=data, image_size=learned.image_size, text_length=learned.text_length)
    else:
        settings = data
    own = carried_by(student.source, TOKENIZER)
    if own is not None and settings.tokenizer in (None, learned.tokenizer):
        settings = settings.model_copy(update={"tokenizer": str(own)})
    opened = open_data(settings, device, manifest.recipe.seed, student.spec)
    check_against(opened, student.spec, student.class_count())
    return opened
