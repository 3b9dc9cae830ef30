from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from litdeploy.errors import BundleError, SettingsError
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.triton_repository import triton_repository
from litdeploy.files import sha256_of
from litdeploy.networks import Network
from litdeploy.storage.records import Artefact

model_config_pb2 = pytest.importorskip(
    "tritonclient.grpc.model_config_pb2", reason="Triton's protobuf is not installed: pip install tritonclient grpcio"
)

CLASSES = ("airplane", "café  “crème”", "two\nlines")
SIGNATURE = {
    "input": "images",
    "output": "logits",
    "input_shape": ["batch", 3, 32, 32],
    "output_shape": ["batch", 10],
    "input_type": "float32",
    "output_type": "float32",
    "image_shape": [3, 32, 32],
    "metadata": {"classes": "[]"},
}
BATCHES = {"min": 1, "opt": 8, "max": 64}


def artefact_of(path: Path, **details: Any) -> tuple[Path, Artefact]:
    details = {**SIGNATURE, **details}
    return path, Artefact(path=path.name, sha256=sha256_of(path), precision="fp32", versions={}, details=details)


def stand_in(path: Path, **details: Any) -> tuple[Path, Artefact]:
    """A file that nothing but its name and its sidecar says anything of."""
    path.write_bytes(path.name.encode())
    return artefact_of(path, **details)


def parsed(folder: Path) -> Any:
    """A model's config.pbtxt as Triton reads it: an unknown field or a wrong type is an error."""
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig())


def written(artefacts: list[tuple[Path, Artefact]], out_dir: Path, **changes: Any) -> list[Path]:
    settings = {"classes": CLASSES, "batch_sizes": (8, 64), "device": "cuda", **changes}
    return triton_repository(artefacts, out_dir, **settings)


def test_an_onnx_file_is_served_in_batches(student: Network, tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    details = export_onnx(student, path, None)
    [folder] = written([artefact_of(path, **details)], tmp_path / "models")
    assert folder == tmp_path / "models" / "student-onnx"
    files = sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*"))
    assert files == ["1", "1/model.onnx", "config.pbtxt", "labels.txt"]
    assert (folder / "1" / "model.onnx").read_bytes() == path.read_bytes()
    config = parsed(folder)
    assert (config.name, config.platform, config.backend) == ("student-onnx", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 64
    [source], [result] = config.input, config.output
    assert (source.name, source.data_type, list(source.dims)) == ("images", model_config_pb2.TYPE_FP32, [1, 8, 8])
    assert (result.name, result.data_type, list(result.dims)) == ("logits", model_config_pb2.TYPE_FP32, [10])
    assert result.label_filename == "labels.txt"
    assert config.dynamic_batching.max_queue_delay_microseconds == 100
    [group] = config.instance_group
    assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_GPU)
    assert [each.batch_size for each in config.model_warmup] == [1, 8, 64]
    for each in config.model_warmup:
        assert list(each.inputs) == ["images"]
        assert list(each.inputs["images"].dims) == [1, 8, 8]
        assert each.inputs["images"].random_data


def test_labels_take_a_line_each(tmp_path: Path) -> None:
    [folder] = written([stand_in(tmp_path / "student.pt2")], tmp_path / "models")
    lines = (folder / "labels.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["airplane", "café “crème”", "two lines"]
    [folder] = written([stand_in(tmp_path / "student.pt2")], tmp_path / "models", classes=())
    assert not (folder / "labels.txt").exists()
    assert not parsed(folder).output[0].label_filename


def test_the_types_of_an_onnx_file_are_those_in_it(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Cast", ["images"], ["logits"], to=TensorProto.FLOAT16)],
        "cast",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 32, 32, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", 32, 32, 3])],
    )
    onnx.save_model(helper.make_model(graph), tmp_path / "student.onnx")
    [folder] = written([artefact_of(tmp_path / "student.onnx")], tmp_path / "models", device="cpu")
    config = parsed(folder)
    assert config.input[0].data_type == model_config_pb2.TYPE_UINT8
    assert list(config.input[0].dims) == [32, 32, 3]
    assert config.output[0].data_type == model_config_pb2.TYPE_FP16
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU


def test_a_file_for_one_batch_size_is_served_without_batching(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["logits"])],
        "flatten",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [4, 1, 2, 5])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [4, 10])],
    )
    onnx.save_model(helper.make_model(graph), tmp_path / "student.onnx")
    [folder] = written([artefact_of(tmp_path / "student.onnx")], tmp_path / "models")
    config = parsed(folder)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [4, 1, 2, 5]
    assert list(config.output[0].dims) == [4, 10]
    [warm_up] = config.model_warmup
    assert (warm_up.batch_size, list(warm_up.inputs["images"].dims)) == (1, [4, 1, 2, 5])


@pytest.mark.parametrize("name", ["student.engine", "student.plan"])
def test_an_engine_is_served_on_a_gpu_up_to_its_largest_batch(tmp_path: Path, name: str) -> None:
    engine = stand_in(tmp_path / name, library="tensorrt", batches={"min": 1, "opt": 8, "max": 32})
    [folder] = written([engine], tmp_path / "models", device="cpu")
    assert folder.name == "student-tensorrt"
    assert (folder / "1" / "model.plan").read_bytes() == name.encode()
    config = parsed(folder)
    assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "tensorrt", 32)
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert [each.batch_size for each in config.model_warmup] == [1, 8, 32]


def test_an_inductor_package_is_served_one_request_at_a_time(tmp_path: Path) -> None:
    metadata = {"io_precision": "fp16", "preprocessing": "outside", "classes": '["a", "b"]'}
    [folder] = written([stand_in(tmp_path / "student.pt2", metadata=metadata)], tmp_path / "models")
    assert (folder / "1" / "model.pt2").is_file()
    config = parsed(folder)
    assert (config.platform, config.backend, config.max_batch_size) == ("torch_aoti", "pytorch", 0)
    assert not config.HasField("dynamic_batching")
    [source], [result] = config.input, config.output
    assert (source.name, source.data_type, list(source.dims)) == (
        "INPUT__0",
        model_config_pb2.TYPE_FP16,
        [-1, 3, 32, 32],
    )
    assert (result.name, result.data_type, list(result.dims)) == ("OUTPUT__0", model_config_pb2.TYPE_FP16, [-1, 2])
    assert [list(each.inputs["INPUT__0"].dims) for each in config.model_warmup] == [
        [size, 3, 32, 32] for size in (1, 8, 64)
    ]
    assert {each.batch_size for each in config.model_warmup} == {1}


def test_an_inductor_package_that_normalises_takes_pixels(tmp_path: Path) -> None:
    metadata = {"io_precision": "fp32", "preprocessing": "embedded", "classes": "[]"}
    [folder] = written([stand_in(tmp_path / "student.pt2", metadata=metadata)], tmp_path / "models")
    [source], [result] = parsed(folder).input, parsed(folder).output
    assert (source.data_type, list(source.dims)) == (model_config_pb2.TYPE_UINT8, [-1, 32, 32, 3])
    assert (result.data_type, list(result.dims)) == (model_config_pb2.TYPE_FP32, [-1, -1])


def test_single_images_are_not_put_together(tmp_path: Path) -> None:
    engine = stand_in(tmp_path / "student.engine", library="tensorrt", batches={"min": 1, "opt": 1, "max": 1})
    [folder] = written([engine], tmp_path / "models", batch_sizes=(1,))
    assert parsed(folder).max_batch_size == 1
    assert not parsed(folder).HasField("dynamic_batching")


def test_several_artefacts_are_several_models_and_others_are_left(tmp_path: Path) -> None:
    out = tmp_path / "models"
    (out / "theirs" / "1").mkdir(parents=True)
    artefacts = [
        stand_in(tmp_path / "student.pt2"),
        stand_in(tmp_path / "student.engine", library="tensorrt", batches=BATCHES),
    ]
    for _ in range(2):
        assert [folder.name for folder in written(artefacts, out)] == ["student-inductor", "student-tensorrt"]
    assert sorted(each.name for each in out.iterdir()) == ["student-inductor", "student-tensorrt", "theirs"]


def test_a_name_with_quotes_is_a_name(tmp_path: Path) -> None:
    [folder] = written([stand_in(tmp_path / 'a "b" \\ é.pt2')], tmp_path / "models")
    assert parsed(folder).name == 'a "b" \\ é-inductor'


def test_what_triton_does_not_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "models"
    with pytest.raises(SettingsError, match=r"Triton serves \.onnx, \.pt2, \.engine, \.plan"):
        written([stand_in(tmp_path / "student.safetensors")], out)
    with pytest.raises(SettingsError, match="this one is tensorrt_rtx's"):
        written([stand_in(tmp_path / "student.engine", library="tensorrt_rtx", batches=BATCHES)], out)
    batches = {"min": 8, "opt": 8, "max": 64}
    with pytest.raises(SettingsError, match="put 1 among the target's `batch_sizes`"):
        written([stand_in(tmp_path / "student.engine", library="tensorrt", batches=batches)], out)
    assert not out.exists()
    twice = stand_in(tmp_path / "student.pt2")
    with pytest.raises(SettingsError, match="served as student-inductor already"):
        written([twice, twice], out)


def test_a_file_that_was_altered_is_refused(tmp_path: Path) -> None:
    path, artefact = stand_in(tmp_path / "student.pt2")
    path.write_bytes(b"other")
    with pytest.raises(BundleError, match="altered since it was exported"):
        written([(path, artefact)], tmp_path / "models")


def test_a_folder_of_somebody_else_is_left(tmp_path: Path) -> None:
    theirs = tmp_path / "models" / "student-inductor" / "2"
    theirs.mkdir(parents=True)
    with pytest.raises(BundleError, match="holds files that are not litdeploy's"):
        written([stand_in(tmp_path / "student.pt2")], tmp_path / "models")
    assert theirs.is_dir()


def test_a_repository_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        written([stand_in(tmp_path / "student.pt2")], tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


def test_a_text_classifier_is_served_with_both_its_inputs(tmp_path: Path) -> None:
    ids, mask = (helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", 16]) for name in ("ids", "mask"))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 16])
    nodes = [helper.make_node("Mul", ["ids", "mask"], ["kept"]), helper.make_node("Cast", ["kept"], ["logits"], to=1)]
    graph = helper.make_graph(nodes, "text", [ids, mask], [logits])
    path = tmp_path / "student.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    [folder] = written([artefact_of(path)], tmp_path / "models")
    config = parsed(folder)
    assert [(each.name, each.data_type, list(each.dims)) for each in config.input] == [
        ("ids", model_config_pb2.TYPE_INT64, [16]),
        ("mask", model_config_pb2.TYPE_INT64, [16]),
    ]
    warm_up = config.model_warmup[0].inputs
    assert {name: (list(warm_up[name].dims), warm_up[name].zero_data) for name in warm_up} == {
        "ids": ([16], True),
        "mask": ([16], True),
    }
