"""Networks that are not litdeploy's own: ViT and BERT of `transformers`, and the one of `examples/`."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from litdeploy.config.formats import FORMATS
from litdeploy.config.spec import InputSpec, InputTensor, TensorInput, TokenInput, TranslationInput
from litdeploy.config.target import Precision, Target, Tolerance
from litdeploy.errors import RunnerError, SettingsError
from litdeploy.evaluation import evaluate
from litdeploy.evaluation.verify import verify
from litdeploy.exporter import export
from litdeploy.exporter.formats.inductor import export_aoti
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.parity import compare_runners
from litdeploy.exporter.precision import convert, quantize_onnx
from litdeploy.files import sha256_of
from litdeploy.networks import Network, load
from litdeploy.runtime import Runner, open_runner
from litdeploy.runtime.onnx_file import describe_onnx
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Artefact, Likeness, Parity
from litdeploy.storage.staging import write_sidecar
from litdeploy.tasks import TASKS

CPU = torch.device("cpu")
OWN_NETWORK = Path(__file__).parents[2] / "examples" / "own_network.py"


class Pair(nn.Module):
    """A volume and a table of its patient."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 2 * 4 * 4, 8))
        self.age = nn.Linear(3, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, volume: Tensor, age: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.volume(volume) + self.age(age)))
        return result


@pytest.fixture(scope="module", params=["vit", "bert", "example", "signal", "pair"])
def network(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(0)
    if request.param == "bert":
        return bert()
    if request.param == "example":
        return load(runpy.run_path(str(OWN_NETWORK))["network"](), input_shape=(1, 8, 8), normalise="half")
    if request.param == "signal":
        module = nn.Sequential(nn.Conv1d(1, 8, 9, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
        module(torch.zeros(1, 1, 64))
        return load(module, input_shape=(1, 64))
    if request.param == "pair":
        takes = InputTensor("volume", "float32", (1, 4, 6, 6)), InputTensor("age", "float32", (3,))
        return load(Pair(), input=TensorInput(tensors=takes))
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=10,
    )
    return load(transformers.ViTForImageClassification(config), input_shape=(3, 16, 16), normalise="half")


def bert(length: int | None = None) -> Network:
    """A BERT for texts of any length up to 64 tokens, or of this length."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=3,
    )
    torch.manual_seed(0)
    module = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in module.parameters():  # else its logits hardly depend on the text
            parameter.mul_(3.0)
    return load(module, input_shape=None if length is None else (length,))


def parity(network: Network, candidate: Runner, precision: Precision) -> Parity:
    tolerance = getattr(Target().tolerance, precision)
    with open_runner("eager", network=network, device=CPU) as reference, candidate:
        # New weights give logits that lie near to one another: the class tells nothing.
        return compare_runners(
            reference,
            candidate,
            network.example(32),
            (1, 8),
            tolerance.model_copy(update={"top1": 0.0}),
            network.spec,
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_onnx(network: Network, tmp_path: Path, precision: Precision) -> None:
    if isinstance(network.spec.input, TokenInput) and precision in ("fp32", "bf16"):
        pytest.skip("fp32 below; bf16 is converted as fp16 is")
    path = tmp_path / "network.onnx"
    if precision == "int8":
        export_onnx(network, tmp_path / "fp32.onnx", None)
        details = quantize_onnx(tmp_path / "fp32.onnx", path, network.example(64))
        assert details["quantised"]
        graph = onnx.load_model(path).graph
        stored = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
        others = [node for node in graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
        assert not [node.name for node in others if stored.intersection(node.input)]
        scales = {node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
        values = [onnx.numpy_helper.to_array(tensor).max() for tensor in graph.initializer if tensor.name in scales]
        assert max(values) < 1e3  # the attention mask's would be 1e36
    else:
        conversion = None if precision == "fp32" else convert(network, precision, [network.example(16)])
        export_onnx(network, path, None, conversion=conversion)
    found = parity(network, open_runner("onnxruntime", path=path, device=CPU), precision)
    assert found.within, found.summary()


@pytest.mark.slow
def test_aoti(network: Network, tmp_path: Path) -> None:
    if isinstance(network.spec.input, TokenInput):
        pytest.skip("below, with a fresh process")
    path = packaged(network, tmp_path / "network.pt2")
    found = parity(network, open_runner("inductor", path=path, device=CPU), "fp32")
    assert found.within, found.summary()


def packaged(network: Network, path: Path) -> Path:
    details = export_aoti(network, path, CPU)
    versions = FORMATS["aoti"].versions()
    artefact = Artefact(path=path.name, sha256=sha256_of(path), precision="fp32", versions=versions, details=details)
    write_sidecar(path, artefact)
    return path


@pytest.fixture(scope="module")
def bert_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT for texts of any length up to 64 tokens, as ONNX in fp32."""
    path = tmp_path_factory.mktemp("bert") / "bert.onnx"
    details = export_onnx(bert(), path, None)
    assert details["inputs"] == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert (details["output"], details["output_shape"]) == ("logits", ["batch", 3])
    return path


def test_a_text_classifier_takes_any_length(bert_path: Path) -> None:
    network = bert()
    found = parity(network, open_runner("onnxruntime", path=bert_path, device=CPU), "fp32")
    assert found.within, found.summary()
    text = network.example(3)
    with open_runner("onnxruntime", path=bert_path, device=CPU) as runner:
        for length in (1, 17, 64):
            part = {name: tensor.repeat(1, 2)[:, :length].contiguous() for name, tensor in text.items()}
            with torch.no_grad():
                expected = network.module(**part).logits
            torch.testing.assert_close(runner.run(part), expected, atol=1e-4, rtol=1e-4)


def test_what_is_no_text_is_refused(bert_path: Path) -> None:
    ids, mask = bert().example(3).values()
    with open_runner("onnxruntime", path=bert_path, device=CPU) as runner:
        for wrong in (
            ids,
            {"input_ids": ids},
            {"input_ids": ids, "attention_mask": mask[:, :5]},
            {"input_ids": ids, "attention_mask": mask[:2]},
            {"input_ids": ids.int(), "attention_mask": mask},
            {"input_ids": ids.repeat(1, 3), "attention_mask": mask.repeat(1, 3)},
        ):
            with pytest.raises(RunnerError, match=r"takes int64 input_ids of shape \(N, 1 to 64\) and int64"):
                runner.run(wrong)


def test_padding_of_a_text_does_not_count(bert_path: Path) -> None:
    ids = torch.tensor([[5, 7, 11, 0, 0], [5, 7, 11, 90, 91]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    with open_runner("onnxruntime", path=bert_path, device=CPU) as runner:
        first, second = runner.run({"input_ids": ids, "attention_mask": mask})
        torch.testing.assert_close(first, second)
        whole = runner.run({"input_ids": ids, "attention_mask": torch.ones_like(mask)})
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)


@pytest.mark.slow
def test_a_package_of_a_text_classifier_runs_in_a_fresh_process(tmp_path: Path) -> None:
    network = bert(16)
    path = packaged(network, tmp_path / "bert.pt2")
    found = parity(network, open_runner("inductor", path=path, device=CPU), "fp32")
    assert found.within, found.summary()
    text = network.example(5)
    torch.save({"text": text, "logits": network.module(**text).logits.detach()}, tmp_path / "expected.pt")
    script = f"""
import sys, torch
from pathlib import Path
from litdeploy.runtime import open_runner
expected = torch.load({str(tmp_path / "expected.pt")!r})
with open_runner("inductor", path=Path({str(path)!r}), device=torch.device("cpu")) as runner:
    torch.testing.assert_close(runner.run(expected["text"]), expected["logits"], atol=1e-4, rtol=1e-4)
package = torch._inductor.aoti_load_package({str(path)!r})
torch.testing.assert_close(package(**expected["text"]), expected["logits"], atol=1e-4, rtol=1e-4)
print([name for name in sys.modules if name.startswith(("litdeploy.networks", "transformers"))])
"""
    words = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_pixels_are_of_images(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--embed-preprocessing"):
        export_onnx(bert(), tmp_path / "bert.onnx", None, embedded=True)


def test_a_generator_is_exported_held_against_its_images_and_measured(generator_bundle: Bundle) -> None:
    """Two inputs, and images in the place of logits."""
    target = Target(batch_sizes=(1, 4))
    exported = export(generator_bundle, precisions=("fp32", "fp16"), calibration_images=16, target=target)
    for kind, least in (("onnx", 80), ("onnx-fp16", 45)):
        parity = Parity.model_validate(exported.artefacts[kind].details["parity"])
        assert parity.top1 is None
        assert all(each.likeness is not None and each.likeness.psnr >= least for each in parity.batches), (
            parity.summary()
        )
    path = generator_bundle.export_path / "student.onnx"
    described = describe_onnx(path)
    assert described["inputs"] == {"images": ["batch", 3, 16, 16], "domains": ["batch", 3]}
    assert (described["output"], described["output_shape"]) == ("translated", ["batch", 3, 16, 16])

    verified = verify(generator_bundle, target=target)
    compression, conversion, _ = verified.differences
    assert verified.within
    trained = exported.metrics["student"]["test"]
    assert isinstance(trained, Likeness)
    assert compression.likeness is not None
    assert compression.likeness.psnr == pytest.approx(trained.psnr, abs=1e-3)
    assert conversion.likeness is not None
    assert conversion.likeness.psnr > 80
    measured = evaluate(path, data=exported.recipe.data, teacher=exported.teacher.path)
    assert isinstance(measured, Likeness)
    assert measured.psnr == pytest.approx(compression.likeness.psnr, abs=1e-3)
    again = evaluate(generator_bundle.path)
    assert isinstance(again, Likeness)
    assert again.ssim == pytest.approx(compression.likeness.ssim, abs=1e-5)


def test_images_beyond_the_limit_are_not_shipped() -> None:
    images = InputSpec(shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    made = torch.rand(4, 3, 16, 16)
    limits, spec, task = Tolerance(), TranslationInput(images=images, domains=2), TASKS["translation"]
    assert task.compare(made, made, 4, limits, spec).within
    assert not task.compare(made, made + 1e-3, 4, limits, spec).within
    broken = task.compare(made, made.clone().index_fill_(0, torch.tensor([1]), float("nan")), 4, limits, spec)
    assert (broken.within, broken.likeness, broken.max_absolute) == (False, None, None)


def test_a_generators_likeness_needs_its_teacher(generator_bundle: Bundle) -> None:
    recipe = generator_bundle.read().recipe
    with pytest.raises(SettingsError, match="--teacher FILE"):
        evaluate(generator_bundle.student_path, data=recipe.data)
