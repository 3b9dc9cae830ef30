"""The user's own data in Python: a Dataset, arrays, or a DataLoader or another iterable of batches.

    data, val_data ─Objects─▶ structure of a batch, input of the network ─ObjectStore─▶ Data

Samples of a Dataset and of arrays are read once and stay the same. Batches of a loader are streamed: order, workers and
augmentation are its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from litdeploy.batch import Batch, forward, joined, mapped, moved, picked, size_of, tensors_of
from litdeploy.config.recipe import Augmentation, DataSettings, Recipe
from litdeploy.config.spec import AnyInput, Free, InputSpec, InputTensor, Noun, TensorInput
from litdeploy.data.split import OnDemand, Picked, Resident, Split, free_memory
from litdeploy.data.structure import Structure, described, each, held, leaves, not_taken, tensors
from litdeploy.data.table import Columns
from litdeploy.errors import DataError, first_line
from litdeploy.networks import Network

_AT_ONCE = 256
_FINGERPRINTED = 16


class SampleSource:
    """A map-style Dataset, or arrays whose first dimension is the samples'.

    Attributes:
        given: what the user gave.
    """

    def __init__(self, given: Any, arrays: bool) -> None:
        self.given = given
        self._arrays = tensors(given) if arrays else None

    def __len__(self) -> int:
        return len(self.given) if self._arrays is None else len(leaves(self._arrays)[0])

    def batch(self, rows: Sequence[int]) -> Any:
        """These samples as a batch.

        Raises:
            DataError: a sample cannot be read, or they do not fit together.
        """
        if self._arrays is not None:
            return each(lambda tensor: tensor[list(rows)], self._arrays)
        try:
            return tensors(default_collate([self.given[row] for row in rows]))
        except (TypeError, RuntimeError, KeyError) as error:
            raise DataError(
                f"data: the samples of {name_of(self.given)} make no batch ({first_line(error)}). A sample is a tensor "
                "or array of one size, (input, label), or a dict of these; images need a transform to tensors."
            ) from error

    def batches(self) -> Iterator[Any]:
        """All samples in order."""
        for start in range(0, len(self), _AT_ONCE):
            yield self.batch(range(start, min(start + _AT_ONCE, len(self))))


class Stream:
    """A DataLoader, or another iterable of batches that has a length."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __len__(self) -> int:
        """Number of whole batches in a pass."""
        given = self.given
        if isinstance(given, DataLoader) and given.batch_size and not given.drop_last:
            try:
                return max(1, len(given.sampler) // given.batch_size)  # type: ignore[arg-type]
            except TypeError:
                pass
        return len(given)

    def batches(self) -> Iterator[Any]:
        """One pass."""
        return map(tensors, self.given)


def name_of(given: Any) -> str:
    """What reports call the user's data."""
    inner = getattr(given, "dataset", None)
    kind = "arrays" if isinstance(given, tuple | Mapping | Tensor | np.ndarray) else type(given).__name__
    return kind if inner is None else f"{kind} of {type(inner).__name__}"


def _source(given: Any, what: str) -> SampleSource | Stream:
    """What the user gave as samples or batches.

    Raises:
        DataError: it is neither, or has no length.
    """
    if isinstance(given, Tensor | np.ndarray) or (
        isinstance(given, tuple | Mapping)
        and (parts := leaves(given))
        and all(isinstance(part, Tensor | np.ndarray) and part.ndim for part in parts)
    ):
        lengths = {len(leaf) for leaf in leaves(given)}
        if len(lengths) > 1:
            raise DataError(
                f"{what}: its arrays have {', '.join(map(str, sorted(lengths)))} samples; all need the same."
            )
        return SampleSource(given, arrays=True)
    if isinstance(given, IterableDataset):
        raise DataError(
            f"{what}: an IterableDataset gives single samples. Give a loader: DataLoader({what}, batch_size=64)."
        )
    stream = isinstance(given, DataLoader) or (hasattr(given, "__iter__") and not hasattr(given, "__getitem__"))
    if not stream and not hasattr(given, "__getitem__"):
        raise DataError(
            f"{what}: {type(given).__name__} is no data. Give a folder, file or hub id, a Dataset, arrays (X, y), a "
            "DataLoader, or another iterable of batches with a length."
        )
    try:
        len(given)
    except TypeError:
        raise DataError(
            f"{what}: {name_of(given)} has no length, so that an epoch would have no end. Give a class with "
            "__iter__ and __len__ (the batches of a pass), or a DataLoader of a dataset with a length."
        ) from None
    return Stream(given) if stream else SampleSource(given, arrays=False)


class Objects:
    """The `data` and `val_data` of a call.

    Args:
        data, val_data: as for `compress`.

    Attributes:
        structure: of a batch; known once `input_of` or `store` has seen the network.

    Raises:
        DataError: they are no data, have no length, or are empty.
    """

    def __init__(self, data: Any, val_data: Any = None) -> None:
        self.train = _source(data, "data")
        self.validation = None if val_data is None else _source(val_data, "val_data")
        first = None
        if len(self.train):
            first = (
                self.train.batch([0, 0]) if isinstance(self.train, SampleSource) else next(self.train.batches(), None)
            )
        if first is None or not all(map(len, held(first))):
            raise DataError(f"data: {name_of(data)} is empty.")
        self.first = first

    def input_of(self, module: nn.Module) -> AnyInput:
        """The input of a network of which nothing else is known: tensors like those of the first batch.

        Raises:
            DataError: the network does not take the batches.
        """
        structure = Structure.of(self.first, module, None)
        inputs, _ = structure.read(self.first)
        _check_runs(self.first, inputs, module)
        named = inputs if isinstance(inputs, dict) else {next(iter(structure.inputs)): inputs}
        return TensorInput(
            tensors=tuple(
                InputTensor(name, "float32" if tensor.is_floating_point() else "int64", tuple(tensor.shape[1:]))
                for name, tensor in named.items()
            )
        )

    def store(self, network: Network, evaluation: bool = False) -> ObjectStore:
        """The data for a network.

        Args:
            evaluation: every split is all of `data`, which is not trained on.

        Raises:
            DataError: the network does not take the batches, or a loader to train on comes without `val_data`.
        """
        if isinstance(self.train, Stream) and self.validation is None and not evaluation:
            raise DataError(
                f"data: {name_of(self.train.given)} is streamed, so that nothing can be held out of it. Give "
                "val_data=… too: a DataLoader, a Dataset or arrays."
            )
        return ObjectStore(self, network, evaluation)


def given_objects(data: Any, val_data: Any = None) -> Objects | None:
    """The user's own data; None if `data` names a dataset.

    Raises:
        DataError: see `Objects`; or `val_data` with a named dataset.
    """
    named = data is None or isinstance(data, str | DataSettings) or hasattr(data, "__fspath__")
    if named or (isinstance(data, Mapping) and all(isinstance(key, str) for key in data) and not held(tensors(data))):
        if val_data is not None:
            raise DataError("val_data: is for data that are given in Python; a named dataset has its own splits.")
        return None
    return Objects(data, val_data)


class ObjectStore:
    """The user's data as a `Store`: each split is read once, into memory if it fits, or streamed.

    Attributes:
        structure: of a batch.
        streams: whether the training split is streamed: its samples may differ from pass to pass.
        batch_size: of a streamed training split, which decides it; else None.
        others: see `Store`.
    """

    tokens = None
    test_share = 0.1

    def __init__(self, objects: Objects, network: Network, evaluation: bool) -> None:
        spec = network.spec.input
        if spec.domains:
            raise DataError("data: images to translate are read from a folder or a table; give --data its name.")
        self.structure = Structure.of(objects.first, network.module, spec)
        self.noun: Noun = spec.noun
        self._spec = spec
        self._sources: dict[str, SampleSource | Stream] = {"train": objects.train}
        if evaluation:
            self._sources |= {"validation": objects.train, "test": objects.train}
        elif objects.validation is not None:
            self._sources |= {"validation": objects.validation, "test": objects.validation}
        self.splits: tuple[str, ...] = tuple(self._sources)
        self.streams = isinstance(objects.train, Stream) and not evaluation
        self.name = name_of(objects.train.given)
        if objects.validation is not None:
            self.name += f"; validation and test: {name_of(objects.validation.given)}"
        self._first, self._keeps_labels = objects.first, False
        inputs, labels = self.structure.read(objects.first)
        _check_fits(objects.first, inputs, network)
        self.batch_size = size_of(inputs) if self.streams else None
        if self.batch_size == 1:
            raise DataError("data: batches of one sample. Give a loader of at least two: DataLoader(…, batch_size=64).")
        self._example = mapped(lambda tensor: tensor[:1].clone(), inputs)
        self.shape = tuple(tensors_of(inputs)[0].shape[1:])
        self.value_bytes = -(-self._sample_bytes // max(1, int(np.prod(self.shape))))
        # A class is a whole number; other labels are for the user's own functions.
        self.labeled = labels is not None and not labels.is_floating_point()
        self.classes = self._class_names(network, objects.train.given) if self.labeled else ()
        self.columns = Columns("inputs", "labels" if self.labeled else None)
        self._read: dict[int, tuple[Batch | None, Tensor]] = {}

    def first_batch(self) -> tuple[Batch, Tensor]:
        """Inputs and labels of the first batch. From now on labels that are no classes are kept, for the user's own
        functions."""
        self._keeps_labels = True
        return self._checked(self._first)

    def adapted(self, recipe: Recipe, processes: int = 1) -> Recipe:
        """The recipe with what the data decide: the batch size of a loader, and no augmentation of ours.

        Args:
            processes: that train together.

        Raises:
            DataError: the recipe wants features kept of samples that may differ from pass to pass, or several processes
                would stream.
        """
        if self.streams and processes > 1:
            raise DataError(
                f"data: {processes} processes would each read the same batches of the loader. Give data=… the Dataset "
                "itself, whose batches they share, or start one process."
            )
        if self.streams and recipe.feature_cache not in ("auto", "off"):
            raise DataError(
                f"--feature-cache {recipe.feature_cache}: a loader's samples may differ from pass to pass, so that no "
                "features of them can be kept. Leave it out, or give data=… the Dataset itself."
            )
        changes: dict[str, Any] = {"augmentation": Augmentation(padding=0, flip=False).model_dump()}
        if self.streams:
            changes |= {"batch_size": self.batch_size, "feature_cache": "off"}
        return recipe.with_(**changes)

    def notes(self) -> list[str]:
        """What the user should know of how these data are used."""
        found = []
        if self.streams:
            found.append(
                f"data: batches of {self.batch_size} from the loader, {len(self._sources['train'])} an epoch; order "
                "and augmentation are its own, so that a resumed run sees other batches, and no features are kept"
            )
        else:
            found.append("data: each sample is read once; for augmentation that differs by epoch, give a DataLoader")
        if "test" in self._sources:
            found.append("val_data: is both the validation and the test split")
        return found

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the structure, the length and a few samples; of a loader, of no sample."""
        digest = hashlib.sha256(f"{self.name} {self.structure} {sorted(self._sources)}".encode())
        for source in self._sources.values():
            digest.update(f"{len(source)}".encode())
            if isinstance(source, SampleSource):
                rows = np.linspace(0, len(source) - 1, min(len(source), _FINGERPRINTED)).astype(int).tolist()
                for tensor in held(source.batch(rows)):
                    digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def labels(self, split: str) -> NDArray[Any]:
        """See `Store.labels`; labels that are no classes are unchanged; −1 without labels."""
        source = self._sources[split]
        if isinstance(source, Stream) and split == "train" and self.streams:
            assert self.batch_size is not None
            return np.full(len(source) * self.batch_size, -1)
        return self._everything(source)[1].numpy()

    def stored(self, split: str, rows: NDArray[np.int64], device: torch.device) -> Batch:
        """See `Store.stored`: what the network takes."""
        source = self._sources[split]
        inputs, _ = self._everything(source)
        if inputs is not None:
            return moved(picked(inputs, torch.from_numpy(rows)), device)
        assert isinstance(source, SampleSource)
        found, _ = self.structure.read(source.batch(rows.tolist()))
        return moved(found, device)

    def undecodable(self, split: str, rows: NDArray[np.int64]) -> dict[int, str]:
        """See `Store.undecodable`: a sample that cannot be read is an error of the user's code."""
        return {}

    def streamed(self, split: str, rows: NDArray[np.int64], device: torch.device, workers: int) -> Split:
        """See `Store.streamed`; in memory if it fits."""
        source = self._sources[split]
        if isinstance(source, Stream) and split == "train" and self.streams:
            assert self.batch_size is not None
            return StreamedBatches(source, self.batch_size, self._checked, device)
        labels = torch.from_numpy(self.labels(split)[rows]).to(device)
        inputs, _ = self._everything(source)
        if inputs is not None and self._sample_bytes * len(rows) <= free_memory(device) // 2:
            return Resident(self.stored(split, rows, device), labels)
        return OnDemand(lambda some: self.stored(split, some, torch.device("cpu")), rows, labels)

    @property
    def _sample_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(self._example))

    def _everything(self, source: SampleSource | Stream) -> tuple[Batch | None, Tensor]:
        """All inputs, unless they are samples that memory does not hold, and labels."""
        if id(source) not in self._read:
            kept = free_memory(torch.device("cpu")) // 3
            fits = (
                self._sample_bytes * len(source) * (1 if isinstance(source, SampleSource) else self._rows(source))
                <= kept
            )
            if not fits and isinstance(source, Stream):
                raise DataError(
                    f"val_data: {name_of(source.given)} does not fit into memory, and it is read at each evaluation. "
                    "Give a Dataset, or a part of it: DataLoader(torch.utils.data.Subset(dataset, range(10_000)), …)."
                )
            inputs, labels = [], []
            for batch in source.batches():
                read, label = self._checked(batch)
                labels.append(label)
                if fits:
                    inputs.append(read)
            self._read[id(source)] = (joined(inputs) if fits else None, torch.cat(labels))
        return self._read[id(source)]

    def _rows(self, source: Stream) -> int:
        """Rows of its first batch."""
        first = next(source.batches(), None)
        return 1 if first is None else size_of(self.structure.read(first)[0])

    def _checked(self, batch: Any) -> tuple[Batch, Tensor]:
        """A batch's inputs and labels (−1 without).

        Raises:
            DataError: they have another shape or type than those of the first batch, or a label is no class.
        """
        try:
            inputs, labels = self.structure.read(batch)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise DataError(f"data: a batch is built otherwise than the first one: {described(batch)}.") from None
        for first, tensor in zip(tensors_of(self._example), tensors_of(inputs), strict=True):
            if first.shape[1:] != tensor.shape[1:] or first.dtype != tensor.dtype:
                free = not isinstance(self._spec, TensorInput | InputSpec)
                raise DataError(
                    f"data: batches without a fixed size: {described(first[:0])} at first (0 is the batch), then "
                    f"{described(tensor)}. Give all samples one size"
                    + (", as tokenizers do by padding='max_length'." if free else " (pad, crop or resize them).")
                )
        if labels is None or not (self.labeled or self._keeps_labels):
            return inputs, torch.full((size_of(inputs),), -1)
        if self.labeled and self.classes and labels.numel() and int(labels.max()) >= len(self.classes):
            raise DataError(
                f"data: a label is {int(labels.max())}, and the network has {len(self.classes)} classes, 0 to "
                f"{len(self.classes) - 1}. Give labels of these classes, or no labels."
            )
        return inputs, labels

    def _class_names(self, network: Network, given: Any) -> tuple[str, ...]:
        count = network.class_count()
        own = getattr(getattr(given, "dataset", given), "classes", ())
        for names in (own if isinstance(own, list | tuple) else (), network.spec.classes):
            if len(names) == count and all(isinstance(name, str) for name in names):
                return tuple(names)
        return tuple(map(str, range(count)))


def _check_fits(batch: Any, inputs: Batch, network: Network) -> None:
    """Check the shapes of a batch against the network's input, and run the network on two samples.

    Raises:
        DataError: the network does not take them.
    """
    named = inputs if isinstance(inputs, dict) else {network.spec.input.tensors[0].name: inputs}
    for wanted in network.spec.input.tensors:
        found = tuple(named[wanted.name].shape[1:])
        fits = len(found) == len(wanted.shape) and all(
            isinstance(size, Free) or size == length for size, length in zip(wanted.shape, found, strict=True)
        )
        if not fits:
            shown = ",".join(map(str, found))
            raise not_taken(
                batch,
                network.module,
                f"it takes {network.spec.input.summary()}, and they have {wanted.name} of {found}; if it takes them, "
                f"say so: input_shape=({shown}{',' * (len(found) == 1)})",
            )
    _check_runs(batch, inputs, network.module)


@torch.no_grad()
def _check_runs(batch: Any, inputs: Batch, module: nn.Module) -> None:
    """Run a network on two samples of a batch, and leave its mode unchanged.

    Raises:
        DataError: it does not take them.
    """
    few = picked(inputs, slice(2))
    pixels = any(tensor.dtype is torch.uint8 for tensor in tensors_of(few))
    device, training = next(module.parameters()).device, module.training
    try:
        forward(module.eval(), mapped(lambda tensor: (tensor.float() if pixels else tensor).to(device), few))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AssertionError) as error:
        raise not_taken(batch, module, first_line(error)) from error
    finally:
        module.train(training)


class StreamedBatches(Split):
    """Batches of the user's loader, in its order. Passes have a fixed number of them: a last, smaller one is left out,
    and a loader that ends early is begun again.

    Args:
        size: of a batch.
        read: a batch → inputs and labels.
        device: of the batches.
    """

    def __init__(
        self, source: Stream, size: int, read: Callable[[Any], tuple[Batch, Tensor]], device: torch.device
    ) -> None:
        super().__init__(torch.full((len(source) * size,), -1, device=device))
        self._source, self._size, self._read = source, size, read

    def pick(self, order: Sequence[Tensor]) -> Iterator[Picked]:
        """The next batches of the loader, as many as there are in the order, whose positions have no meaning here.

        Raises:
            DataError: a batch has another size, or the loader is empty.
        """
        device, left = self.labels.device, len(order)
        while left:
            before = left
            for inputs, labels in self._whole():
                rows = torch.arange(self._size, device=device)
                yield Picked(
                    mapped(lambda tensor: tensor.to(device, non_blocking=True), inputs), rows, labels.to(device)
                )
                left -= 1
                if not left:
                    return
            if left == before:
                raise DataError(f"data: {name_of(self._source.given)} gave no whole batch of {self._size} in a pass.")

    def _whole(self) -> Iterable[tuple[Batch, Tensor]]:
        smaller = None
        for batch in self._source.batches():
            inputs, labels = self._read(batch)
            if smaller is not None or size_of(inputs) > self._size:
                raise DataError(
                    f"data: batches without a fixed size: {self._size} samples, then {smaller or size_of(inputs)}. "
                    "Give batches of one size; only the last of a pass may be smaller."
                )
            if size_of(inputs) < self._size:
                smaller = size_of(inputs)
                continue
            yield inputs, labels
