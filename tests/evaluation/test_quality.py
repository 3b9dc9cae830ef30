from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy import linalg
from torch import Tensor, nn

from litdeploy.config.spec import InputSpec
from litdeploy.errors import CheckpointError, DataError, DependencyError, RunnerError, SettingsError
from litdeploy.evaluation import evaluate_quality
from litdeploy.evaluation import quality as module
from litdeploy.evaluation.quality import Judge, Quality, open_features
from litdeploy.networks import new
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import write_checkpoint

HALF = InputSpec(shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
CPU = torch.device("cpu")


def judged(real: Tensor, made: Tensor, logits: Tensor | None = None) -> Quality:
    judge = Judge()
    for batch in real.split(300):
        judge.real(batch)
    for features, scores in zip(
        made.split(300), (torch.zeros(len(made), 2) if logits is None else logits).split(300), strict=True
    ):
        judge.made(features, scores)
    return judge.found()


def classifier(folder: Path, channels: int = 3) -> Path:
    made = new(
        "resnet8,width=2",
        normalise="imagenet" if channels == 3 else "half",
        input_shape=(channels, 16, 16),
        classes=3,
        seed=1,
    )
    write_checkpoint(folder / "judge.safetensors", made.module.state_dict(), made.spec.with_(classes=("a", "b", "c")))
    return folder / "judge.safetensors"


def test_equal_images_are_at_no_distance() -> None:
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert judged(features, features).fid == pytest.approx(0, abs=1e-9)
    few = features[:4]  # singular
    assert judged(few, few).fid == pytest.approx(0, abs=1e-5)


def test_shifted_features_are_at_the_length_of_the_shift() -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 0.0, -4.0, 0.0])
    assert judged(features, features + shift).fid == pytest.approx(25, rel=1e-5)


def test_as_by_the_closed_form() -> None:
    """Of two normal distributions: |μ − ν|² + tr(Σ + Τ − 2 √(Σ Τ)), the root by scipy."""
    generator = torch.Generator().manual_seed(0)
    real, made = (
        torch.randn(700, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + shift for shift in (0, 1)
    )
    between = (real.double().mean(0) - made.double().mean(0)).square().sum().item()
    first, second = (each.double().T.cov() for each in (real, made))
    root = torch.from_numpy(linalg.sqrtm((first @ second).numpy()).real)
    expected = between + (first + second - 2 * root).trace().item()
    assert expected > 1
    assert judged(real, made).fid == pytest.approx(expected, rel=1e-6)


def test_the_inception_score_is_of_what_is_told_apart() -> None:
    features = torch.zeros(12, 2)
    sure = 100 * nn.functional.one_hot(torch.arange(12) % 3).float()
    assert judged(features, features, sure).inception_score == pytest.approx(3)
    assert judged(features, features, sure[:1].repeat(12, 1)).inception_score == pytest.approx(1)
    unsure = torch.tensor([[0.0, 1.0], [2.0, 0.5], [0.3, 0.1]]).repeat(4, 1)
    shares = unsure.softmax(1)
    expected = (shares * (shares / shares.mean(0)).log()).sum(1).mean().exp().item()
    found = judged(features, features, unsure)
    assert (found.inception_score, found.inception_score_std) == (pytest.approx(expected), None)
    assert found.summary() == f"FID 0.0000, Inception score {expected:.2f}"


def test_many_images_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALLEST_PART", 5)
    logits = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first, again = (judged(torch.zeros(60, 2), torch.zeros(60, 2), logits) for _ in range(2))
    assert first == again
    assert first.inception_score_std
    assert torch.equal(torch.get_rng_state(), state)


def test_images_are_judged_as_they_would_be_saved(tmp_path: Path) -> None:
    """The generator's normalisation is undone, values are rounded and cut, and the judge's own is applied."""
    path = classifier(tmp_path)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = (pixels / 255 - 0.5) / 0.5
    spec = module.load(path).spec.input
    assert isinstance(spec, InputSpec)
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (spec.mean, spec.std))
    network = module.load(path).module
    with open_features(str(path), HALF, CPU) as features, torch.no_grad():
        vectors, logits = features(images)
        torch.testing.assert_close(logits, network((pixels / 255 - mean) / std))
        assert vectors.shape == (4, 8)
        white = features(torch.ones(1, 3, 16, 16))[0]
        assert torch.equal(features(torch.full((1, 3, 16, 16), 1.7))[0], white)
        assert torch.equal(features(torch.full((1, 3, 16, 16), 0.999))[0], white)
        with pytest.raises(RunnerError, match="generated images that are not finite"):
            features(torch.full((1, 3, 16, 16), float("nan")))


def test_what_cannot_judge(tmp_path: Path) -> None:
    path = classifier(tmp_path)
    with (
        pytest.raises(SettingsError, match="takes images of 3 × 16 × 16, but the generated ones have 3 × 32 × 32"),
        open_features(str(path), HALF.model_copy(update={"shape": (3, 32, 32)}), CPU),
    ):
        pass
    grey = InputSpec(shape=(1, 16, 16), mean=(0.5,), std=(0.5,))
    for name in (str(path), "inception"):
        with pytest.raises(SettingsError, match="the generated ones have 1 × 16 × 16"), open_features(name, grey, CPU):
            pass


def test_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(DependencyError, match=r"litdeploy\[quality\]"):
        Judge()


def test_inception_is_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with (
        pytest.raises(DependencyError, match="pip install torch-fidelity torchvision"),
        open_features("inception", HALF, CPU),
    ):
        pass
    fidelity = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fidelity.FeatureExtractorInceptionV3 = nn.Identity  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, fidelity.__name__, fidelity)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DataError, match="nothing is downloaded"), open_features("inception", HALF, CPU):
        pass
    place = tmp_path / "checkpoints" / module._INCEPTION_FILE
    place.parent.mkdir()
    place.write_bytes(b"hello, world\n" * 50)
    with pytest.raises(CheckpointError, match="not a checkpoint"), open_features("inception", HALF, CPU):
        pass


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained classifier of the generator's images."""
    made = new("resnet8,width=2", normalise="half", input_shape=(3, 16, 16), classes=3, seed=1)
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec.with_(classes=("blue", "green", "red")))
    return str(path)


def test_a_bundles_student_and_its_teacher_are_judged(
    generator_bundle: Bundle, generator_files: Path, judge_path: str
) -> None:
    found = evaluate_quality(generator_bundle.path, features=judge_path, batch_size=4)
    assert (found.judge, found.features, found.images, found.notes) == (judge_path, 8, 15, ())
    assert found.teacher is not None
    assert found.student.fid > 0
    assert 1 <= found.student.inception_score <= 3
    assert found.student != found.teacher
    # The teacher alone, by its file and in other batches, comes to the same.
    data = str(generator_files / "domains")
    alone = evaluate_quality(
        generator_files / "G.ckpt", features=judge_path, data=data, input_shape=(3, 16, 16), batch_size=256
    )
    assert alone.teacher is None
    assert alone.student.fid == pytest.approx(found.teacher.fid, rel=1e-3)
    assert alone.student.inception_score == pytest.approx(found.teacher.inception_score, rel=1e-4)
    other = evaluate_quality(generator_bundle.student_path, features=judge_path, data=data, split="train")
    assert other.images == 33  # three are held out for validation


def test_too_few_images_are_told(generator_bundle: Bundle, tmp_path: Path) -> None:
    wide = new("resnet8,width=4", normalise="half", input_shape=(3, 16, 16), classes=3, seed=1)
    write_checkpoint(tmp_path / "wide.pt.safetensors", wide.module.state_dict(), wide.spec)
    found = evaluate_quality(generator_bundle.path, features=str(tmp_path / "wide.pt.safetensors"))
    assert found.features == 16
    assert "15 images with 16 features: the covariance is singular" in found.notes[0]


def test_a_classifier_has_no_quality(teacher_path: Path, judge_path: str) -> None:
    with pytest.raises(SettingsError, match=r"makes none\. Leave it out"):
        evaluate_quality(teacher_path, features=judge_path, data="digits")


def test_a_generator_is_no_judge(generator_bundle: Bundle) -> None:
    with pytest.raises(SettingsError, match="no classifier of images"):
        evaluate_quality(generator_bundle.path, features=str(generator_bundle.student_path))
