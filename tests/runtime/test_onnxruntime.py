from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from litdeploy.errors import RunnerError
from litdeploy.networks import Network
from litdeploy.runtime import open_runner
from litdeploy.runtime.onnxruntime import check_placement

CPU = torch.device("cpu")


def saved(path: Path, input_type: int, input_shape: list[int | str], output_shape: list[int | str]) -> Path:
    """An ONNX file that flattens its input."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["in"], ["out"])],
        "flatten",
        [helper.make_tensor_value_info("in", input_type, input_shape)],
        [helper.make_tensor_value_info("out", input_type, output_shape)],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_cuda_that_cannot_be_had_is_an_error_and_not_the_cpu(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runner = open_runner("onnxruntime", path=onnx_path, device=torch.device("cuda", 0))
    with pytest.raises(RunnerError, match="CPUExecutionProvider") as caught, runner:
        pass
    assert "pip install" in str(caught.value)


@pytest.mark.gpu
def test_on_cuda_it_takes_its_place_in_the_current_stream(onnx_path: Path, network: Network) -> None:
    device = torch.device("cuda", 0)
    expected = network.module(network.example(8)).detach()
    with open_runner("onnxruntime", path=onnx_path, device=device) as runner:
        stream = torch.cuda.Stream(device)
        for _ in range(20):
            with torch.cuda.stream(stream):
                # Slow work first: a runner that does not wait for it reads zeros.
                batch = torch.zeros(8, 3, 8, 8, device=device)
                torch.cuda._sleep(2_000_000)
                batch.copy_(network.example(8).to(device))
                doubled = runner.run(batch) * 2
            torch.testing.assert_close(doubled.cpu() / 2, expected, atol=1e-4, rtol=1e-4)


def test_graphs_are_for_cuda(onnx_path: Path) -> None:
    with pytest.raises(RunnerError, match="runs on cuda, not on cpu"):
        open_runner("onnxruntime-graph", path=onnx_path, device=CPU)


@pytest.mark.gpu
def test_graphs_give_the_modules_logits_for_each_shape_in_turn(onnx_path: Path, network: Network) -> None:
    device = torch.device("cuda", 0)
    with open_runner("onnxruntime-graph", path=onnx_path, device=device) as runner:
        kept = []
        for turn in range(3):
            for size in (1, 8, 3):
                batch = network.example(size) + turn
                kept.append((runner.run(batch.to(device)), network.module(batch).detach()))
        assert "CUDA graph" in runner.describe().mode
        with pytest.raises(RunnerError, match=r"takes float32 images of shape \(N, 3, 8, 8\)"):
            runner.run(torch.zeros(2, 3, 8, 9, device=device))
    # What a call gave is the caller's: later replays leave it alone.
    for found, expected in kept:
        torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_a_graph_takes_its_place_in_the_current_stream(onnx_path: Path, network: Network) -> None:
    device = torch.device("cuda", 0)
    expected = network.module(network.example(8)).detach()
    with open_runner("onnxruntime-graph", path=onnx_path, device=device) as runner:
        runner.run(torch.zeros(8, 3, 8, 8, device=device))
        for stream in [torch.cuda.Stream(device) for _ in range(4)]:
            with torch.cuda.stream(stream):
                # Slow work first: a runner that does not wait for it reads zeros.
                batch = torch.zeros(8, 3, 8, 8, device=device)
                torch.cuda._sleep(2_000_000)
                batch.copy_(network.example(8).to(device))
                doubled = runner.run(batch) * 2
            torch.testing.assert_close(doubled.cpu() / 2, expected, atol=1e-4, rtol=1e-4)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(RunnerError, match="no such file"),
        open_runner("onnxruntime", path=tmp_path / "none.onnx", device=CPU),
    ):
        pass


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a\x12\x07pytorch"])
def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(RunnerError, match="not an ONNX file"), open_runner("onnxruntime", path=path, device=CPU):
        pass


def test_a_truncated_file_is_refused(tmp_path: Path, onnx_path: Path) -> None:
    path = tmp_path / "short.onnx"
    path.write_bytes(onnx_path.read_bytes()[:-100])
    with pytest.raises(RunnerError, match="not an ONNX file"), open_runner("onnxruntime", path=path, device=CPU):
        pass


@pytest.mark.parametrize(
    ("input_type", "input_shape", "output_shape"),
    [
        (TensorProto.DOUBLE, ["batch", 12], ["batch", 12]),
        (TensorProto.INT64, ["batch", 12], ["batch", 12]),
        (TensorProto.UINT8, ["batch", 1, 3, 4], ["batch", 12]),
        (TensorProto.FLOAT, ["batch", 1, "height", "width"], ["batch", "features"]),
    ],
)
def test_a_model_that_is_no_classifier_of_images_is_refused(
    tmp_path: Path, input_type: int, input_shape: list[int | str], output_shape: list[int | str]
) -> None:
    path = saved(tmp_path / "other.onnx", input_type, input_shape, output_shape)
    with pytest.raises(RunnerError, match="not a network"), open_runner("onnxruntime", path=path, device=CPU):
        pass


def test_a_model_of_one_batch_size_refuses_others_with_a_message(tmp_path: Path) -> None:
    path = saved(tmp_path / "fixed.onnx", TensorProto.FLOAT, [2, 1, 3, 4], [2, 12])
    with open_runner("onnxruntime", path=path, device=CPU) as runner:
        assert runner.run(torch.ones(2, 1, 3, 4)).shape == (2, 12)
        with pytest.raises(RunnerError, match="cannot run it"):
            runner.run(torch.ones(3, 1, 3, 4))


def test_several_inputs_go_in_by_their_names(tmp_path: Path) -> None:
    """As of a generator that takes images and domains."""
    images, domains = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("images", 4), ("domains", 2))
    )
    graph = helper.make_graph(
        [helper.make_node("Concat", ["images", "domains"], ["out"], axis=1)],
        "beside",
        [images, domains],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 6])],
    )
    path = tmp_path / "two.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    batch = {"images": torch.ones(3, 4), "domains": torch.zeros(3, 2)}
    with open_runner("onnxruntime", path=path, device=CPU) as runner:
        assert torch.equal(runner.run(batch), torch.cat([*batch.values()], dim=1))
        with pytest.raises(RunnerError, match=r"float32 images of shape \(N, 4\) and float32 domains"):
            runner.run({"images": torch.ones(3, 4), "domains": torch.zeros(2, 2)})


def test_what_is_computed_elsewhere_is_an_error(onnx_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(onnx_path, options, providers=["CPUExecutionProvider"])
    check_placement(session, "CPUExecutionProvider", onnx_path)
    with pytest.raises(RunnerError, match=r"with the CUDAExecutionProvider: \d+ \w*Conv on CPUExecutionProvider"):
        check_placement(session, "CUDAExecutionProvider", onnx_path)
