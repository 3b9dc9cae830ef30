"""The verb `compress`: from a teacher to a bundle with a trained, shallower student."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from litdeploy.batch import moved
from litdeploy.config.recipe import Recipe
from litdeploy.data import Data, check_against, open_data
from litdeploy.errors import StudentError
from litdeploy.files import sha256_of
from litdeploy.networks import Network, NetworkName
from litdeploy.runtime import resolve_precision
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.storage.records import TeacherRecord
from litdeploy.trainer.chain import Teaching, check_folder, students_of, succession
from litdeploy.trainer.checkpoints import DEFAULT_EVERY, Checkpoints, Every, Saved
from litdeploy.trainer.completion import complete
from litdeploy.trainer.launch import launched
from litdeploy.trainer.metrics import MetricsLog, Progress, check_tensorboard
from litdeploy.trainer.objectives import OBJECTIVES, Start, check_fits
from litdeploy.trainer.optimiser import steps_an_epoch
from litdeploy.trainer.parallel import Ranks, check_recipe
from litdeploy.trainer.resolve import resolve_recipe
from litdeploy.trainer.resume import digest_of, going_on, identity_of
from litdeploy.trainer.run import Position, Run
from litdeploy.trainer.start import add_teacher, begin, keep_teacher, load_teacher, tell_left_out
from litdeploy.trainer.state import position_of


def compress(
    teacher: str | Path | Network,
    *,
    recipe: Recipe | str | Path | None = None,
    out: str | Path = DEFAULT_PATH,
    device: str = "auto",
    network: NetworkName | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: str = DEFAULT_EVERY,
    tensorboard: bool = False,
    feature_cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Bundle:
    """Makes a teacher shallower and trains the result, by LIT unless the recipe says otherwise.

    Where a launcher (torchrun, srun) started several processes, each calls this: they train together, and the first
    writes the bundle.

    Args:
        teacher: a file of weights, a folder as transformers saves a network in, or a network that was loaded. Left as
            it is.
        recipe: a recipe, or the name or path of one; None: the defaults.
        out: folder that becomes the bundle.
        device: `auto`, `cpu`, `cuda` or `cuda:i`; of several processes on a machine, `cuda` gives each its own.
        network: the teacher's network, where its file does not tell: see `networks.load`.
        overwrite: replace another run in `out`.
        resume: go on with the run in `out` from its newest whole checkpoint, on the CPU to the very same student; begin
            where there is none, and do nothing where it is complete.
        checkpoint_every: how often one is written under `out/checkpoints`: `10min`, `1epoch`, `500steps`, several with
            commas between, or `off`. A complete run leaves none.
        tensorboard: write the metrics for TensorBoard too, under `out/tensorboard`.
        feature_cache_dir: folder in which the teacher's features are kept for further students of the same teacher and
            data; None: they are not kept beyond this run.
        progress: told of every epoch.
        **changes: fields of the recipe, over what it says: `student_depth=20`, `data="digits"`, `epochs=5`. With
            several depths, `student_depth=(17, 9)`, each student is the next one's teacher; `out` becomes the last
            one's bundle, and `out/chain/DEPTH` those of the others.

    Returns:
        The bundle, complete.

    Raises:
        LitdeployError: one of its kinds, before anything is written.
        InterruptedRun: the user interrupted the training (Ctrl-C, SIGTERM); the bundle says so and holds the weights so
            far, and a checkpoint.
    """
    resolved = resolve_recipe(recipe, changes)
    every = Every.parse(checkpoint_every)
    launch = launched()
    where = launch.device(device)
    ranks = launch.join(where)
    progress = progress if progress is not None and ranks.first else Progress()
    if tensorboard:
        check_tensorboard()
    loaded, record = load_teacher(teacher, resolved, network)
    if loaded.spec.plan is not None:
        raise StudentError(
            f"{loaded.source} is a student already. Compress its teacher to the depth that is wanted, step by step if "
            "that serves: --student-depth 17,9"
        )
    students = students_of(loaded, resolved)
    begun = begin(loaded, students[0], network, where)
    check_recipe(resolved, ranks, begun[1].sections, feature_cache_dir is not None)
    data = _open(students[0], loaded, begun[1], where, progress)
    bundle = Bundle(out)
    shared = _Shared(
        loaded=loaded,
        record=record,
        data=data,
        precision=resolve_precision(resolved.precision, where),
        device=where,
        discriminator=None if resolved.discriminator is None else sha256_of(Path(resolved.discriminator)),
        ranks=ranks,
        progress=progress,
        every=every,
        resume=resume,
        tensorboard=tensorboard,
        features=None if feature_cache_dir is None else Path(feature_cache_dir),
    )
    with ExitStack() as held:
        inputs = (
            None if isinstance(teacher, Network) else teacher,
            recipe if isinstance(recipe, str | Path) else None,
            resolved.data.source,
            resolved.data.tokenizer,
            resolved.discriminator,
            feature_cache_dir,
        )
        ranks.on_first(bundle.check_inputs, inputs)
        ranks.on_first(_enter, held, bundle, overwrite, resume, resolved.depths)
        teaching = Teaching(loaded, record)
        for student, following in pairwise(students):
            into = bundle.in_chain(student.depths[-1])
            ranks.on_first(_enter, held, into, False, resume)
            progress.note(f"{into.path}: a student of depth {student.depths[-1]}, which teaches the next")
            _train(shared, into, student, teaching, begun)
            manifest = ranks.on_first(into.read_complete)
            teaching = succession(teaching, begun[0], str(into.student_path), manifest)
            begun = begin(teaching.network, following, network, where)
        _train(shared, bundle, students[-1], teaching, begun)
    return bundle


@dataclass(frozen=True)
class _Shared:
    """What all students of a call have in common; `loaded` and `record` are those of the teacher that was given."""

    loaded: Network
    record: TeacherRecord | None
    data: Data
    precision: str
    device: torch.device
    discriminator: str | None
    ranks: Ranks
    progress: Progress
    every: Every
    resume: bool
    tensorboard: bool
    features: Path | None


def _open(recipe: Recipe, teacher: Network, start: Start, device: torch.device, progress: Progress) -> Data:
    """The data, held against the teacher and the recipe before anything is written."""
    phases = OBJECTIVES[recipe.method].phases(recipe, start)
    data = open_data(recipe.data, device, recipe.seed, teacher.spec)
    check_against(data, teacher.spec, teacher.class_count())
    tell_left_out(data, progress.note)
    steps_an_epoch(data.train, recipe.batch_size)
    check_fits(phases, teacher, recipe.method)
    return data


def _train(shared: _Shared, bundle: Bundle, recipe: Recipe, teaching: Teaching, begun: tuple[Network, Start]) -> None:
    """Trains one student, or what is left to train of it, and completes its bundle."""
    ranks, note = shared.ranks, shared.progress.note
    identity = ranks.on_first(
        identity_of,
        shared.loaded,
        shared.record,
        begun[0].spec.plan,
        recipe,
        shared.data,
        shared.precision,
        shared.device,
        ranks,
        teaching.lineage,
        shared.discriminator,
    )
    checkpoints = Checkpoints(bundle.checkpoints_path, identity, shared.every, note)
    done, saved = ranks.on_first(going_on, bundle, checkpoints, identity, note) if shared.resume else (False, None)
    if done:
        return
    record = teaching.record or ranks.on_first(keep_teacher, bundle, shared.loaded)
    metrics = bundle.metrics_path if ranks.first else Path(os.devnull)
    events = bundle.path / "tensorboard" if shared.tensorboard and ranks.first else None
    position = Position() if saved is None else position_of(saved)
    with MetricsLog(metrics, events, position.rows) as log, _own_folder(bundle) as folder:
        run = _run(shared, bundle, recipe, begun, log, checkpoints, saved, position)
        digest, kept = record.sha256, shared.features
        if teaching.lineage:
            digest = digest_of(teaching.network)
            kept = kept and kept / digest[:16]  # what is kept is of one teacher
        add_teacher(run, teaching.network, begun[1], digest, kept or folder, kept is not None)
        complete(bundle, run, shared.loaded, replace(teaching, record=record))


def _run(
    shared: _Shared,
    bundle: Bundle,
    recipe: Recipe,
    begun: tuple[Network, Start],
    log: MetricsLog,
    checkpoints: Checkpoints,
    saved: Saved | None,
    position: Position,
) -> Run:
    student, start = begun
    return Run(
        student=student.module.to(shared.device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        teacher=None,
        phases=[phase for phase in OBJECTIVES[recipe.method].phases(recipe, start) if phase.settings.epochs],
        sections=start.sections,
        data=shared.data,
        spec=student.spec.with_(classes=shared.data.classes),
        input=shared.loaded.spec.input,
        recipe=recipe,
        precision=shared.precision,
        device=shared.device,
        folder=bundle.path,
        log=log,
        progress=shared.progress,
        example=moved(shared.loaded.example(), shared.device),
        discriminator=shared.discriminator,
        ranks=shared.ranks,
        checkpoints=checkpoints,
        saved=saved,
        position=position,
    )


def _enter(held: ExitStack, bundle: Bundle, overwrite: bool, resume: bool, depths: tuple[int, ...] = ()) -> None:
    held.enter_context(bundle.lock())
    if resume:
        check_folder(bundle, depths)
    if not resume or not bundle.exists():
        bundle.claim(overwrite)


@contextmanager
def _own_folder(bundle: Bundle) -> Iterator[Path]:
    """A folder of the bundle for features that need not outlive the run."""
    folder = bundle.path / "features"
    yield folder
    # A run that did not come this far may be gone on with.
    bundle.remove_features()
