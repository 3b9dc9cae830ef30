from __future__ import annotations

from pathlib import Path

import pytest
import torch

from litdeploy.config.target import Tolerance
from litdeploy.exporter.evidence import Evidence
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.parity import compare_runners
from litdeploy.networks import Network
from litdeploy.runtime import open_runner

CPU = torch.device("cpu")


def test_each_batch_size_sees_whole_batches_of_the_images(student: Network, tmp_path: Path) -> None:
    export_onnx(student, tmp_path / "student.onnx", None)
    with (
        open_runner("eager", network=student, device=CPU) as reference,
        open_runner("onnxruntime", path=tmp_path / "student.onnx", device=CPU) as candidate,
    ):
        parity = compare_runners(reference, candidate, student.example(19), (1, 2, 8, 24), Tolerance(), student.spec)
    assert [(each.batch_size, each.images) for each in parity.batches] == [(1, 16), (2, 18), (8, 16), (24, 24)]
    assert parity.within
    assert all(each.max_absolute is not None and 0 < each.max_absolute < 1e-4 for each in parity.batches)
    assert (parity.reference, parity.candidate) == ("eager", "onnxruntime")
    assert "beyond the limit" not in parity.summary()


def test_labels_are_judged_too(student: Network) -> None:
    batch = student.example(24)
    with (
        open_runner("eager", network=student, device=CPU) as reference,
        open_runner("eager", network=student, device=CPU, precision="bf16") as candidate,
    ):
        labels = reference.run(batch).argmax(1)
        tolerance = Tolerance(atol=1, rtol=1, top1=0)
        parity = compare_runners(reference, candidate, batch, (1, 8), tolerance, student.spec, labels)
    assert parity.accuracy is not None
    assert parity.accuracy.reference.top1 == 1
    assert parity.accuracy.lost == 24 - round(24 * parity.accuracy.candidate.top1)
    assert "accuracy on 24 samples: 100.00% → " in parity.summary()
    rejected = parity.with_labels(parity.accuracy.model_copy(update={"within": False}))
    assert not rejected.within
    assert "beyond the limit" in rejected.summary()


def test_the_class_is_judged_over_all_batch_sizes_together(student: Network) -> None:
    batch = student.example(40)
    with (
        open_runner("eager", network=student, device=CPU) as reference,
        open_runner("eager", network=student, device=CPU, precision="bf16") as candidate,
    ):
        parity = compare_runners(reference, candidate, batch, (1, 8), Tolerance(atol=1, rtol=1, top1=0), student.spec)
        assert 0 < parity.top1 <= 1
        assert parity.top1 == pytest.approx((16 * parity.batches[0].top1 + 40 * parity.batches[1].top1) / 56)
        strict = compare_runners(reference, reference, batch, (1, 8), Tolerance(top1=1), student.spec)
    assert strict.within


def test_a_rest_that_an_engine_does_not_take_is_left_out() -> None:
    evidence = Evidence(torch.zeros(10, 1, 8, 8), torch.zeros(10, dtype=torch.int64))
    for least, most, left in ((1, 4, 10), (2, 4, 10), (3, 4, 8), (4, 4, 8), (4, 16, 10), (16, 16, 10)):
        taken = evidence.in_calls(least, most)
        assert (len(taken.inputs), len(taken.labels_N)) == (left, left)
