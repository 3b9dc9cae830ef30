"""The verb `save_pretrained`: from a bundle to a folder that transformers loads, with a model card."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from litdeploy.exporter.pretrained import TAG, write_pretrained
from litdeploy.networks import Network, NetworkName, load
from litdeploy.networks.embedder import SentenceEmbedder
from litdeploy.profiler import Report, read_report
from litdeploy.storage.bundle import CONFIG, Bundle, carried_by
from litdeploy.storage.records import Manifest


def save_pretrained(
    bundle: Bundle | str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    network: NetworkName | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a bundle's student of transformers as a folder that `from_pretrained` loads with nothing of litdeploy.

    It holds the configuration with the student's depth, weights, tokenizer and a model card. A sentence embedder's
    folder is loaded by `SentenceTransformer` too. What is loaded from it is compared with the student before the folder
    appears, sentences as well if sentence-transformers is installed.

    Args:
        bundle: a bundle, or its folder.
        folder: made; it may be empty.
        overwrite: replace a folder that litdeploy wrote. Others are never replaced.
        network: needed if the student's network is the user's code.
        progress: called with a line about the outcome.

    Returns:
        The folder.

    Raises:
        BundleError: the bundle is incomplete, or the folder holds something that is not to be replaced.
        StudentError: the student is no network of transformers, or its configuration cannot express the kept blocks.
        ParityError: what is loaded from the folder computes something else (exit code 3).
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    manifest = bundle.read_complete()
    place = Path(folder)
    bundle.check_inputs([place])
    student = load(bundle.student_path, network=network)
    report = read_report(bundle.profile_path)
    if report is not None and report.student_sha256 != manifest.student_sha256:
        report = None  # of an earlier student
    card = model_card(manifest, student, report, place.name)
    write_pretrained(student, carried_by(bundle.path, CONFIG), place, card, overwrite)
    if progress is not None:
        progress(f"{place}: written; from_pretrained loads it, and its outputs are the student's")
    return place


def model_card(manifest: Manifest, student: Network, report: Report | None, name: str) -> str:
    """The text of README.md: what the student is, what it learned from, how good and how fast it is.

    Args:
        report: of the student's profile; None if there is none.
        name: of the folder.
    """
    embeds = isinstance(student.module, SentenceEmbedder)
    teacher, published = _public(manifest.teacher.spec.name.removeprefix("hf:"))
    header = [
        "---",
        "# license: the teacher's license applies; name it here",
        f"library_name: {'sentence-transformers' if embeds else 'transformers'}",
        *(["pipeline_tag: sentence-similarity"] if embeds else []),
        *([f"base_model: {teacher}"] if published else []),
        "tags:",
        f"- {TAG}",
        "- knowledge-distillation",
        *(["- sentence-transformers"] if embeds else []),
        "---",
    ]
    plan = student.spec.plan or {}
    kept = [f"- `{path}`: the teacher's blocks {', '.join(map(str, blocks))}" for path, blocks in plan.items()]
    body = [
        f"# {_line(name)}",
        "",
        f"A shallower student of `{teacher}`, made by litdeploy {manifest.litdeploy} (method "
        f"`{manifest.recipe.method}`). Its configuration, weights and tokenizer load with "
        f"`{'SentenceTransformer' if embeds else 'from_pretrained'}`; litdeploy is not needed.",
        "",
        *_embedding(student),
        "## Blocks",
        "",
        *(kept or ["- all of the teacher's blocks"]),
        "",
        "## Training data",
        "",
        f"`{_public(manifest.data.source)[0]}`: "
        + ", ".join(f"{count:,} {split}" for split, count in manifest.data.images.items())
        + f" {manifest.data.noun}s. {manifest.run.epochs} epochs, {manifest.run.seconds / 60:.1f} minutes on "
        f"{_line(manifest.run.device)}.",
        "",
        *_scores(manifest),
        *_speed(report, manifest.teacher.spec.name, teacher),
    ]
    return "\n".join([*header, "", *body]) + "\n"


def _embedding(student: Network) -> list[str]:
    """How a sentence embedder makes its vectors; nothing for another network."""
    if not isinstance(student.module, SentenceEmbedder):
        return []
    made = student.module.embedding
    length = ", of length 1" if made.normalize else ""
    return [
        f"Embeddings are pooled by `{made.pooling}` from the last hidden states{length}. Texts are cut to "
        f"{student.spec.input.shape[0]} tokens, as in the training.",
        "",
    ]


def _scores(manifest: Manifest) -> list[str]:
    teacher, student = (manifest.metrics.get(side, {}) for side in ("teacher", "student"))
    if not student:
        return []
    rows = [
        f"| {split} | {teacher[split].summary() if split in teacher else '–'} | {score.summary()} |"
        for split, score in student.items()
    ]
    return ["## Scores", "", "| split | teacher | student |", "| --- | --- | --- |", *rows, ""]


def _speed(report: Report | None, name: str, public: str) -> list[str]:
    """The speed-ups with their intervals; nothing without a report.

    Args:
        name: of the teacher's network, which the report's verdict may hold with its folder.
        public: in its place.
    """
    if report is None:
        return []
    rows = []
    for each in report.measurements:
        found = each.comparison
        interval = "" if found.speedup_low is None else f" ({found.speedup_low:.2f}–{found.speedup_high:.2f})"
        rows.append(
            f"| {each.runner}, {each.precision} | {each.batch_size} | {each.teacher.median_ms:.2f} ms | "
            f"{each.student.median_ms:.2f} ms | {found.speedup:.2f}×{interval} |"
        )
    return [
        "## Speed",
        "",
        _line(report.verdict.replace(name, public)),
        "",
        "| runner | batch | teacher | student | speed-up (95 % interval) |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]


def _public(name: str) -> tuple[str, bool]:
    """A name without the folders of this machine, and whether it is that of a model in the hub's cache; of another path
    it is the last part."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", name)
    if cached:
        return f"{cached[1]}/{cached[2]}", True
    return _line(Path(name).name if Path(name).is_absolute() else name), False


def _line(text: str) -> str:
    """A text from elsewhere on one line, without what ends a code span."""
    return " ".join(text.replace("`", "'").split())
