from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from litdeploy.batch import Batch, forward
from litdeploy.errors import NetworkError
from litdeploy.networks import FAMILIES, load, new, sections_of
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.families.resnext import resnext
from litdeploy.networks.finding import find_sections, named_sections
from litdeploy.networks.network import Network
from litdeploy.networks.sections import Section, container, recording, run_section, whole
from litdeploy.networks.student import make_student, own_sections


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, vocab_size=99, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    return ViTForImageClassification(config).eval()


TOKENS = {
    "input_ids": torch.arange(14).reshape(2, 7),
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
}


def test_resnet_has_three() -> None:
    found = find_sections(resnet(20), torch.randn(2, 3, 32, 32))
    assert found == [
        Section("layer1", ("layer1.0", "layer1.1", "layer1.2"), (16, 32, 32), (16, 32, 32), free=True),
        Section("layer2", ("layer2.0", "layer2.1", "layer2.2"), (16, 32, 32), (32, 16, 16)),
        Section("layer3", ("layer3.0", "layer3.1", "layer3.2"), (32, 16, 16), (64, 8, 8)),
    ]


def test_resnext_has_three() -> None:
    found = find_sections(resnext(20, width=4, out_width=32, stem_width=8), torch.randn(2, 3, 16, 16))
    assert [(section.name, section.blocks) for section in found] == [("layer1", 2), ("layer2", 2), ("layer3", 2)]


def test_bert_and_vit_have_their_encoder() -> None:
    assert find_sections(bert(), TOKENS) == [
        Section("bert.encoder.layer", tuple(f"bert.encoder.layer.{n}" for n in range(4)), (7, 32), (7, 32), free=True)
    ]
    (found,) = find_sections(vit(), torch.randn(2, 3, 32, 32))
    assert (found.blocks, found.input_shape, found.output_shape) == (4, (17, 32), (17, 32))


def test_the_network_is_left_as_it_was() -> None:
    network = resnet(14).train()
    network.layer1.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    find_sections(network, torch.randn(2, 3, 16, 16))
    assert network.training
    assert not network.layer1.training
    assert not network.layer1[0].bn1.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


class Branching(nn.Module):
    """Two blocks side by side: the second does not run on the first's output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return sum((block(x) for block in self.blocks), torch.zeros(()))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.used = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


@pytest.mark.parametrize(
    ("module", "example", "reason"),
    [
        (nn.Linear(4, 4), torch.zeros(2, 4), "no nn.Sequential or nn.ModuleList"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), torch.zeros(2, 3, 4, 4), "not built alike (Conv2d, ReLU)"),
        (nn.Sequential(nn.ReLU(), nn.ReLU()), torch.zeros(2, 3), "no parameters"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)), torch.zeros(2, 4), "have different output shapes"),
        (Branching(), torch.zeros(2, 4), "not each run on the output of the one before"),
        (Unused(), torch.zeros(2, 4), "were not run"),
    ],
)
def test_no_repeated_blocks_says_what_was_looked_for(module: nn.Module, example: Tensor, reason: str) -> None:
    with pytest.raises(NetworkError, match="built alike, run in order and all have the same output shape") as caught:
        find_sections(module, example)
    assert reason in str(caught.value)


def test_of_nested_containers_the_outermost_counts() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    found = find_sections(nn.Sequential(nn.Sequential(block(), block(), block()), nn.Linear(4, 2)), torch.zeros(1, 4))
    assert found == [Section("0", ("0.0", "0.1", "0.2"), (4,), (4,), free=True)]


@pytest.mark.parametrize(
    ("network", "name", "example"), [(bert, "bert.encoder.layer", TOKENS), (resnet, "layer2", None)]
)
def test_a_recorded_call_replays_exactly(network, name, example) -> None:  # type: ignore[no-untyped-def]
    module = network().eval()
    section = whole(module, name)
    with torch.no_grad(), recording(module, [section]) as calls:
        module(**example) if example else module(torch.randn(2, 3, 16, 16))
    call = calls[name]
    with torch.no_grad():
        again = run_section(section.blocks_in(module), call.input, call.arguments)
    assert torch.equal(again, call.output)


def test_an_attention_mask_is_part_of_what_is_replayed() -> None:
    module = bert()
    section = whole(module, "bert.encoder.layer")
    with torch.no_grad(), recording(module, [section]) as calls:
        module(**TOKENS)
    call = calls["bert.encoder.layer"]
    with torch.no_grad():
        unmasked = run_section(section.blocks_in(module), call.input, [((), {})] * 4)
    assert not torch.allclose(unmasked, call.output)


def test_a_section_of_one_block_is_found_by_its_name() -> None:
    names, example = ["layer1", "layer2", "layer3"], torch.zeros(1, 3, 16, 16)
    found = [replace(section, free=False) for section in find_sections(resnet(20), example)]
    assert named_sections(resnet(20).eval(), names, example) == found
    found = named_sections(resnet(8).eval(), names, example)
    assert [section.blocks for section in found] == [1, 1, 1]
    with pytest.raises(NetworkError, match="no section 'layer9'"):
        named_sections(resnet(8), ["layer9"], example)


def test_a_section_that_is_not_there_is_named() -> None:
    with pytest.raises(NetworkError, match="no section 'layer9'"):
        container(resnet(8), "layer9")
    with pytest.raises(NetworkError, match="no section 'conv1'"):
        container(resnet(8), "conv1")


def image_network(module: nn.Module) -> Network:
    return load(module, input_shape=(3, 8, 8), normalise="half")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.sections])
def test_the_names_of_a_family_are_those_that_are_found(name: str) -> None:
    network = {"vdcnn": "vdcnn17", "stargan": "stargan,width=2"}.get(name, f"{name}20")
    made = new(network, normalise=None if name == "vdcnn" else "half", classes=4, seed=0)
    found = find_sections(made.module, made.example())
    assert tuple(section.name for section in found) == FAMILIES[name].sections
    assert sections_of(made) == found


def test_what_a_plan_names_is_a_section_and_what_is_inside_it_is_none() -> None:
    def block() -> nn.Module:
        return nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(2)))

    module = nn.Sequential(nn.Sequential(block(), block(), block()), nn.Sequential(block(), block()), nn.Flatten())
    teacher = image_network(nn.Sequential(module, nn.Linear(192, 4)))
    assert [(each.name, each.blocks) for each in sections_of(teacher)] == [("0.0", 3), ("0.1", 2)]
    plan = {"0.0": (0,)}
    student = Network(make_student(teacher.module, plan).eval(), teacher.spec.with_(plan=plan), "student")
    assert [(each.name, each.blocks) for each in sections_of(student)] == [("0.0", 1), ("0.1", 2)]


def test_without_any_it_says_so() -> None:
    with pytest.raises(NetworkError, match="no repeated blocks"):
        sections_of(image_network(nn.Sequential(nn.Flatten(), nn.Linear(192, 4))))


def modern_bert(layers: int = 6) -> nn.Module:
    """Global attention in every third layer, local attention of another rotary base in the others."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=48,
        local_attention=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        num_labels=3,
        attn_implementation="eager",
    )
    return ModernBertForSequenceClassification(config).eval()


def llama(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        pad_token_id=0,
        num_labels=3,
    )
    return LlamaForSequenceClassification(config).eval()


def whisper_encoder() -> nn.Module:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32,
        encoder_layers=4,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
    )
    return WhisperEncoder(config).eval()


@pytest.mark.parametrize(
    ("network", "example"),
    [
        (bert, TOKENS),
        (modern_bert, TOKENS),
        (llama, TOKENS),
        (vit, torch.randn(2, 3, 32, 32)),
        (whisper_encoder, torch.randn(2, 8, 20)),
    ],
)
def test_the_teachers_own_sections_replay_exactly(network: Callable[[], nn.Module], example: Batch) -> None:
    module = network()
    (section,) = find_sections(module, example)
    with torch.no_grad(), recording(module, [section]) as calls:
        forward(module, example)
    call = calls[section.name]
    blocks = section.blocks_in(module)
    with torch.no_grad():
        for _ in range(2):  # a cache of keys and values would grow
            again = run_section(blocks, call.input, call.arguments)
            assert (again - call.output).abs().max() <= 1e-5 * call.output.abs().max()
    if network is modern_bert:  # what a single block's arguments for all of them would give
        with torch.no_grad():
            again = run_section(blocks, call.input, [call.arguments[0]] * len(blocks))
        assert (again - call.output).abs().max() > 1e-3 * call.output.abs().max()


def test_caches_are_off_only_while_sections_are_recorded() -> None:
    module = llama()
    with recording(module, find_sections(module, TOKENS)):
        assert not module.config.use_cache
        assert forward(module, TOKENS).past_key_values is None
    assert module.config.use_cache


def test_a_block_gets_the_arguments_of_the_block_that_it_was_copied_from() -> None:
    teacher = modern_bert()
    (section,) = find_sections(teacher, TOKENS)
    student = make_student(teacher, {section.key: (0, 2, 3)}).eval()
    (own,) = own_sections(student, [section], {section.key: (0, 2, 3)})
    with torch.no_grad(), recording(teacher, [section]) as whole, recording(student, [own]) as calls:
        forward(teacher, TOKENS)
        forward(student, TOKENS)
    hidden, arguments = whole[section.name].input, own.own(whole[section.name].arguments)
    with torch.no_grad():
        assert torch.equal(run_section(own.blocks_in(student), hidden, arguments), calls[own.name].output)
