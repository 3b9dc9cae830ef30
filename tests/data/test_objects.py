"""The user's own data: what a batch holds, what is read of it, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from litdeploy.config.recipe import DataSettings, Recipe
from litdeploy.config.spec import InputSpec, InputTensor, TensorInput
from litdeploy.data import Data, given_objects, open_objects
from litdeploy.data.structure import Structure, described
from litdeploy.errors import DataError
from litdeploy.networks import Network, load

CPU = torch.device("cpu")
N = 24


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, signal: Tensor) -> Tensor:
        result: Tensor = self.layer(signal)
        return result


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.table = nn.Linear(2, 3)

    def forward(self, signal: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.layer(signal) + scale * self.table(table)
        return result


X = torch.arange(N * 6).view(N, 6) / 100
T = torch.arange(N * 2).view(N, 2) / 100
Y = torch.arange(N) % 3


class Rows(Dataset[Any]):
    """Counts how often each sample is read."""

    classes = ("low", "middle", "high")

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        self.reads += 1
        return {"signal": X[row].numpy(), "label": int(Y[row])}


def opened(module: nn.Module, data: Any, val_data: Any = None) -> tuple[Data, Network]:
    objects = given_objects(data, val_data)
    assert objects is not None
    network = load(module, input=objects.input_of)
    return open_objects(objects.store(network), DataSettings(), CPU, 0), network


@pytest.mark.parametrize(
    ("module", "batch", "inputs", "label"),
    [
        (One(), X, {"signal": ()}, None),
        (One(), (X,), {"signal": (0,)}, None),
        (One(), (X, Y), {"signal": (0,)}, (1,)),
        (One(), {"signal": X, "labels": Y}, {"signal": ("signal",)}, ("labels",)),
        (Two(), (X, T), {"signal": (0,), "table": (1,)}, None),
        (Two(), (X, T, Y), {"signal": (0,), "table": (1,)}, (2,)),
        (Two(), ((X, T), Y), {"signal": (0, 0), "table": (0, 1)}, (1,)),
        (Two(), ({"table": T, "signal": X}, Y), {"signal": (0, "signal"), "table": (0, "table")}, (1,)),
        (
            Two(),
            {"table": T, "signal": X, "name": ["a"], "label": Y},
            {"signal": ("signal",), "table": ("table",)},
            ("label",),
        ),
    ],
)
def test_a_batch_is_matched_with_the_parameters_of_forward(
    module: nn.Module, batch: Any, inputs: dict[str, Any], label: Any
) -> None:
    found = Structure.of(batch, module, None)
    assert (found.inputs, found.label) == (inputs, label)
    read, labels = found.read(batch)
    assert isinstance(read, dict) == (len(inputs) > 1)
    assert (labels is None) == (label is None)
    again = Structure.of(found.rebuilt(read, Y), module, None)
    assert (again.inputs, again.label) == (inputs, label)


def test_a_dict_with_one_tensor_is_an_images_whatever_it_is_called() -> None:
    spec = InputSpec(shape=(1, 2, 3), mean=(0.5,), std=(0.5,))
    batch = {"pixel_values": torch.zeros(2, 1, 2, 3), "labels": torch.zeros(2)}
    assert Structure.of(batch, nn.Flatten(), spec).inputs == {"images": ("pixel_values",)}


def test_batches_that_the_network_does_not_take_are_shown_beside_its_signature() -> None:
    for batch in ((X, Y), {"signal": X, "tables": T}, {"nothing": "text"}):
        with pytest.raises(DataError, match=r"  a batch:  .*\n  forward:  Two.forward\(signal: "):
            opened(Two(), DataLoader(TensorDataset(X, Y), 4) if isinstance(batch, tuple) else [batch] * 4, (X, Y))
    assert described({"a": (X, [1])}) == "{a: (float32 (24, 6), (int))}"


def test_a_dataset_is_read_once_and_held_out_of_by_class() -> None:
    rows = Rows()
    data, network = opened(One(), rows)
    assert network.spec.input == TensorInput.of((6,), "signal")
    assert (data.given, data.classes, data.record().test_is_held_out) == (True, ("low", "middle", "high"), True)
    sizes = [len(split) for split in (data.train, data.validation, data.test)]
    assert sizes == [18, 3, 3]
    reads = rows.reads
    for _ in range(2):
        for images, labels in data.train.batches(5):
            assert isinstance(images, Tensor)
            assert torch.equal((images[:, 0] * 100 / 6).round().long() % 3, labels)
    assert rows.reads == reads


def test_arrays_give_what_a_dataset_of_them_gives() -> None:
    array, _ = opened(One(), (X.numpy().astype(np.float64), Y.numpy()))
    dataset, _ = opened(One(), TensorDataset(X, Y))
    for one, other in zip(array.test.batches(8), dataset.test.batches(8), strict=True):
        assert isinstance(one[0], Tensor)
        assert one[0].dtype == torch.float32
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_several_tensors_are_picked_by_name() -> None:
    data, network = opened(Two(), {"signal": X, "table": T})
    assert network.spec.input == TensorInput(
        tensors=(InputTensor("signal", "float32", (6,)), InputTensor("table", "float32", (2,)))
    )
    [(batch, labels)] = data.test.batches(8)
    assert isinstance(batch, dict)
    assert (list(batch), labels.tolist(), data.classes) == (["signal", "table"], [-1] * 2, ())


def test_the_batches_of_a_loader_are_streamed_and_its_last_smaller_one_is_left_out() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=10)
    data, network = opened(One(), loader, (X[:5], Y[:5]))
    assert len(data.train) == 20
    assert [len(data.validation), len(data.test)] == [5, 5]
    order = [torch.zeros(10, dtype=torch.int64)] * 3  # the third begins the loader again
    found = list(data.train.pick(order))
    assert [picked.labels_N.tolist() for picked in found] == [Y[:10].tolist(), Y[10:20].tolist(), Y[:10].tolist()]
    objects = given_objects(loader, (X, Y))
    assert objects is not None
    recipe = objects.store(network).adapted(Recipe())
    assert (recipe.batch_size, recipe.feature_cache, recipe.augmentation.flip) == (10, "off", False)
    with pytest.raises(DataError, match="2 processes"):
        objects.store(network).adapted(Recipe(), 2)
    with pytest.raises(DataError, match="--feature-cache 2"):
        objects.store(network).adapted(Recipe(feature_cache=2))


def test_the_fingerprint_is_of_length_and_samples() -> None:
    prints = [opened(One(), (x, Y[: len(x)]))[0].record().fingerprint for x in (X, X.clone(), X + 1, X[:20])]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


class Growing:
    """Batches whose samples grow."""

    def __init__(self, sizes: list[tuple[int, int]], length: int | None) -> None:
        self.sizes, self.length = sizes, length

    def __iter__(self) -> Iterator[Any]:
        return ((torch.zeros(n, width), torch.zeros(n).long()) for n, width in self.sizes)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("no length")
        return self.length


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield X[0]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([], "empty"),
        (Growing([], 0), "empty"),
        (Growing([(4, 6)], None), "no length"),
        (iter([X]), "no length"),
        (DataLoader(Endless(), 4), "no length"),
        (Endless(), "DataLoader"),
        (3, "is no data"),
        ((X, Y[:3]), "3, 24 samples"),
        (Growing([(1, 6)], 3), "one sample"),
        (DataLoader(TensorDataset(X, Y), 4), "val_data"),
        ([("text", 1)] * 5, "not in them"),
        ((X, Y + 1), "a label is 3"),
    ],
)
def test_what_is_no_data_is_refused(data: Any, why: str) -> None:
    val_data = None if isinstance(data, DataLoader | tuple) and why != "no length" else (X, Y)
    with pytest.raises(DataError, match=why):
        len(opened(One(), data, val_data)[0].train)


@pytest.mark.parametrize(
    "sizes", [[(4, 6), (4, 7)], [(4, 6), (3, 6), (4, 6)], [(4, 6), (5, 6)], [(4, 6), (3, 6), (3, 6)]]
)
def test_batches_without_a_fixed_size_are_refused(sizes: list[tuple[int, int]]) -> None:
    data, _ = opened(One(), Growing(sizes, 3), (X, Y))
    with pytest.raises(DataError, match="without a fixed size"):
        list(data.train.pick([Y[:4]] * 3))


def test_a_named_dataset_is_none_of_ours() -> None:
    for named in (None, "digits", DataSettings(source="digits"), {"source": "digits", "attributes": ["a", "b"]}):
        assert given_objects(named) is None
    with pytest.raises(DataError, match="val_data"):
        given_objects("digits", (X, Y))
