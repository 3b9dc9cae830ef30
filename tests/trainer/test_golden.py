"""LIT, held against transcriptions of the formula in plain PyTorch: none of litdeploy's code is in them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import DepthPlan
from litdeploy.networks.student import make_student
from litdeploy.trainer.objectives import Lit
from litdeploy.trainer.objectives.lit import LitSections
from litdeploy.trainer.step import Step
from litdeploy.trainer.teacher import Teacher
from tests import sections

ALPHA, BETA, TAU, WEIGHT, LR = 0.3, 0.6, 5.0, 2.0, 0.05


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return F.relu(y if self.stride > 1 else y + x)


class Net(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.one = nn.Sequential(*(Block(6, 6, 1) for _ in range(n)))
        self.two = nn.Sequential(Block(6, 8, 2), *(Block(8, 8, 1) for _ in range(n - 1)))
        self.three = nn.Sequential(Block(8, 10, 2), *(Block(10, 10, 1) for _ in range(n - 1)))
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.three(self.two(self.one(self.stem(x)))).mean((2, 3)))
        return y


def networks(deep: int = 3, shallow: int = 2) -> tuple[Net, Net]:
    """A teacher and a student of so many blocks in each section."""
    torch.manual_seed(7)
    teacher, student = Net(deep), Net(shallow)
    with torch.no_grad():  # statistics that are not those of a new network
        for _ in range(5):
            teacher(torch.randn(32, 3, 16, 16))
    student.stem.load_state_dict(teacher.stem.state_dict())
    student.head.load_state_dict(teacher.head.state_dict())
    return teacher, student


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (torch.randn(16, 3, 16, 16, generator=generator), torch.randint(4, (16,), generator=generator))
        for _ in range(10)
    ]


def transcription(teacher: Net, student: Net) -> list[float]:
    """Ten steps of LIT: stem and head frozen, each section on the teacher's input, the chain end to end."""
    teacher.eval().requires_grad_(False)
    student.eval().requires_grad_(False)
    sections = [student.one, student.two, student.three]
    for section in sections:
        section.train().requires_grad_(True)
    optimiser = torch.optim.SGD([p for s in sections for p in s.parameters()], LR, momentum=0.9, weight_decay=1e-4)
    losses = []
    for x, y in batches():
        t0 = teacher.stem(x)
        t1 = teacher.one(t0)
        t2 = teacher.two(t1)
        t3 = teacher.three(t2)
        t = teacher.head(t3.mean((2, 3)))
        branches = F.mse_loss(student.two(t1), t2) + F.mse_loss(student.three(t2), t3)
        s1 = student.one(student.stem(x))  # the stem is the teacher's: S_1(T_0) is the chain's own first section
        s = student.head(student.three(student.two(s1)).mean((2, 3)))
        soft = (F.softmax(t / TAU, 1) * (F.log_softmax(t / TAU, 1) - F.log_softmax(s / TAU, 1))).sum(1).mean()
        kd = ALPHA * F.cross_entropy(s, y) + (1 - ALPHA) * TAU**2 * soft
        loss = BETA * kd + (1 - BETA) * WEIGHT * (F.mse_loss(s1, t1) + branches)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


# How far parameters may be off after ten steps. Inductor's gradients differ from eager's by rounding (1e-6 of each),
# and an activation that thereby falls on the other side of a ReLU's kink makes 1.7e-4 of that on this network.
# Compiled with fewer blocks: each takes a C++ compiler seconds.
@pytest.mark.parametrize(
    ("compiled", "tolerance"),
    [(False, 1e-5), pytest.param(True, 1e-3, marks=pytest.mark.slow)],
    ids=["eager", "compiled"],
)
def test_ten_steps_equal_the_transcription(compiled: bool, tolerance: float) -> None:
    teacher, ours = networks(2, 1) if compiled else networks()
    theirs = copy.deepcopy(ours)
    expected = transcription(copy.deepcopy(teacher), theirs)

    names = ("one", "two", "three")
    objective = Lit(Recipe(alpha=ALPHA, beta=BETA, temperature=TAU, section_weight=WEIGHT), names)
    frozen = Teacher(
        teacher, sections.of(teacher, names), torch.zeros(1, 3, 16, 16), torch.device("cpu"), compiled=compiled
    )
    own = sections.of_student(ours, teacher, dict.fromkeys(names, tuple(range(len(ours.one)))))
    with Step(ours, objective, own, compiled=compiled) as step:
        optimiser = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], LR, 0.9, weight_decay=1e-4)
        found = [step(optimiser, x, y, frozen(x))["loss"].item() for x, y in batches()]

    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert found[-1] < 0.8 * found[0]
    # Parameters; which of the two forward passes batch norm's running statistics follow, the formula does not say.
    for (name, value), expected_value in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(value, expected_value, rtol=tolerance, atol=tolerance, msg=name)


def bert_batches() -> list[tuple[dict[str, Tensor], Tensor]]:
    """Texts of different lengths, padded behind; all of the third batch as long as they can be."""
    generator = torch.Generator().manual_seed(11)
    batches = []
    for number in range(6):
        lengths_N = torch.full((8,), 12) if number == 2 else torch.randint(3, 13, (8,), generator=generator)
        mask_NL = (torch.arange(12) < lengths_N[:, None]).long()
        ids_NL = torch.randint(5, 20, (8, 12), generator=generator) * mask_NL
        labels_N = torch.randint(2, (8,), generator=generator)
        batches.append(({"input_ids": ids_NL, "attention_mask": mask_NL}, labels_N))
    return batches


def bert_transcription(teacher: Any, student: Any, beta: float) -> list[float]:
    """Steps of LIT on a BERT, whose blocks are its one section: they are given the mask of the batch at hand."""
    teacher.eval().requires_grad_(False)
    student.eval().requires_grad_(False)  # and no block drops anything out: the configuration says so
    student.bert.encoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(student.bert.encoder.parameters(), LR)
    losses = []
    for x, y in bert_batches():
        # What transformers adds to the scores: nothing for a token, the lowest number for none.
        lowest = torch.finfo(torch.float32).min
        mask_N11L = (1.0 - x["attention_mask"].float())[:, None, None, :] * lowest

        def run(bert: Any, hidden: Tensor, mask: Tensor = mask_N11L) -> Tensor:
            for block in bert.encoder.layer:
                hidden = block(hidden, mask)
            return hidden

        def head(network: Any, hidden: Tensor) -> Tensor:
            logits: Tensor = network.classifier(network.bert.pooler(hidden))
            return logits

        t0 = teacher.bert.embeddings(input_ids=x["input_ids"])
        t1 = run(teacher.bert, t0)
        s1 = run(student.bert, t0)
        t, s = head(teacher, t1), head(student, s1)
        soft = (F.softmax(t / TAU, 1) * (F.log_softmax(t / TAU, 1) - F.log_softmax(s / TAU, 1))).sum(1).mean()
        kd = ALPHA * F.cross_entropy(s, y) + (1 - ALPHA) * TAU**2 * soft
        loss = beta * kd + (1 - beta) * WEIGHT * F.mse_loss(s1, t1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


# With β its section runs in the student's own chain, without on what was recorded of the teacher's, mask and all.
@pytest.mark.parametrize("beta", [BETA, 0.0])
def test_a_bert_equals_the_transcription(beta: float) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(3)
    teacher = transformers.BertForSequenceClassification(config)
    with torch.no_grad():  # else its hidden states hardly depend on the text
        for parameter in teacher.parameters():
            parameter.mul_(3.0)
    plan: DepthPlan = {"bert.encoder.layer": (0, 3)}
    ours = make_student(teacher, plan)
    theirs = copy.deepcopy(ours)
    expected = bert_transcription(copy.deepcopy(teacher), theirs, beta)

    names = ("bert.encoder.layer",)
    recipe = Recipe(alpha=ALPHA, beta=beta, temperature=TAU, section_weight=WEIGHT)
    objective = Lit(recipe, names) if beta else LitSections(recipe, names)
    # An example of one text without padding: what is recorded of it must not be taken for a batch's.
    frozen = Teacher(teacher, sections.of(teacher, names), bert_batches()[2][0], torch.device("cpu"))
    with Step(ours, objective, sections.of_student(ours, teacher, plan)) as step:
        optimiser = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], LR)
        found = [step(optimiser, x, y, frozen(x))["loss"].item() for x, y in bert_batches()]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert len(set(found)) == len(found)
