from __future__ import annotations

import copy

import pytest
import torch

from litdeploy.networks.resnet import resnet
from litdeploy.networks.student import make_student
from litdeploy.recipe import Recipe
from litdeploy.trainer.objectives import CrossEntropy, Distillation, Hint, Lit, Objective
from litdeploy.trainer.step import forward, prepare, train_step
from litdeploy.trainer.teacher import Teacher

NAMES = ("layer1", "layer2", "layer3")
PLAN = dict.fromkeys(NAMES, (0,))
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 10


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(resnet(14, width=4), NAMES, torch.device("cpu"))


def test_branches_run_on_the_teachers_inputs(teacher: Teacher) -> None:
    student = make_student(teacher.module, PLAN)
    objective = Lit(Recipe(), NAMES)
    prepare(student, objective, NAMES)
    found = forward(student, teacher, objective, IMAGES, LABELS)
    assert tuple(found.branches) == NAMES
    with torch.no_grad():
        stem = torch.relu(teacher.module.bn1(teacher.module.conv1(IMAGES)))
        t1 = teacher.module.layer1(stem)
        t2 = teacher.module.layer2(t1)
    torch.testing.assert_close(found.branches["layer1"][1], t1)
    torch.testing.assert_close(found.branches["layer1"][0], student.layer1(stem))
    torch.testing.assert_close(found.branches["layer2"][0], student.layer2(t1))
    torch.testing.assert_close(found.branches["layer3"][0], student.layer3(t2))
    torch.testing.assert_close(found.teacher_logits, teacher.module(IMAGES))


def test_the_first_section_runs_once(teacher: Teacher) -> None:
    student = make_student(teacher.module, PLAN)
    objective = Lit(Recipe(), NAMES)
    prepare(student, objective, NAMES)
    runs = dict.fromkeys(NAMES, 0)

    def count(name: str) -> None:
        def hook(*_: object) -> None:
            runs[name] += 1

        getattr(student, name)[0].register_forward_hook(hook)

    for name in NAMES:
        count(name)
    forward(student, teacher, objective, IMAGES, LABELS)
    assert runs == {"layer1": 1, "layer2": 2, "layer3": 2}


def test_running_statistics_are_those_of_the_students_own_chain(teacher: Teacher) -> None:
    student = make_student(teacher.module, PLAN)
    objective = Lit(Recipe(), NAMES)
    prepare(student, objective, NAMES)
    alone = copy.deepcopy(student)
    forward(student, teacher, objective, IMAGES, LABELS)
    alone(IMAGES)
    expected = dict(alone.named_buffers())
    for name, value in student.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(value, expected[name], msg=name)
    assert student.layer3[0].bn1.momentum == 0.1


def test_what_is_frozen_stays_bit_equal_and_the_rest_moves(teacher: Teacher) -> None:
    student = make_student(teacher.module, {"layer1": (0,), "layer2": (0,)})
    names = ("layer1", "layer2")
    objective = Lit(Recipe(), names)
    frozen = Teacher(teacher.module, names, torch.device("cpu"))
    prepare(student, objective, names)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    teacher_before = {name: value.clone() for name, value in frozen.module.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.1)
    train_step(student, frozen, objective, optimiser, IMAGES, LABELS, "fp32")
    for name, value in student.state_dict().items():
        moved = name.startswith(names)
        assert torch.equal(value, before[name]) is not moved, name
    for name, value in frozen.module.state_dict().items():
        assert torch.equal(value, teacher_before[name])


@pytest.mark.parametrize(
    "objective", [Distillation(Recipe()), Hint(NAMES), CrossEntropy()], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_objective_learns(teacher: Teacher, objective: Objective, precision: str) -> None:
    student = make_student(teacher.module, PLAN)
    prepare(student, objective, NAMES)
    optimiser = torch.optim.SGD(student.parameters(), 0.05)
    steps = [
        train_step(student, teacher, objective, optimiser, IMAGES, LABELS, precision)["loss"].item() for _ in range(40)
    ]
    assert steps[-1] < 0.9 * steps[0]


def test_a_hint_trains_nothing_behind_its_section(teacher: Teacher) -> None:
    student = make_student(teacher.module, PLAN)
    objective = Hint(NAMES)
    prepare(student, objective, NAMES)
    objective.losses(forward(student, teacher, objective, IMAGES, LABELS))["loss"].backward()
    touched = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in touched} == {"conv1", "bn1", "layer1", "layer2"}


@pytest.mark.gpu
def test_a_step_on_cuda_equals_one_on_the_cpu(teacher: Teacher) -> None:
    losses = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        student = make_student(teacher.module, PLAN).to(device)
        objective = Lit(Recipe(), NAMES)
        prepare(student, objective, NAMES)
        there = Teacher(teacher.module, NAMES, device)
        optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.1)
        batch = IMAGES.to(device), LABELS.to(device)
        losses.append(
            [train_step(student, there, objective, optimiser, *batch, "fp32")["loss"].item() for _ in range(3)]
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
