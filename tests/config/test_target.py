from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from litdeploy.config import settings
from litdeploy.config.target import Target, Timing, Tolerance, Tolerances, read_target, with_timing
from litdeploy.errors import SettingsError

GPUS = {"h200": "9.0", "a100": "8.0", "l4": "8.9", "t4": "7.5", "rtx4090": "8.9", "orin": "8.7"}


@pytest.mark.parametrize(("name", "capability"), GPUS.items())
def test_each_gpu_has_what_exports_need(name: str, capability: str) -> None:
    target = read_target(name)
    assert target.device == "cuda"
    assert target.compute_capability == capability
    assert target.memory_limit
    assert ("bf16" in target.precisions) == (float(capability) >= 8)
    assert target.batch_sizes[0] == 1


@pytest.mark.parametrize(
    ("sizes", "profile"),
    [((4,), (4, 4, 4)), ((16, 1), (1, 1, 16)), ((1, 8, 64), (1, 8, 64)), ((1, 8, 64, 256), (1, 8, 256))],
)
def test_the_batch_profile_is_least_middle_and_largest(sizes: tuple[int, ...], profile: tuple[int, int, int]) -> None:
    assert Target(batch_sizes=sizes).batch_profile == profile


def test_what_is_not_said_of_a_tolerance_stays(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("tolerance:\n  int8: {top1: 0.9}\nprecisions: [fp32, int8, int8]\n")
    target = read_target(path)
    default = Target().tolerance
    assert target.precisions == ("fp32", "int8")
    assert target.tolerance.int8 == default.int8.model_copy(update={"top1": 0.9})
    assert target.tolerance.fp16 == default.fp16
    assert Target(tolerance=Tolerances(fp32=Tolerance(atol=0))).tolerance.int8 == default.int8
    assert Target.model_validate_json(target.model_dump_json()) == target


def test_coarser_precisions_have_wider_limits() -> None:
    found = [getattr(Target().tolerance, name) for name in ("fp32", "fp16", "bf16", "int8")]
    for finer, coarser in pairwise(found):
        assert finer.atol < coarser.atol
        assert finer.rtol < coarser.rtol
        assert finer.top1 > coarser.top1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tolerance: {atol: 1}", "unknown key 'tolerance.atol'. Known here: bf16, fp16, fp32, int8"),
        ("tolerance:\n  int8: {rtoll: 1}", "line 2: unknown key 'tolerance.int8.rtoll'. Did you mean 'rtol'?"),
        ("precisions: [fp8]", "'fp32', 'fp16', 'bf16' or 'int8'"),
        ("precisions: []", "precisions: needs at least one"),
        ("compute_capability: sm_90", "compute_capability: string should match pattern"),
        ("memory_limit: 0", "memory_limit: input should be greater than 0"),
        ("compile_mode: fast", "'default', 'reduce-overhead' or 'max-autotune'"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_target(path)
    assert message in str(caught.value)


def test_timing_is_changed_field_by_field() -> None:
    target = Target(timing=Timing(samples=100))
    assert with_timing(target, {"pace": None, "processes": None}) is target
    changed = with_timing(target, {"pace": 50, "processes": 3})
    assert (changed.timing.samples, changed.timing.pace, changed.timing.processes) == (100, 50.0, 3)
    with pytest.raises(SettingsError, match="--cold-cache, --pace"):
        with_timing(changed, {"cold_cache": True})
    with pytest.raises(SettingsError, match="processes"):
        with_timing(target, {"processes": 0})


@pytest.mark.parametrize("name", settings.names("profiles"))
def test_the_first_line_of_each_file_says_that_it_is_a_target(name: str) -> None:
    first = (settings.folder("profiles") / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# Target, read by `--target {name}`: ")
