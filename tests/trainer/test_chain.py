from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import litdeploy
from litdeploy.config.recipe import DataSettings
from litdeploy.config.target import Target, Timing
from litdeploy.data import open_data, pack
from litdeploy.errors import BundleError, InterruptedRun, SettingsError, StudentError
from litdeploy.files import sha256_of
from litdeploy.inspection import FoundNetwork, inspect
from litdeploy.networks import load, new
from litdeploy.profiler import profile
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import read_checkpoint, write_checkpoint
from litdeploy.storage.records import descent
from litdeploy.trainer import Progress, compress
from litdeploy.trainer.validation import evaluate
from tests.faults.conftest import Watching, assert_same
from tests.trainer.test_compress import own_network

STEPS = 5  # an epoch
QUICK: dict[str, Any] = {
    "student_depth": (14, 8),
    "precision": "fp32",
    "device": "cpu",
    "batch_size": 16,
    "feature_cache": "off",
    "keep": "last",  # an untrained teacher's cut may well be the best
    "main": {"epochs": 1, "learning_rate": 0.05},
    "finetune": {"epochs": 1, "learning_rate": 0.01},
    "checkpoint_every": "off",
}


@pytest.fixture(scope="module")
def deep_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained ResNet-20 of width 4 for digits."""
    made = new("resnet20,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec)
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run here is given: a hundred digits, two epochs of five steps for each student."""
    path = tmp_path_factory.mktemp("data") / "digits.safetensors"
    pack("digits", path, train_images=120, limit=120)
    return {**QUICK, "data": {"source": str(path)}}


@pytest.fixture(scope="module")
def chain(deep_path: Path, given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compress(deep_path, out=tmp_path_factory.mktemp("whole") / "deploy", **given)


def test_each_student_is_a_bundle_and_teaches_the_next(chain: Bundle, deep_path: Path) -> None:
    last, first = chain.read_complete(), chain.in_chain(14).read_complete()
    assert (last.recipe.student_depth, first.recipe.student_depth) == ((14, 8), 14)
    assert last.teacher == first.teacher
    assert last.teacher.sha256 == sha256_of(deep_path)
    assert first.lineage == ()
    assert [(each.depth, each.sha256) for each in last.lineage] == [
        (20, last.teacher.sha256),
        (14, first.student_sha256),
    ]
    assert [each.metrics for each in last.lineage] == [first.metrics["teacher"], first.metrics["student"]]
    assert last.metrics["teacher"] == first.metrics["teacher"]
    for bundle, blocks in ((chain.in_chain(14), (0, 2)), (chain, (0,))):
        network = load(bundle.student_path)
        assert network.spec.plan == dict.fromkeys(("layer1", "layer2", "layer3"), blocks)
        found = inspect(bundle.student_path)
        assert isinstance(found, FoundNetwork)
        assert found.breakdown.depth == bundle.read().recipe.depths[-1]
    assert len(chain.metrics_path.read_text().splitlines()) == 3


def test_the_first_student_is_the_one_of_no_chain(
    chain: Bundle, deep_path: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    assert_same(compress(deep_path, out=tmp_path / "deploy", **{**given, "student_depth": 14}), chain.in_chain(14))


def test_the_last_student_learns_from_the_one_before(
    chain: Bundle, deep_path: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    """Of a learning rate near nothing, what it ends with is what it began with."""
    kept = {**given, "finetune": {"epochs": 0, "learning_rate": 0.01}, "main": {"epochs": 1, "learning_rate": 1e-12}}
    bundle = compress(deep_path, out=tmp_path / "deploy", **{**kept, "method": "kd", "weight_decay": 0.0})
    between, last = (read_checkpoint(each.student_path).weights for each in (bundle.in_chain(14), bundle))
    torch.testing.assert_close(last["conv1.weight"], between["conv1.weight"], rtol=0, atol=1e-9)
    torch.testing.assert_close(last["layer3.0.conv1.weight"], between["layer3.0.conv1.weight"], rtol=0, atol=1e-9)
    trained, taught = (read_checkpoint(each.student_path).weights for each in (chain.in_chain(14), chain))
    direct = compress(deep_path, out=tmp_path / "direct", **{**given, "student_depth": 8})
    assert not torch.equal(taught["conv1.weight"], read_checkpoint(direct.student_path).weights["conv1.weight"])
    assert not torch.equal(taught["conv1.weight"], trained["conv1.weight"])


def stop(steps: int) -> Watching:
    """Ends the process's run, as SIGTERM does, once so many steps of it are done."""
    import signal

    return Watching(lambda done: signal.raise_signal(signal.SIGTERM) if done == steps else None)


@pytest.mark.parametrize(
    ("steps", "cache"), [(STEPS + 2, "off"), (2 * STEPS + 2, "off"), (3 * STEPS + 1, "off"), (3 * STEPS + 1, 1)]
)
def test_a_stopped_chain_goes_on_where_it_was(
    steps: int, cache: str | int, chain: Bundle, deep_path: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    features = {"feature_cache": cache, "feature_cache_dir": tmp_path / "features" if cache == 1 else None}
    given = {**given, **features, "out": tmp_path / "deploy"}
    expected = chain if cache == "off" else compress(deep_path, **{**given, "out": tmp_path / "whole"})
    if cache == 1:
        given["feature_cache_dir"] = tmp_path / "others"
    with pytest.raises(InterruptedRun, match="--resume"):
        compress(deep_path, progress=stop(steps), **given)
    in_second = steps > 2 * STEPS
    first = Bundle(tmp_path / "deploy").in_chain(14)
    before = first.student_path.stat().st_mtime_ns
    assert first.read().status == ("complete" if in_second else "interrupted")
    again = Watching()
    found = compress(deep_path, resume=True, progress=again, **given)
    assert (first.student_path.stat().st_mtime_ns == before) is in_second
    assert again.images <= 16 * (4 * STEPS - steps + STEPS)
    assert_same(found, expected)
    assert_same(found.in_chain(14), expected.in_chain(14))
    assert [each.metrics for each in found.read().lineage] == [each.metrics for each in expected.read().lineage]


def test_features_are_kept_of_each_teacher(deep_path: Path, given: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "features"
    kept = {**given, "feature_cache": 1, "feature_cache_dir": folder}
    whole = compress(deep_path, out=tmp_path / "a", **kept)
    (second,) = (path for path in folder.iterdir() if path.is_dir())
    keys = [json.loads((path / "key.json").read_text()) for path in (folder, second)]
    assert keys[0]["teacher"] == whole.read().teacher.sha256
    assert keys[1]["teacher"][:16] == second.name
    # Those of the first teacher serve a student of no chain.
    before = (folder / "key.json").stat().st_mtime_ns
    compress(deep_path, out=tmp_path / "b", **{**kept, "student_depth": 8, "method": "kd"})
    assert (folder / "key.json").stat().st_mtime_ns == before


class Crash(Exception):
    """Nothing that a run expects."""


class Crashing(Progress):
    """Ends the process's run as the second student's begins."""

    def note(self, text: str) -> None:
        if text.startswith("feature cache"):
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == 2:
                raise Crash


def test_a_chain_that_was_killed_between_two_students_goes_on(
    chain: Bundle, deep_path: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    given = {**given, "out": tmp_path / "deploy"}
    with pytest.raises(Crash):
        compress(deep_path, progress=Crashing(), **given)
    assert Bundle(tmp_path / "deploy").unfinished()
    with pytest.raises(BundleError, match="--resume"):
        compress(deep_path, **given)
    again = Watching()
    assert_same(compress(deep_path, resume=True, progress=again, **given), chain)
    assert again.images == 16 * 2 * STEPS


def test_a_complete_chain_is_not_done_again(
    deep_path: Path, given: dict[str, Any], tmp_path: Path, chain: Bundle
) -> None:
    times = [each.student_path.stat().st_mtime_ns for each in (chain, chain.in_chain(14))]
    compress(deep_path, out=chain.path, resume=True, **given)
    assert [each.student_path.stat().st_mtime_ns for each in (chain, chain.in_chain(14))] == times
    with pytest.raises(BundleError, match=r"holds another run, a chain by way of depth 14; it is kept"):
        compress(deep_path, out=chain.path, resume=True, **{**given, "student_depth": 8})
    with pytest.raises(BundleError, match=r"recipe.student_depth"):
        compress(deep_path, out=chain.path / "chain" / "14", resume=True, **{**given, "student_depth": 8})
    # One that began as no chain is not trained for first, and refused then.
    plain = compress(deep_path, out=tmp_path / "plain", **{**given, "student_depth": 8})
    with pytest.raises(BundleError, match="one that is no such chain"):
        compress(deep_path, out=plain.path, resume=True, **given)
    assert not plain.chain_path.exists()
    over = compress(deep_path, out=plain.path, overwrite=True, **given)
    assert_same(over, chain)
    compress(deep_path, out=plain.path, overwrite=True, **{**given, "student_depth": 8})
    assert not plain.chain_path.exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_depth": (8, 14)}, SettingsError, "give --student-depth 14,8"),
        ({"student_depth": (14, 14, 8)}, SettingsError, "give --student-depth 14,8"),
        ({"student_depth": (20, 8)}, StudentError, "has depth 20, and a chain begins .* Give --student-depth 8"),
        ({"student_depth": (26, 14, 8)}, StudentError, "has depth 20, .* Give --student-depth 14,8"),
        ({"student_depth": (32, 20)}, StudentError, "`litdeploy inspect` lists the possible depths"),
        ({"student_depth": (14, 9)}, StudentError, "--student-depth 9: no student .* Possible: 8, 14"),
        ({"method": "scratch"}, StudentError, "Give --student-depth 8"),
        ({"method": "slimming"}, StudentError, "--method lit"),
        ({"method": "indistill", "indistill": {"student": "resnet8,width=2"}}, StudentError, "--method lit"),
    ],
)
def test_what_is_no_chain_is_refused_before_anything_is_trained(
    deep_path: Path,
    given: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        compress(deep_path, out=tmp_path / "deploy", **{**given, **changes})
    assert not (tmp_path / "deploy").exists()


def test_it_is_profiled_against_the_teacher_that_it_began_with(chain: Bundle, deep_path: Path) -> None:
    target = Target(device="cpu", runners=("eager",), batch_sizes=(1,), timing=Timing(warmup_ms=1, samples=8))
    report = profile(chain, target=target)
    assert (report.teacher.name, report.student.name) == ("ResNet-20", "ResNet-8")
    assert report.teacher.sha256 == sha256_of(deep_path)
    assert report.lineage == chain.read().lineage
    assert report.fidelity is not None
    assert "In a chain: depth 20 (" in (chain.profile_path / "report.html").read_text()
    first = chain.in_chain(14)
    assert profile(first, target=target).student.name == "ResNet-14"
    assert "In a chain" not in (first.profile_path / "report.html").read_text()


@pytest.mark.parametrize("depths", [(3, 2), (3, 1)])
def test_a_users_own_module(tmp_path: Path, given: dict[str, Any], depths: tuple[int, ...]) -> None:
    """A section of a single block is taken on as one; the teacher in memory is kept beside the first student."""
    module = own_network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    teacher = litdeploy.load(module, input_shape=(1, 8, 8), normalise="half")
    out = tmp_path / "deploy"
    bundle = litdeploy.compress(teacher, out=out, **{**given, "student_depth": depths})
    manifest = bundle.read_complete()
    assert [each.depth for each in manifest.lineage] == [4, 3]
    assert manifest.student.plan == {"2": {2: (0, 3), 1: (0,)}[depths[-1]]}
    assert Path(manifest.teacher.path) == bundle.in_chain(3).teacher_path
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    again = litdeploy.compress(teacher, out=out, resume=True, **{**given, "student_depth": depths})
    assert again.read() == manifest
    student = load(bundle.student_path, network=own_network()).module
    assert isinstance(student, nn.Sequential)


def test_sections_of_one_block_are_carried_through_a_chain(given: dict[str, Any], tmp_path: Path) -> None:
    """A depth in blocks takes the last block but one from some sections first."""
    sections = [nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))) for _ in range(2)]
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *sections, nn.Linear(16, 10))
    teacher = litdeploy.load(module, input_shape=(1, 8, 8), normalise="half")
    bundle = litdeploy.compress(teacher, out=tmp_path / "deploy", **{**given, "student_depth": (3, 2)})
    between = bundle.in_chain(3).read().student.plan
    assert between is not None
    assert sorted(len(kept) for kept in between.values()) == [1, 2]
    assert bundle.read().student.plan == {"2": (0,), "3": (0,)}


@pytest.fixture(scope="module")
def of_generator(generator_files: Path) -> dict[str, Any]:
    """What a chain from a StarGAN of three blocks is given: two epochs of two steps for each student."""
    return {
        **QUICK,
        "student_depth": (10, 8),
        "data": generator_files / "domains",
        "discriminator": str(generator_files / "D.ckpt"),
        "input_shape": (3, 16, 16),
        "finetune": {"epochs": 1, "learning_rate": 1e-4},
        "optimiser": "adamw",
        "betas": [0.5, 0.999],
        "beta": 0,
        "batch_size": 16,
    }


@pytest.fixture(scope="module")
def generators(generator_files: Path, of_generator: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compress(generator_files / "G.ckpt", out=tmp_path_factory.mktemp("generators") / "deploy", **of_generator)


def test_a_chain_of_generators_is_measured_against_the_first(generators: Bundle, generator_files: Path) -> None:
    teacher = load(generator_files / "G.ckpt", input_shape=(3, 16, 16))
    data = open_data(DataSettings(source=str(generator_files / "domains")), torch.device("cpu"), 0)
    for bundle in (generators, generators.in_chain(10)):
        manifest = bundle.read_complete()
        student = load(bundle.student_path)
        found = evaluate(student.module, data.test, student.spec, "fp32", teacher.module)
        assert manifest.metrics["teacher"] == {}
        assert manifest.metrics["student"]["test"].model_dump() == pytest.approx(found.model_dump())
        assert bundle.samples_path.is_file()
        assert manifest.discriminator_sha256 == sha256_of(generator_files / "D.ckpt")
        rows = [json.loads(line) for line in bundle.metrics_path.read_text().splitlines()]
        assert [row["phase"] for row in rows] == ["cut", "lit", "finetune"]
    first, last = generators.in_chain(10).read(), generators.read()
    assert last.student.plan == {"blocks": (0,)}
    assert [(each.depth, each.sha256, each.metrics) for each in last.lineage] == [
        (12, sha256_of(generator_files / "G.ckpt"), {}),
        (10, first.student_sha256, first.metrics["student"]),
    ]
    near = first.metrics["student"]["test"].summary()
    assert descent(last.lineage).startswith(f"In a chain: depth 12, depth 10 ({near}), each the next one's teacher.")


@pytest.mark.parametrize("steps", [3, 5, 7])
def test_a_chain_of_generators_that_was_stopped_ends_bit_equal(
    steps: int, generators: Bundle, generator_files: Path, of_generator: dict[str, Any], tmp_path: Path
) -> None:
    given = {**of_generator, "out": tmp_path / "deploy"}
    with pytest.raises(InterruptedRun):
        compress(generator_files / "G.ckpt", progress=stop(steps), **given)
    first = Bundle(tmp_path / "deploy").in_chain(10)
    assert first.read().status == ("interrupted" if steps < 5 else "complete")
    found = compress(generator_files / "G.ckpt", resume=True, **given)
    assert_same(found, generators)
    assert_same(first, generators.in_chain(10))
    assert found.samples_path.read_bytes() == generators.samples_path.read_bytes()


def test_the_page_tells_of_a_chain_of_generators(generators: Bundle) -> None:
    target = Target(device="cpu", runners=("eager",), batch_sizes=(1,), timing=Timing(warmup_ms=1, samples=8))
    report = profile(generators, target=target)
    assert report.lineage == generators.read().lineage
    assert "In a chain: depth 12, depth 10 (PSNR " in (generators.profile_path / "report.html").read_text()
