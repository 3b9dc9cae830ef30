"""Find a dataset by name: a path, a hub id or `digits` → its splits, each loaded on first use.

`datasets`, Pillow and scikit-learn are imported in functions: a packed file needs none of them.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import filterfalse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from litdeploy.data.packed import SUFFIX as PACKED_KIND
from litdeploy.data.packed import PackedStore
from litdeploy.data.split import SPLITS, free_memory
from litdeploy.data.table import TEXT_KIND, Columns, check_table, class_names, read_labels, read_lines
from litdeploy.errors import DataError, DependencyError, first_line
from litdeploy.files import is_file, is_folder, sha256_of

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_TABLE_KINDS = (".parquet", ".csv", ".jsonl", ".json", TEXT_KIND)
# In a folder of images, files of the other kinds are notes about it.
_BESIDE_IMAGES = (".parquet", ".csv")
_IMAGE_KINDS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
_WHAT_IS_TAKEN = (
    "a .parquet, .csv or .jsonl file of images or texts, a .txt file with a text a line, a folder of them named for "
    "their splits (train.parquet, test.parquet), a folder of class folders (train/cat/1.png, or cat/1.png) or, without "
    "labels, of images, a dataset's id at the Hugging Face hub (uoft-cs/cifar10), digits, or a .safetensors file that "
    "`litdeploy data pack` wrote"
)


@dataclass(frozen=True)
class TableSource:
    """A dataset that was found, as tables of `datasets`.

    Attributes:
        name: as the user gave it.
        loaders: `train`, `validation`, `test` → loads it as a `datasets.Dataset`.
        digest: computes the SHA-256 (hexadecimal) of the contents.
        base: folder that relative image paths are relative to; None if there is none.
        test_share: share of the training images that is held out if there is neither a test nor a validation split.
    """

    name: str
    loaders: Mapping[str, Callable[[], Any]]
    digest: Callable[[], str]
    base: Path | None = None
    test_share: float = 0.1
    _loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The split that decides columns, classes and shape: the training images, else the next one there is."""
        return next(split for split in SPLITS if split in self.loaders)

    def load(self, split: str) -> Any:
        """The split's `datasets.Dataset`; the same at each call.

        Raises:
            DataError: it cannot be read.
        """
        if split not in self._loaded:
            self._loaded[split] = self.loaders[split]()
        return self._loaded[split]


class TableStore:
    """What a `Store` of images and one of texts have in common: the tables they are in, their columns and labels.

    Args:
        columns: those that are used.
        any_numbers: see `class_names`.

    Raises:
        DataError: the split that decides cannot be read, or its columns or labels cannot be used.
    """

    def __init__(self, source: TableSource, columns: Columns, any_numbers: bool = False) -> None:
        self.source = source
        self.name = source.name
        self.splits = tuple(source.loaders)
        self.test_share = source.test_share
        self.columns = columns
        self.classes = class_names(source.load(source.first), self.name, source.first, columns, any_numbers)
        self._labels: dict[str, NDArray[np.int64]] = {}

    def fingerprint(self) -> str:
        """See `Store.fingerprint`; of the files' bytes, whatever the columns and the size."""
        return self.source.digest()

    def labels(self, split: str) -> NDArray[np.int64]:
        """See `Store.labels`."""
        if split not in self._labels:
            self._labels[split] = read_labels(self.source.load(split), self.name, split, self.columns, self.classes)
        return self._labels[split]


def find(name: str | None) -> TableSource | PackedStore:
    """Find the dataset of this name: `digits`, a path, or an id at the hub.

    Raises:
        DataError: no name, no such path, a path without images, an id that the hub does not know, or a damaged
            packed file.
        DependencyError: `datasets` is not installed, and the file is not packed.
    """
    if not name:
        raise DataError(f"No dataset is named. Give one with --data: {_WHAT_IS_TAKEN}.")
    path = Path(name)
    with suppress(RuntimeError):  # of a user who does not exist
        path = path.expanduser()
    if path.suffix.lower() == PACKED_KIND and is_file(path):
        return PackedStore(name, path.absolute())
    if importlib.util.find_spec("datasets") is None:
        raise DependencyError(
            f"--data {name}: needs the library datasets, which is not installed. Install it: pip install "
            "datasets; or give a file that `litdeploy data pack` wrote elsewhere: --data FILE.safetensors"
        )
    if name == "digits":
        return _digits()
    if is_folder(path):
        return _folder(name, path.absolute())
    if is_file(path):
        if path.suffix.lower() not in _TABLE_KINDS:
            raise DataError(f"{name}: a {path.suffix or 'nameless'} file. What is taken: {_WHAT_IS_TAKEN}.")
        return _tables(name, {_split_of(path.stem) or "train": [path.absolute()]})
    if path.exists():
        raise DataError(f"{name}: is a pipe, a device or a socket. Save what comes from it as a file.")
    if _looks_like_path(name, path):
        raise DataError(f"{name}: no such file or folder (looked at {path.absolute()}). Give --data {_WHAT_IS_TAKEN}.")
    return _hub(name)


def _looks_like_path(name: str, path: Path) -> bool:
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
    in_folder_here = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    return not is_hub_id or path.suffix.lower() in {*_TABLE_KINDS, *_IMAGE_KINDS, PACKED_KIND} or in_folder_here


def _split_of(name: str) -> str | None:
    """`train-00000-of-00002` → train, `cifar_val` → validation, `metadata` → None."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), None)


def _digits() -> TableSource:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 0–16 becomes 0–255.
    pixels_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)

    def load() -> Any:
        import datasets

        # As PNG, so that all image datasets are of one kind.
        return datasets.Dataset.from_dict(
            {"image": [_png(image_HW) for image_HW in pixels_NHW], "label": labels},
            features=datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("int64")}),
        )

    def fingerprint() -> str:
        return hashlib.sha256(pixels_NHW.tobytes() + labels.tobytes()).hexdigest()

    return TableSource("digits", {"train": load}, fingerprint, test_share=0.2)


def _png(pixels_HW: np.ndarray[Any, Any]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, "png")
    return buffer.getvalue()


def _folder(name: str, path: Path) -> TableSource:
    files = _table_files(path, _BESIDE_IMAGES)
    named = {split: found for split, found in _by_split(files).items() if split is not None}
    if named:
        return _tables(name, named)
    folders = _class_folders(path)
    if files and folders:
        raise DataError(
            f"{name}: holds {files[0].name} and folders of images ({', '.join(sorted(_classes(folders))[:3])}); either "
            f"may be the dataset. Give the table itself (--data {Path(name) / files[0].name}), or move it elsewhere."
        )
    if folders:
        _check_unmixed(name, path, folders)
        return _classes_source(name, path, folders)
    if files:
        return _tables(name, {"train": files})
    inside = [folder for folder in _subfolders(path) if _table_files(folder, _BESIDE_IMAGES)]
    if not inside:
        images = _plain_images(name, path)
        if images:
            return _images_source(name, path, images)
        files = _table_files(path)
        if files:
            named = {split: found for split, found in _by_split(files).items() if split is not None}
            return _tables(name, named or {"train": files})
        inside = [folder for folder in _subfolders(path) if _table_files(folder)]
    inside = [folder for folder in inside if folder.name == "data"] or inside
    if len(inside) > 1:
        raise DataError(
            f"{name}: holds several folders of tables ({', '.join(folder.name for folder in inside)}). "
            f"Give one of them: --data {Path(name) / inside[0].name}."
        )
    if not inside:
        raise DataError(f"{name}: no images or texts found in this folder. What is taken: {_WHAT_IS_TAKEN}.")
    tables = _by_split(_table_files(inside[0]))
    unnamed = tables.pop(None, [])
    return _tables(name, {split: found for split, found in tables.items() if split} or {"train": unnamed})


def _subfolders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _table_files(folder: Path, kinds: tuple[str, ...] = _TABLE_KINDS) -> list[Path]:
    """Files of the first of these kinds that the folder has: Parquet; if there are none, CSV; and so on."""
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    for kind in kinds:
        found = [entry for entry in entries if entry.suffix.lower() == kind]
        if found:
            return found
    return []


def _by_split(files: Iterable[Path]) -> dict[str | None, list[Path]]:
    tables: dict[str | None, list[Path]] = {}
    for file in files:
        tables.setdefault(_split_of(file.stem), []).append(file)
    return tables


def _class_folders(path: Path) -> dict[str, dict[str, list[Path]]]:
    """Split → class → image files. Empty if the folders do not look like classes."""
    subfolders = _subfolders(path)
    splits = [folder for folder in subfolders if _SPLIT_NAMES.get(folder.name.lower()) and _subfolders(folder)]
    if splits:
        found = {_SPLIT_NAMES[folder.name.lower()]: _images_by_class(folder) for folder in splits}
        return {split: classes for split, classes in found.items() if classes}
    classes = _images_by_class(path)
    # One class cannot be learned, and `train/1.png` names a split, not a class.
    if len(classes) < 2 or all(name.lower() in _SPLIT_NAMES for name in classes):
        return {}
    return {"train": classes}


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    classes = {sub.name: sorted(filter(_is_image, sub.rglob("*"))) for sub in _subfolders(folder)}
    return {name: files for name, files in classes.items() if files}


def _is_image(path: Path) -> bool:
    """Whether a path is named like an image and is not a folder.

    Raises:
        DataError: it is a pipe, a device or a socket, whose end a reader would wait for.
    """
    if path.suffix.lower() not in _IMAGE_KINDS or is_folder(path):
        return False
    if path.exists() and not is_file(path):
        raise DataError(f"{path}: is a pipe, a device or a socket, and not an image file. Remove it from the folder.")
    return True


def _check_unmixed(name: str, path: Path, folders: dict[str, dict[str, list[Path]]]) -> None:
    """Raise DataError if images are next to the class folders too: they belong to no class."""
    splits = [folder for folder in _subfolders(path) if _SPLIT_NAMES.get(folder.name.lower()) in folders]
    loose = [image for folder in splits or [path] for image in _images_in(folder)]
    if loose:
        raise DataError(
            f"{name}: holds images ({loose[0].name}{', …' * (len(loose) > 1)}) and folders of images "
            f"({', '.join(sorted(_classes(folders))[:3])}); if the folders are the classes, the images have none. Move "
            "either elsewhere; to use all images without labels, put them into one folder."
        )


def _images_in(folder: Path) -> list[Path]:
    """Image files of a folder, without those of its subfolders and hidden ones."""
    return [entry for entry in sorted(folder.iterdir()) if not _is_hidden(entry) and _is_image(entry)]


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _plain_images(name: str, path: Path) -> dict[str, list[Path]]:
    """Split → image files, for images without classes: in the folder, in its only one, or in one for each split."""
    loose = _images_in(path)
    found = {folder: list(filterfalse(_is_hidden, files)) for folder, files in _images_by_class(path).items()}
    folders = {folder: files for folder, files in found.items() if files}
    if loose and folders:
        raise DataError(
            f"{name}: holds images ({loose[0].name}{', …' * (len(loose) > 1)}) and a folder of images "
            f"({next(iter(folders))}); either may be the dataset. Give the folder (--data "
            f"{Path(name) / next(iter(folders))}), or put all images into one."
        )
    if loose or not folders:
        return {"train": loose} if loose else {}
    named = {_SPLIT_NAMES[folder.lower()]: files for folder, files in folders.items() if folder.lower() in _SPLIT_NAMES}
    if named:
        return named
    [(only, files)] = folders.items()
    classes = _images_by_class(path / only)
    if len(classes) > 1:
        raise DataError(
            f"{name}: holds one folder, {only}, and folders of images in it ({', '.join(sorted(classes)[:3])}). If "
            f"they are the classes, give it: --data {Path(name) / only}"
        )
    return {"train": files}


def _images_source(name: str, path: Path, images: dict[str, list[Path]]) -> TableSource:
    def load(files: list[Path]) -> Any:
        import datasets

        return datasets.Dataset.from_dict({"image": [str(file) for file in files]})

    splits = {split: partial(load, files) for split, files in images.items()}
    return TableSource(name, splits, partial(_digest, [file for files in images.values() for file in files], path))


def _classes(folders: dict[str, dict[str, list[Path]]]) -> set[str]:
    return {name for classes in folders.values() for name in classes}


def _classes_source(name: str, path: Path, folders: dict[str, dict[str, list[Path]]]) -> TableSource:
    def load(classes: dict[str, list[Path]]) -> Any:
        import datasets

        pairs = [(str(file), label) for label, files in classes.items() for file in files]
        return datasets.Dataset.from_dict({"image": [pair[0] for pair in pairs], "label": [pair[1] for pair in pairs]})

    files = [file for classes in folders.values() for found in classes.values() for file in found]
    splits = {split: partial(load, classes) for split, classes in folders.items()}
    return TableSource(name, splits, partial(_digest, files, path))


def _digest(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over the files' names below `root` and their bytes, in the order of the names."""
    digest = hashlib.sha256()
    for relative, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        try:
            content = sha256_of(file)
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror}). Repair it, or remove it from the dataset."
            ) from error
        digest.update(f"{relative}\0".encode() + bytes.fromhex(content))
    return digest.hexdigest()


def _tables(name: str, files: dict[str, list[Path]]) -> TableSource:
    folder = next(iter(files.values()))[0].parent
    splits = {split: partial(_load_tables, name, found) for split, found in files.items()}
    everything = [file for found in files.values() for file in found]
    return TableSource(name, splits, partial(_digest, everything, folder), base=folder)


def _load_tables(name: str, files: list[Path]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    for file in files:
        check_table(file, name)
    kind = files[0].suffix.lower().removeprefix(".")
    if files[0].suffix.lower() == TEXT_KIND:
        return _load_texts(name, files)
    kind = {"jsonl": "json"}.get(kind, kind)
    # `datasets` takes patterns, and a folder may be called `run[1]`.
    patterns = [glob.escape(str(file)) for file in files]
    try:
        with _unlogged():
            return datasets.load_dataset(kind, data_files={"train": patterns}, split="train")
    except Exception as error:  # whatever pyarrow and pandas raise for a damaged file
        cause = error.__cause__ or error
        mend = " Write it again in UTF-8." if isinstance(cause, UnicodeDecodeError) else ""
        named = ", ".join(file.name for file in files[:3])
        raise DataError(f"{name}: {named} cannot be read as {kind} ({first_line(cause)}).{mend}") from error


def _load_texts(name: str, files: list[Path]) -> Any:
    import datasets
    import pyarrow as pa

    most = free_memory(torch.device("cpu")) // (2 * len(files))
    return datasets.Dataset(pa.concat_tables([read_lines(file, name, most) for file in files]))


@contextmanager
def _unlogged() -> Iterator[None]:
    """Silence the log of `datasets`: it logs what it raises too, and our message has it."""
    logger = logging.getLogger("datasets")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _hub(name: str) -> TableSource:
    import datasets

    datasets.disable_progress_bars()
    no_path = f"{name}: no file or folder of this name is here"
    try:
        loaded = datasets.load_dataset(name)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{no_path}, and the Hugging Face hub has no such dataset, or not for you ({first_line(error)}). "
            f"Give --data {_WHAT_IS_TAKEN}."
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{no_path}, and the Hugging Face hub, where it may be a dataset's id, cannot be reached "
            f"({first_line(error)}). Connect, or give --data the path of a copy: {_WHAT_IS_TAKEN}."
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: the dataset at the Hugging Face hub cannot be opened by its id alone ({first_line(error)}). "
            "Save it as Parquet, one file a split, and give --data that folder."
        ) from error
    splits = _hub_splits(name, {str(split): dataset for split, dataset in loaded.items()})
    # `datasets` derives them from the revision, the configuration and the split.
    marks = [f"{split}\0{dataset._fingerprint}" for split, dataset in sorted(splits.items())]
    digest = hashlib.sha256("\n".join(marks).encode()).hexdigest()
    return TableSource(name, {split: partial(_same, dataset) for split, dataset in splits.items()}, lambda: digest)


def _hub_splits(name: str, loaded: dict[str, Any]) -> dict[str, Any]:
    if len(loaded) == 1:
        [(split, dataset)] = loaded.items()
        return {_split_of(split) or "train": dataset}
    splits: dict[str, Any] = {}
    # Exact names first: of `test` and `test_hard` the former is the test split.
    for split in sorted(loaded, key=lambda split: (split not in _SPLIT_NAMES, split)):
        meant = _split_of(split)
        if meant:
            splits.setdefault(meant, loaded[split])
    if not splits:
        raise DataError(f"{name}: its splits are {', '.join(loaded)}; train, validation and test are looked for.")
    return splits


def _same(dataset: Any) -> Any:
    return dataset
