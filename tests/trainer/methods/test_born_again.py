from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from litdeploy.config.recipe import BornAgainSettings, Phase, Recipe
from litdeploy.errors import SettingsError
from litdeploy.networks import load, new
from litdeploy.storage.checkpoint import read_checkpoint
from litdeploy.storage.records import Accuracy
from litdeploy.trainer import compress
from litdeploy.trainer.feature_cache import FeatureCache, Layout
from litdeploy.trainer.methods import Start
from litdeploy.trainer.methods.born_again import Succession, born_again, born_again_init
from litdeploy.trainer.objectives import Outputs
from tests.trainer.methods.conftest import SECTIONS, MakeRun
from tests.trainer.test_compress import QUICK

FRESH = new("resnet14,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=9).module
PUBLISHED = Recipe(
    method="born-again",
    alpha=0.5,
    temperature=1.0,
    born_again=BornAgainSettings(generations=2),
    main=Phase(epochs=4, learning_rate=0.1),
)


def test_by_kd_the_loss_is_that_of_the_paper() -> None:
    """Equation 3 with labels, up to the factor and the teacher's entropy, of which neither moves the minimum."""
    torch.manual_seed(0)
    logits, teacher, labels = torch.randn(8, 5), torch.randn(8, 5), torch.arange(8) % 5
    found = born_again(PUBLISHED, Start(SECTIONS))[0].objective.losses(Outputs(logits, labels, teacher))["loss"]
    to_labels = -torch.stack([logits[i].log_softmax(0)[labels[i]] for i in range(8)]).mean()
    to_teacher = -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found, (to_labels + to_teacher - entropy) / 2)
    torch.testing.assert_close(to_labels, F.cross_entropy(logits, labels))


def test_generations_share_the_epochs_and_each_but_the_first_succeeds_another() -> None:
    by_kd = born_again(PUBLISHED, Start(SECTIONS))
    assert [(phase.name, phase.settings.epochs) for phase in by_kd] == [("kd-1", 3), ("kd-2", 2)]
    by_lit = born_again(
        Recipe(method="born-again", born_again=BornAgainSettings(generations=3, by="lit")), Start(SECTIONS)
    )
    assert [phase.name for phase in by_lit] == ["lit-1", "lit-2", "lit-3"]
    longer = born_again(
        Recipe(
            method="born-again",
            born_again=BornAgainSettings(generations=2, by="lit"),
            finetune=Phase(epochs=9, learning_rate=0.01),
        ),
        Start(SECTIONS),
    )
    assert [(phase.name, phase.transition is not None) for phase in longer] == [
        ("lit-1", False),
        ("finetune-1", False),
        ("lit-2", True),
        ("finetune-2", False),
    ]
    assert (born_again_init(PUBLISHED), born_again_init(by_recipe("lit"))) == ("scratch", "fresh")


def by_recipe(by: str) -> Recipe:
    return PUBLISHED.with_(born_again={"by": by})


def test_more_generations_than_epochs_are_refused() -> None:
    with pytest.raises(SettingsError, match="--epochs 7, or --generations 5"):
        born_again(PUBLISHED.with_(born_again={"generations": 7}), Start(SECTIONS))


@pytest.mark.parametrize("by", ["kd", "lit"])
def test_a_succession_makes_the_student_the_teacher_and_begins_anew(make_run: MakeRun, by: str) -> None:
    run = make_run(by_recipe(by))
    run.position.validation = Accuracy(top1=0.5, loss=1.0, images=10)
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    expected = run.student.eval()(run.example)
    seeds: list[int] = []

    def fresh(seed: int) -> torch.nn.Module:
        seeds.append(seed)
        return FRESH

    succession = Succession(1, by == "kd", fresh)
    succession.apply(run)
    assert run.teacher is not None
    torch.testing.assert_close(run.teacher(run.example).output, expected, rtol=1e-4, atol=1e-5)
    assert seeds == [1]
    assert torch.equal(run.student.layer1[0].conv1.weight, FRESH.layer1[0].conv1.weight)
    stem = FRESH.conv1.weight if by == "kd" else before["conv1.weight"]
    assert torch.equal(run.student.conv1.weight, stem)
    kept = load(run.folder / "generations" / "1.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in kept.module.state_dict().items())
    # A run that goes on later has the student from its checkpoint, and the teacher from that file.
    later = make_run(by_recipe(by))
    succession.restore(later)
    assert later.teacher is not None
    assert torch.equal(later.teacher(run.example).output, run.teacher(run.example).output)


def test_features_of_one_teacher_do_not_serve_the_next(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(PUBLISHED)
    assert run.teacher is not None
    layout = Layout.of(run.teacher.template, (), ())
    assert layout is not None
    in_memory, in_files = (
        FeatureCache(run.teacher.template, layout, 1, 4, 0, run.device, folder) for folder in (None, tmp_path / "kept")
    )
    for cache, left in ((in_memory, in_memory), (in_files, None)):
        run.cache = cache
        run.cache._filled.fill_(1)
        run.position.validation = Accuracy(top1=0.5, loss=1.0, images=10)
        Succession(1, True, lambda seed: FRESH).apply(run)
        assert run.cache is left
    assert not in_memory._filled.any()
    assert in_files._filled.all()


def test_on_digits(teacher_path: Path, tmp_path: Path) -> None:
    quick = {**QUICK, "student_depth": None, "method": "born-again"}
    two = compress(teacher_path, out=tmp_path / "two", born_again={"generations": 2}, **quick)
    one = compress(teacher_path, out=tmp_path / "one", born_again={"generations": 1}, **{**quick, "epochs": 1})
    manifest = two.read_complete()
    assert manifest.student == load(teacher_path).spec
    assert [line.count('"phase": "kd-') for line in two.metrics_path.read_text().splitlines()] == [1, 1]
    first = read_checkpoint(two.path / "generations" / "1.safetensors")
    assert first.spec == manifest.student
    alone, second = read_checkpoint(one.student_path).weights, read_checkpoint(two.student_path).weights
    assert all(torch.equal(value, alone[name]) for name, value in first.weights.items())
    assert not torch.equal(second["conv1.weight"], first.weights["conv1.weight"])
