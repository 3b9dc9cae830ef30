"""The verb `evaluate`: the metric of any checkpoint or exported file on any split of any dataset."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from litdeploy.config.formats import FORMATS, format_of_file
from litdeploy.config.recipe import DataSettings
from litdeploy.config.settings import parse
from litdeploy.config.spec import (
    InputSpec,
    NetworkSpec,
    TaskName,
    image_shape,
    input_of,
)
from litdeploy.data import Data, Objects, check_against, given_objects, normalised_batches, open_data, open_objects
from litdeploy.errors import DataError, RunnerError, SettingsError
from litdeploy.evaluation.retrieval import METRICS, Retrieval, embeddings, retrieval
from litdeploy.exporter.teacher import load_teacher
from litdeploy.files import is_folder
from litdeploy.networks import Network, NetworkName, load, published
from litdeploy.runtime import Runner, open_runner, resolve_device, resolve_precision
from litdeploy.runtime.adapter import read_names, read_task
from litdeploy.runtime.runner import ExportedFile, described
from litdeploy.storage.bundle import TOKENIZER, Bundle, carried_by
from litdeploy.storage.records import Score
from litdeploy.tasks import task_of

SPLITS = ("test", "validation", "train")


def evaluate(
    path: str | Path,
    *,
    data: Any = None,
    split: str = "test",
    batch_size: int = 256,
    precision: str = "fp32",
    device: str = "auto",
    seed: int | None = None,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    task: TaskName | None = None,
    teacher: str | Path | None = None,
) -> Score:
    """Measure a network by its task's metric: accuracy, or for generated images the likeness to its teacher's.

    Args:
        path: weights, a folder that transformers saved, an exported file (`.onnx`, `.pt2`), or a bundle, whose
            student is evaluated.
        data: the dataset, or your own Dataset, arrays or DataLoader, all of which is then measured on; None: the one
            that a bundle's student was trained on.
        split: `test`, `validation` or `train`.
        batch_size: samples per call.
        precision: `fp32`, `bf16` or `auto`; an exported file has its own.
        device: `auto`, `cpu`, `cuda` or `cuda:i`.
        seed: of the held-out split, if the dataset has none of its own; None: 0, or the bundle's.
        network, normalise, input_shape, task: see `networks.load`.
        teacher: weights of the teacher, if the metric compares with it; None: a bundle's own teacher.

    Raises:
        LitdeployError: bad input; see `litdeploy.errors`.
    """
    path, network = published(path, network)
    bundle = Bundle(path) if is_folder(path) else None
    objects = given_objects(data)
    where = resolve_device(device)
    if objects is not None:
        path = Bundle(path).student_path if bundle is not None else path
        runner, spec, opened = _on_objects(path, objects, where, precision, network, normalise, input_shape, task)
    else:
        path, settings, seed = what_on(path, data, seed, split)
        runner, spec, classes = open_file(path, where, precision, network, normalise, input_shape, task)
        opened = open_data(settings, where, seed, spec)
        check_against(opened, spec, classes)
    batches = normalised_batches(getattr(opened, split), spec.input, batch_size)
    meant = task_of(spec)
    compared = meant.needs_teacher(opened.labeled)
    if not compared and teacher is not None:
        raise SettingsError(
            f"--teacher {teacher}: is for networks that are compared with their teacher, and {path}, which "
            f"{meant.makes}, is compared with the labels. Leave it out, or leave the labels unused: --labels none"
        )
    with ExitStack() as running:
        running.enter_context(runner)
        reference = None
        if compared:
            original = teacher_of(path, spec, bundle, teacher, network)
            reference = running.enter_context(open_runner("eager", network=original, device=where)).run
        score: Score = meant.evaluate(runner.run, batches, spec.input, reference)
        return score


def _on_objects(
    path: Path,
    objects: Objects,
    device: torch.device,
    precision: str,
    network: NetworkName | None,
    normalise: str | None,
    input_shape: tuple[int, ...] | None,
    task: TaskName | None,
) -> tuple[Runner, NetworkSpec, Data]:
    """As `open_file`, with the user's own objects as data.

    Raises:
        SettingsError: the path is an exported file, which does not say how it takes the user's batches.
    """
    if format_of_file(path) is not None:
        raise SettingsError(
            f"{path}: an exported file is measured on a named dataset (--data). On your own objects, compare it "
            "with the student: litdeploy.verify(bundle, data=…)."
        )
    loaded = load(
        path, network=network, normalise=normalise, input_shape=input_shape, input=objects.input_of, task=task
    )
    runner = open_runner("eager", network=loaded, device=device, precision=resolve_precision(precision, device))
    opened = open_objects(objects.store(loaded, evaluation=True), DataSettings(), device, 0)
    return runner, loaded.spec, opened


def teacher_of(
    path: Path, spec: NetworkSpec, bundle: Bundle | None, teacher: str | Path | None, network: NetworkName | None
) -> Network:
    """Load the teacher whose outputs are the reference."""
    if bundle is not None:
        return load_teacher(bundle, bundle.read(), teacher, network)
    if teacher is None:
        raise SettingsError(
            f"{path}: {task_of(spec).makes}, and its outputs are compared with its teacher's, since labels are not "
            "given or do not apply. Give the teacher: --teacher FILE"
        )
    return load(teacher, network=network, input=spec.input, task=spec.task)


def evaluate_retrieval(
    path: str | Path,
    *,
    data: DataSettings | dict[str, Any] | str | None = None,
    batch_size: int = 256,
    device: str = "auto",
    seed: int | None = None,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    task: TaskName | None = None,
) -> tuple[Retrieval, ...]:
    """Measure how well embeddings of test images retrieve training images of their class, by cosine and by L2.

    Args:
        path: weights of a classifier or an embedder, or a bundle, whose student is evaluated.
        others: as for `evaluate`.

    Raises:
        LitdeployError: bad input; see `litdeploy.errors`.
    """
    path, network = published(path, network)
    path, settings, seed = what_on(path, data, seed)
    if format_of_file(path) is not None:
        raise SettingsError(f"--retrieval: {path} outputs logits only. Give the weights that it was exported from.")
    where = resolve_device(device)
    loaded = load(path, network=network, normalise=normalise, input_shape=input_shape, task=task)
    meant = task_of(loaded.spec)
    if not meant.labeled and not meant.embeds:
        raise SettingsError(f"--retrieval: {path} {meant.makes}, and has no embeddings of classes. Leave it out.")
    opened = open_data(settings, where, seed, loaded.spec)
    check_against(opened, loaded.spec, loaded.class_count())
    if not opened.labeled:
        raise DataError(
            f"--retrieval: {opened.source} has no labels, or they are not used, and what is retrieved is judged by its "
            "class. Give --data a dataset with labels (--label-column NAME), or leave --retrieval out."
        )
    module = loaded.module.to(where)
    database, queries = (
        embeddings(module, normalised_batches(split, loaded.spec.input, batch_size), meant)
        for split in (opened.train, opened.test)
    )
    return tuple(retrieval(*database, *queries, metric) for metric in METRICS)


def what_on(
    path: Path, data: DataSettings | dict[str, Any] | str | None, seed: int | None, split: str = "test"
) -> tuple[Path, DataSettings, int]:
    """Resolve the file, the dataset and the seed of its split; a bundle supplies those not given.

    Raises:
        SettingsError: no such split.
        DataError: no dataset is given.
    """
    if split not in SPLITS:
        raise SettingsError(f"--split {split}: no such split. Use one of {', '.join(SPLITS)}.")
    settings = DataSettings(source=data) if isinstance(data, str) else data
    own = carried_by(path, TOKENIZER)
    if is_folder(path):
        bundle = Bundle(path)
        manifest = bundle.read()
        path = bundle.student_path
        seed = manifest.recipe.seed if seed is None else seed
        learned = manifest.recipe.data.model_copy(update={} if own is None else {"tokenizer": str(own)})
        if isinstance(settings, dict):
            settings = learned.merged(settings)
        settings = settings or learned
    if isinstance(settings, dict):
        settings = parse(DataSettings, settings, "command line")
    if own is not None and settings is not None and settings.tokenizer is None:
        settings = settings.model_copy(update={"tokenizer": str(own)})
    if settings is None or settings.source is None:
        raise DataError("no data to evaluate on: give it with --data (a folder, a file, a hub id, or digits).")
    return path, settings, seed or 0


def open_file(
    path: Path,
    device: torch.device,
    precision: str,
    network: NetworkName | None,
    normalise: str | None,
    input_shape: tuple[int, ...] | None,
    task: TaskName | None = None,
) -> tuple[Runner, NetworkSpec, int]:
    """A runner of weights or of an exported file, not yet entered, with its spec and number of classes."""
    name = format_of_file(path)
    if name is None:
        loaded = load(path, network=network, normalise=normalise, input_shape=input_shape, task=task)
        runner = open_runner("eager", network=loaded, device=device, precision=resolve_precision(precision, device))
        return runner, loaded.spec, loaded.class_count()
    found = described(path, device)
    spec = _spec_of(path, found, normalise, input_shape)
    if task not in (None, spec.task_name):
        raise SettingsError(f"--task {task}: {path} was exported with the task {spec.task_name}. Leave --task out.")
    classes = _class_count(path, found, spec)
    return open_runner(FORMATS[name].runner, path=path, device=device), spec, classes


def _class_count(path: Path, file: ExportedFile, spec: NetworkSpec) -> int:
    """Number of classes of an exported file.

    Raises:
        RunnerError: its output does not have the task's shape.
    """
    if file.classes is not None:
        return file.classes
    task, output = task_of(spec), list(file.output_shape)
    classes = task.class_count(output[1:], spec.input)
    if classes is None:
        wanted = ", ".join(str(size) for size in ("N", *task.output_shape(spec.input, "classes")))
        raise RunnerError(f"{path}: outputs {output}, not {task.output} ({wanted}). Export it again.")
    return classes


def _spec_of(path: Path, file: ExportedFile, normalise: str | None, input_shape: tuple[int, ...] | None) -> NetworkSpec:
    """Spec of an exported file, from its metadata and shapes.

    Raises:
        RunnerError: the metadata is damaged.
        SettingsError: the metadata has no normalization, and none is given.
    """
    metadata, stated_shape = file.metadata, file.image_shape
    # Prefer the metadata's shape: a file that takes pixels has channels last.
    stated = {**({} if stated_shape is None else {"input_shape": json.dumps(stated_shape)}), **metadata}
    known = input_of(stated)
    if known is None and ("input" in stated or {"input_shape", "mean", "std"} <= stated.keys()):
        raise RunnerError(f"{path}: its metadata on the input is damaged. Export it again: litdeploy export")
    shape = input_shape or stated_shape
    if known is not None:
        found = known.override(normalise, input_shape, str(path))
    elif normalise is None or shape is None:
        raise SettingsError(
            f"{path}: its metadata lacks the normalization or the size of its images. Give them: --normalise imagenet "
            "--input-shape 3,32,32"
        )
    else:
        shape = image_shape(shape, str(path))
        blank = InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0])
        found = blank.override(normalise, None, str(path))
    meant = read_task(metadata, found, str(path)).name
    names = read_names(metadata, str(path))
    return NetworkSpec(name=path.name, input=found, classes=names, task=None if meant == found.task else meant)
