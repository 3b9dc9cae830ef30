"""The verb `compress`: from a teacher to a bundle with a trained, shallower student."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from litdeploy.config.recipe import Recipe
from litdeploy.data import Data, ObjectStore, check_against, given_objects, open_data, open_objects, prepared
from litdeploy.files import sha256_of
from litdeploy.networks import FAMILIES, Network, NetworkName, Section, is_hub, sections_of
from litdeploy.networks.hub import write_configuration
from litdeploy.networks.network import channels_last
from litdeploy.networks.student import block_influence, depth_of
from litdeploy.runtime import device_name, resolve_precision
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle, remove_files
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.records import CUT, Ancestor, Manifest, RunRecord, Score, TeacherRecord
from litdeploy.tasks import task_of
from litdeploy.trainer.distributed import Ranks, check_recipe, launched
from litdeploy.trainer.feature_cache import AUTO_VIEWS, FeatureCache, Layout, plan_cache
from litdeploy.trainer.functions import OwnLoss, OwnMetric, own_functions
from litdeploy.trainer.identity import digest_of, identity_of
from litdeploy.trainer.methods import TrainingPhase
from litdeploy.trainer.optimizer import steps_per_epoch, with_optimizer
from litdeploy.trainer.plan import Plan, chain_of, check_objectives, plan_run
from litdeploy.trainer.progress import Callback, callbacks_of
from litdeploy.trainer.resolve import fitted, resolve_recipe
from litdeploy.trainer.resume import (
    DEFAULT_EVERY,
    Checkpoints,
    Every,
    check_chain,
    find_snapshot,
)
from litdeploy.trainer.step import compiles_teacher, fallback, forward_flops, inputs_needed, outputs_needed
from litdeploy.trainer.teacher import Features, Teacher, load_student, read_teacher
from litdeploy.trainer.trackers import TensorBoard
from litdeploy.trainer.trainer import Trainer
from litdeploy.trainer.validation import evaluate
from litdeploy.version import __version__

_MOST_SHOWN = 10
# Samples on which the influence of blocks is measured: their mean changes little with more.
_MEASURED = 256


def compress(
    teacher: str | Path | Network | nn.Module,
    *,
    data: Any = None,
    val_data: Any = None,
    loss: OwnLoss | None = None,
    metric: OwnMetric | None = None,
    recipe: Recipe | str | Path | None = None,
    out: str | Path = DEFAULT_PATH,
    device: str = "auto",
    network: NetworkName | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: str = DEFAULT_EVERY,
    tensorboard: bool = False,
    feature_cache_dir: str | Path | None = None,
    progress: Callback | bool = True,
    callbacks: Sequence[Callback] = (),
    **changes: Any,
) -> Bundle:
    """Make a teacher shallower and train the result, by LIT unless the recipe names another method.

    If a launcher (torchrun, srun) started several processes, each calls this: they train together, and the first one
    writes the bundle.

    Args:
        teacher: a file of weights, a folder saved by transformers, or a loaded network or a module, which are not
            modified.
        data: name of a dataset, a dict of `DataSettings`, or your own: a map-style Dataset or arrays (X, y), each
            sample of which is read once; or a DataLoader or another iterable of batches with a length, which is
            streamed, with its own order, batch size and augmentation. A sample or batch is a tensor, (input, label),
            the inputs in forward's order, or a dict of forward's parameters and `labels`. None: the recipe's.
        val_data: the same, for the validation and the test split; None: they are held out of `data`.
        loss: `loss(student_output, teacher_output, batch)`, a scalar tensor, in the place of the task's loss (L_KD);
            the batch is one of `data`, of named data (inputs, labels).
        metric: `metric(output, batch)`, a number that is larger for a better network, in the place of the task's; the
            mean over the samples is reported. Files of functions have no place in a bundle: it records their names.
        recipe: a recipe, or its name or path; None: the defaults.
        out: folder that becomes the bundle.
        device: `auto`, `cpu`, `cuda` or `cuda:i`; with several processes on a machine, `cuda` gives each its own.
        network: the teacher's network, if its file does not identify it: see `networks.load`.
        overwrite: replace another run in `out`.
        resume: resume the run in `out` from its newest intact checkpoint, on a CPU to the same bits; start if there is
            none, and do nothing if it is complete.
        checkpoint_every: how often to write a checkpoint under `out/checkpoints`: `10min`, `1epoch`, `500steps`,
            several separated by commas, or `off`. A complete run leaves none.
        tensorboard: write the metrics for TensorBoard too, under `out/tensorboard`; as the callback `TensorBoard`.
        feature_cache_dir: folder in which to keep the teacher's features for further students of the same teacher and
            data; None: do not keep them beyond this run.
        progress: show a bar in a terminal or notebook and a line an epoch; False: show nothing. Or a callback to use
            in its place.
        callbacks: further ones: subclasses of `Callback`, or trackers (`litdeploy.trainer.trackers`).
        **changes: fields of the recipe that replace its values: `student_depth=20`, `data="digits"`, `epochs=5`. With
            several depths, `student_depth=(17, 9)`, each student teaches the next; `out` becomes the last one's
            bundle, and `out/chain/DEPTH` those of the others.

    Returns:
        The bundle, complete.

    Raises:
        LitdeployError: one of its kinds, before anything is written.
        InterruptedRun: the user interrupted the training (Ctrl-C, SIGTERM); the bundle says so and holds the present
            weights, and a checkpoint.
    """
    objects = given_objects(data, val_data)
    resolved = resolve_recipe(recipe, {**changes, "data": data}, objects is None)
    every = Every.parse(checkpoint_every)
    launch = launched()
    place = launch.device(device)
    ranks = launch.join(place)
    watched = [*callbacks, TensorBoard()] if tensorboard else callbacks
    watching = callbacks_of(progress, watched) if ranks.first else Callback()
    loaded, record = read_teacher(teacher, resolved, network, None if objects is None else objects.input_of)
    store = None if objects is None else objects.store(loaded)
    resolved = store.adapted(resolved, ranks.size) if store else resolved
    data, resolved = _open(resolved, loaded, place, watching, store)
    recipes = chain_of(loaded, resolved)
    influence = partial(_influence, data, place)
    own = own_functions(loss, metric, loaded, store)
    plan = plan_run(loaded, recipes[0], network, place, influence, own)
    check_recipe(resolved, ranks, plan.trained, feature_cache_dir is not None)
    _check_data(data, plan, loaded, watching)
    compression = _Compression(
        given=loaded,
        record=record,
        data=data,
        device=place,
        precision=resolve_precision(resolved.precision, place),
        ranks=ranks,
        progress=watching,
        every=every,
        resume=resume,
        features=None if feature_cache_dir is None else Path(feature_cache_dir),
    )
    bundle = Bundle(out)
    with ExitStack() as held:
        inputs = (
            teacher if isinstance(teacher, str | Path) else None,
            recipe if isinstance(recipe, str | Path) else None,
            resolved.data.source,
            resolved.data.tokenizer,
            resolved.discriminator,
            feature_cache_dir,
        )
        ranks.on_first(bundle.check_inputs, inputs)
        ranks.on_first(_enter, held, bundle, overwrite, resume, resolved.depths)
        for number, student in enumerate(recipes):
            last = student is recipes[-1]
            target = bundle if last else bundle.in_chain(student.depths[-1])
            if number:
                plan = plan_run(compression.teacher, student, network, place, influence, own)
            if not last:
                ranks.on_first(_enter, held, target, False, resume)
                watching.note(f"{target.path}: a student of depth {student.depths[-1]}, which teaches the next")
            with compression.training(plan, target) as trainer:
                if trainer is not None:  # None: trained already
                    trainer.fit()
            if not last:
                compression.succeed(plan, target)
    return bundle


def _open(
    recipe: Recipe, teacher: Network, device: torch.device, progress: Callback, store: ObjectStore | None = None
) -> tuple[Data, Recipe]:
    """Open the data, and adapt the recipe to them."""
    if store is None:
        data = open_data(recipe.data, device, recipe.seed, teacher.spec)
    else:
        recipe = store.adapted(recipe)
        data = open_objects(store, recipe.data, device, recipe.seed)
        for line in store.notes():
            progress.note(line)
    return data, with_optimizer(fitted(recipe, data, progress.note), teacher.module, progress.note)


def _check_data(data: Data, plan: Plan, teacher: Network, progress: Callback) -> None:
    """Check the data against teacher and plan, before anything is written."""
    check_against(data, teacher.spec, teacher.class_count())
    show_left_out(data, progress)
    steps_per_epoch(data.train, plan.recipe.batch_size)
    check_objectives(plan, teacher, data.labeled)


def _influence(
    data: Data, device: torch.device, teacher: Network, sections: Sequence[Section]
) -> dict[str, tuple[float, ...]]:
    """The influence of the blocks of a teacher's sections, on training samples that are not augmented."""
    check_against(data, teacher.spec, teacher.class_count())
    rows = torch.linspace(0, len(data.train) - 1, min(len(data.train), _MEASURED)).round().long()
    picks = data.train.pick(torch.split(rows, _MEASURED // 8))
    batches = (prepared(picked.images(), teacher.spec.input, picked.labels_N) for picked in picks)
    return block_influence(copy.deepcopy(teacher.module).eval().to(device), sections, batches)


def show_left_out(data: Data, progress: Callback) -> None:
    """Show which images are left out because they cannot be decoded.

    Raises:
        DataError: they are more than the recipe allows.
    """
    faults = data.left_out()
    for why in faults[:_MOST_SHOWN]:
        progress.note(f"warning: left out: {why}")
    if len(faults) > _MOST_SHOWN:
        progress.note(f"warning: left out: {len(faults) - _MOST_SHOWN} more {data.noun}s")


def _enter(held: ExitStack, bundle: Bundle, overwrite: bool, resume: bool, depths: tuple[int, ...] = ()) -> None:
    held.enter_context(bundle.lock())
    if resume:
        check_chain(bundle, depths)
    if not resume or not bundle.exists():
        bundle.claim(overwrite)


@dataclass
class _Compression:
    """What the students of a call share, and their teacher: the given one, then each student of a chain.

    Attributes:
        given: the teacher that was given; every student of a chain is measured against it.
        record: of `given`; None: it came from no file and is not written yet.
        features: folder of features to keep for further students; None: keep none.
        teacher: of the next student.
        lineage: from `given` to `teacher`; empty if they are the same.
        scores: of `given`, split → score, if measured.
    """

    given: Network
    record: TeacherRecord | None
    data: Data
    device: torch.device
    precision: str
    ranks: Ranks
    progress: Callback
    every: Every
    resume: bool
    features: Path | None
    lineage: tuple[Ancestor, ...] = ()
    scores: dict[str, Score] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.teacher = self.given

    @contextmanager
    def training(self, plan: Plan, bundle: Bundle) -> Iterator[Trainer | None]:
        """A Trainer for a student; when it has trained, its bundle is completed. None if it is complete already.

        Raises:
            LitdeployError: as `Trainer.fit`.
            InterruptedRun: the user stopped it; the bundle says so and holds the present weights.
        """
        ranks, note = self.ranks, self.progress.note
        discriminator = None if plan.recipe.discriminator is None else sha256_of(Path(plan.recipe.discriminator))
        identity = ranks.on_first(
            identity_of,
            self.given,
            self.record,
            plan.student.spec.plan,
            plan.recipe,
            self.data,
            self.precision,
            self.device,
            ranks,
            self.lineage,
            discriminator,
        )
        identity |= {} if plan.functions is None else {"functions": plan.functions.names}
        checkpoints = Checkpoints(bundle.checkpoints_path, identity, self.every, note)
        done, saved = (
            ranks.on_first(find_snapshot, bundle, checkpoints, identity, note) if self.resume else (False, None)
        )
        if done:
            yield None
            return
        record = self.record or ranks.on_first(self._keep_teacher, bundle)
        with Trainer(
            plan,
            self.data,
            self.precision,
            self.device,
            bundle.path,
            bundle.metrics_path,
            self.progress,
            ranks,
            checkpoints,
            saved,
        ) as trainer:
            self._add_teacher(trainer, plan, record.sha256, bundle.path / "features")
            scores = {"teacher": dict(self.scores)}
            write = partial(self._write, bundle, trainer, record, discriminator, scores)
            with trainer.resumable(bundle.path, partial(self._keep_interrupted, trainer, write)):
                # Not the trainer's teacher, which may be in bf16 and whose batch norms are folded.
                given = channels_last(copy.deepcopy(self.given.module).to(self.device))
                if self._compares(plan):
                    trainer.reference = given.eval()
                elif not self.lineage:
                    scores["teacher"]["validation"] = ranks.on_first(self._validate_teacher, trainer, given)
                yield trainer
                note("testing teacher and student on the test split, once")
                scores["student"] = {"test": ranks.on_first(self._test, trainer, trainer.student)}
                if trainer.reference is not None and task_of(self.given.spec).samples:
                    ranks.on_first(self._draw_samples, bundle, trainer, trainer.reference)
                elif trainer.reference is None and not self.lineage:
                    scores["teacher"]["test"] = ranks.on_first(self._test, trainer, given)
                warnings = trainer.selection.warnings(trainer.recipe, self.data, scores["teacher"].get("validation"))
                for text in warnings:
                    note(f"warning: {text}")
                with trainer.interruption.held():
                    ranks.on_first(write, "complete", warnings)
        # The features of a run that did not come this far may be needed to resume it.
        remove_files(bundle.path / "features", "features")

    def _compares(self, plan: Plan) -> bool:
        """Whether the metric compares the student's outputs with its teacher's."""
        own = plan.functions is not None and plan.functions.measures
        return not own and task_of(self.given.spec).needs_teacher(self.data.labeled)

    def succeed(self, plan: Plan, bundle: Bundle) -> None:
        """Make the student in a complete bundle the teacher of the next one."""
        manifest = self.ranks.on_first(bundle.read_complete)
        if not self.lineage:
            deepest = depth_of(FAMILIES.get(plan.student.spec.name), sections_of(self.teacher))
            teacher = manifest.teacher.sha256, manifest.metrics["teacher"]
            self.lineage = (Ancestor(depth=deepest, sha256=teacher[0], metrics=teacher[1]),)
        own = Ancestor(
            depth=manifest.recipe.depths[-1], sha256=manifest.student_sha256, metrics=manifest.metrics["student"]
        )
        path = str(bundle.student_path)
        module = load_student(plan.student.module, path, plan.student.spec.name)
        self.teacher = Network(module, manifest.student, path)
        self.record, self.lineage = manifest.teacher, (*self.lineage, own)
        self.scores = dict(manifest.metrics["teacher"])

    def _keep_teacher(self, bundle: Bundle) -> TeacherRecord:
        """Write a teacher that came from no file next to its student, so that later stages find it."""
        sha256 = write_checkpoint(bundle.teacher_path, self.given.module.state_dict(), self.given.spec)
        return TeacherRecord(path=str(bundle.teacher_path.resolve()), sha256=sha256, spec=self.given.spec)

    def _add_teacher(self, trainer: Trainer, plan: Plan, digest: str, folder: Path) -> None:
        """Give the trainer its frozen teacher, and a feature cache if one is planned.

        Args:
            digest: SHA-256 of the given teacher.
            folder: of features that are not kept beyond the run.

        Raises:
            TrainingError: see `plan_cache` and `FeatureCache`.
        """
        taught = [phase for phase in trainer.phases if phase.objective.needs_teacher]
        if not taught:
            return
        recipe, images, keep = plan.recipe, len(self.data.train), self.features is not None
        if self.lineage:
            digest = digest_of(self.teacher)
        if self.features is not None:  # a folder holds features of one teacher
            folder = self.features / digest[:16] if self.lineage else self.features
        # After a transition another teacher may follow, with its own features and compiled form.
        epochs = sum(phase.settings.epochs for phase in takewhile(lambda phase: phase.transition is None, taught))
        share = images if recipe.parallel == "sections" else images / self.ranks.size
        example = self.teacher.example()
        trainer.teacher = Teacher(
            self.teacher.module,
            plan.teacher_sections,
            example,
            self.device,
            self.precision,
            compiles_teacher(recipe.compile, epochs * share * forward_flops(self.teacher.module, example), self.device),
            fallback(recipe.compile, trainer.note),
            called=plan.called,
            task=self.teacher.spec.task_name,
        )
        template = trainer.teacher.template
        layout = _layout(trainer, template, taught, keep)
        # A resumed run keeps its views, whatever memory there is now.
        setting = recipe.feature_cache if trainer.saved is None else trainer.saved.views() or "off"
        # A text is the same each time, and so is a sample of the user's.
        views = AUTO_VIEWS if trainer.input.images and not self.data.given else 1
        decision = plan_cache(
            setting, layout, images, epochs, self.device, folder, keep, self.ranks.size, views, self.data.noun
        )
        trainer.note(decision.why)
        if not decision.views or layout is None:
            return
        key = {
            "teacher": digest,
            "data": self.data.record().fingerprint,
            "data_settings": recipe.data.model_dump(
                mode="json", exclude={"source", "workers", "resident", "tokenizer", "labels"}
            ),
            **({} if self.data.tokens is None else {"tokenizer": self.data.tokens.fingerprint}),
            **({} if self.data.labeled else {"labeled": False}),  # they decide what is held out
            "held_out_by_seed": recipe.seed,
            "input": trainer.input.model_dump(mode="json"),
            "augmentation": recipe.augmentation.model_dump(mode="json"),
            "precision": self.precision,
        }
        kept = folder if decision.mapped else None
        padding = recipe.augmentation.padding or 0
        trainer.cache = FeatureCache(template, layout, decision.views, images, padding, self.device, kept, key)

    def _validate_teacher(self, trainer: Trainer, teacher: nn.Module) -> Score:
        own = trainer.functions
        found = evaluate(teacher, self.data.validation, trainer.spec, self.precision, functions=own)
        trainer.note(f"teacher: {found.summary()} on {found.images} validation {self.data.noun}s")
        chance = task_of(trainer.spec).chance(found, len(self.data.classes))
        if chance is not None:
            trainer.note(
                f"warning: that is hardly better than guessing ({chance:.0%}). Is the input the teacher's own (now "
                f"{trainer.input.summary()}; of images --normalise), and are these the classes it was trained on?"
            )
        return found

    def _test(self, trainer: Trainer, module: nn.Module) -> Score:
        split, own = self.data.test, trainer.functions
        return evaluate(module, split, trainer.spec, "fp32", trainer.reference, functions=own)

    def _draw_samples(self, bundle: Bundle, trainer: Trainer, teacher: nn.Module) -> None:
        task, split = task_of(trainer.spec), self.data.test
        count = min(task.samples, len(split))
        [picked] = split.pick([torch.arange(count) * len(split) // count])
        inputs, labels_N = prepared(picked.images(), trainer.input, picked.labels_N), picked.labels_N
        drawn = task.write_samples(
            bundle.samples_path, teacher, trainer.student, inputs, labels_N, trainer.input, self.data.classes
        )
        trainer.note(f"{bundle.samples_path}: drawn" if drawn else "no sample sheet: it needs Pillow")

    def _keep_interrupted(self, trainer: Trainer, write: partial[None]) -> None:
        """Write an interrupted run's bundle. A run that was not restored yet has the weights that it began with."""
        if self.ranks.first and trainer.saved is None and not trainer.interruption.twice:
            if trainer.trained:
                trainer.checkpoint(in_phase=False)
            write("interrupted")

    def _write_carried(self, trainer: Trainer, folder: Path) -> None:
        """Write the configuration and tokenizer that rebuild the student: later stages need no other folder."""
        if is_hub(trainer.spec.name):
            write_configuration(trainer.student, trainer.spec.name, folder)
        if self.data.tokens is not None:
            self.data.tokens.save(folder)

    def _write(
        self,
        bundle: Bundle,
        trainer: Trainer,
        record: TeacherRecord,
        discriminator: str | None,
        scores: dict[str, dict[str, Score]],
        status: Literal["complete", "interrupted"],
        warnings: tuple[str, ...] = (),
    ) -> None:
        """Write the weights first, the manifest that names them last; remove the checkpoints of a complete run."""
        bundle.manifest_path.unlink(missing_ok=True)  # of an earlier interruption; it names other weights
        position = trainer.position
        carried = bundle.carry(partial(self._write_carried, trainer))
        sha256 = write_checkpoint(bundle.student_path, trainer.student.state_dict(), trainer.spec)
        metrics = {"teacher": scores["teacher"]} if status == "interrupted" else scores
        if position.validation is not None:
            metrics = {**metrics, "student": {"validation": position.validation, **metrics.get("student", {})}}
        if position.cut is not None:
            metrics = {**metrics, CUT: {"validation": position.cut}}
        run = RunRecord(
            started=position.started,
            seconds=round(trainer.elapsed, 3),
            images_per_second=round(position.images_done / max(position.training_seconds, 1e-9), 1),
            epochs=position.epochs_done,
            device=device_name(self.device),
            precision=self.precision,
            versions={"python": platform.python_version(), "torch": torch.__version__},
            ranks=self.ranks.size,
            delivered=trainer.selection.delivered if status == "complete" else None,
        )
        bundle.write(
            Manifest.model_validate(
                {
                    "litdeploy": __version__,
                    "status": status,
                    "teacher": record,
                    "lineage": self.lineage,
                    "student": trainer.spec,
                    "student_sha256": sha256,
                    "carried": carried,
                    "discriminator_sha256": discriminator,
                    "recipe": trainer.recipe,
                    "data": self.data.record(),
                    "functions": {} if trainer.functions is None else trainer.functions.names,
                    "run": run,
                    "metrics": metrics,
                    "warnings": warnings,
                }
            )
        )
        if status == "complete":
            trainer.checkpoints.clear()


def _layout(trainer: Trainer, template: Features, taught: Sequence[TrainingPhase], keep: bool) -> Layout | None:
    """Which of the teacher's features to cache; None if they cannot be.

    A network that takes several tensors may pass the others on to its sections, such as an attention mask. They are
    computed again for each batch if that is possible without running the blocks; else the sections' inputs are not
    cached either. Positions of padding are kept and learned like the others: a section's loss is a mean over all of
    them.
    """
    needed: set[str] = set().union(*(inputs_needed(phase.objective, trainer.sections) for phase in taught))
    several = len(trainer.input.tensors) > 1
    if not task_of(trainer.spec).repeats:
        return None
    assert trainer.teacher is not None
    recomputed = bool(needed or keep) and trainer.teacher.recomputes(trainer.example)
    if several and needed and not recomputed:
        return None
    # For further students keep everything: their method may be another.
    names = {section.name for section in trainer.sections}
    inputs = names if keep and (recomputed or not several) else needed
    outputs = names if keep else set().union(*(outputs_needed(phase.objective) for phase in taught))
    return Layout.of(template, inputs, outputs, recomputed)
