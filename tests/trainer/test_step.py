from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import DepthPlan
from litdeploy.errors import CompilationError
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.student import make_student
from litdeploy.trainer.objectives import CrossEntropy, Distillation, Hint, Lit, LitSections, Objective
from litdeploy.trainer.step import (
    Captured,
    Step,
    compiles_step,
    compiles_teacher,
    fallback,
    forward_flops,
    section_flops,
    side_by_side,
)
from litdeploy.trainer.teacher import Teacher
from tests import sections

NAMES = ("layer1", "layer2", "layer3")
PLAN: DepthPlan = dict.fromkeys(NAMES, (0,))
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 10


CPU = torch.device("cpu")


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return resnet(14, width=4).eval()


@pytest.fixture
def teacher(module: nn.Module) -> Teacher:
    return Teacher(module, sections.of(module, NAMES), IMAGES, CPU)


def sgd(student: nn.Module, learning_rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in student.parameters() if p.requires_grad], learning_rate)


def test_branches_run_on_the_teachers_inputs(module: nn.Module, teacher: Teacher) -> None:
    student = make_student(module, PLAN)
    with Step(student, Lit(Recipe(), NAMES), sections.of_student(student, module, PLAN)) as step:
        found = step.outputs(IMAGES, LABELS, teacher(IMAGES))
    assert tuple(found.branches) == NAMES
    with torch.no_grad():
        stem = torch.relu(module.bn1(module.conv1(IMAGES)))
        t1 = module.layer1(stem)
        t2 = module.layer2(t1)
    close = {"rtol": 1e-4, "atol": 1e-4}  # the teacher is folded, the module is not
    torch.testing.assert_close(found.branches["layer1"][1], t1, **close)
    torch.testing.assert_close(found.branches["layer1"][0], student.layer1(stem), **close)
    torch.testing.assert_close(found.branches["layer2"][0], student.layer2(t1), **close)
    torch.testing.assert_close(found.branches["layer3"][0], student.layer3(t2), **close)
    torch.testing.assert_close(found.teacher_output, module(IMAGES), **close)


def test_no_section_runs_twice_on_the_same_input(module: nn.Module, teacher: Teacher) -> None:
    student = make_student(module, PLAN)
    with Step(student, Lit(Recipe(), NAMES), sections.of_student(student, module, PLAN)) as step:
        features = teacher(IMAGES)
        with FlopCounterMode(display=False) as whole:
            step.outputs(IMAGES, LABELS, features)
    alone = {}
    for name, given in {"": IMAGES, **{name: features.calls[name].input for name in NAMES}}.items():
        with FlopCounterMode(display=False) as counted:
            student.get_submodule(name)(given)
        alone[name] = counted.get_total_flops()
    # The chain, and a branch for each section but the first.
    assert whole.get_total_flops() == alone[""] + alone["layer2"] + alone["layer3"]


def test_sections_alone_run_no_chain(module: nn.Module, teacher: Teacher) -> None:
    student = make_student(module, PLAN)
    features = teacher(IMAGES)
    with (
        Step(student, LitSections(Recipe(beta=0.0), NAMES), sections.of_student(student, module, PLAN)) as step,
        FlopCounterMode(display=False) as whole,
    ):
        found = step.outputs(IMAGES, LABELS, features)
    with FlopCounterMode(display=False) as parts:
        for name in NAMES:
            student.get_submodule(name)(features.calls[name].input)
    assert whole.get_total_flops() == parts.get_total_flops()
    assert tuple(found.branches) == NAMES
    assert found.logits.numel() == 0


def test_divided_sections_come_out_the_same(module: nn.Module, teacher: Teacher) -> None:
    def trained(*parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
        student = make_student(module, PLAN)
        for names in parts:
            own = sections.of_student(student, module, dict.fromkeys(names, (0,)))
            with Step(student, LitSections(Recipe(beta=0.0), names), own) as step:
                optimiser = sgd(student)
                for _ in range(3):
                    step(optimiser, IMAGES, LABELS, teacher(IMAGES))
        return student.state_dict()

    together, divided = trained(NAMES), trained(("layer2",), ("layer1", "layer3"))
    assert all(torch.equal(value, divided[name]) for name, value in together.items())


def test_running_statistics_are_those_of_the_students_own_chain(module: nn.Module, teacher: Teacher) -> None:
    student = make_student(module, PLAN)
    with Step(student, Lit(Recipe(), NAMES), sections.of_student(student, module, PLAN)) as step:
        alone = copy.deepcopy(student)
        step.outputs(IMAGES, LABELS, teacher(IMAGES))
        alone(IMAGES)
    expected = dict(alone.named_buffers())
    for name, value in student.named_buffers():
        torch.testing.assert_close(value, expected[name], msg=name)


class PreNorm(nn.Sequential):
    """A block as PoolFormer's begin: its group norm is the first to see what the teacher gives."""

    def __init__(self) -> None:
        super().__init__(nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(super().forward(x))


def strided(channels: int) -> nn.Sequential:
    """Blocks of which the first halves the image, as the shortcut of a residual section does."""
    return nn.Sequential(nn.Conv2d(channels, 8, 1, 2, bias=False), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))


@pytest.mark.parametrize("objective", [Lit(Recipe(), ["1"]), LitSections(Recipe(), ["1"])], ids=["lit", "sections"])
@pytest.mark.parametrize(
    ("channels", "blocks"), [(8, nn.Sequential(PreNorm(), PreNorm())), (4, strided(4))], ids=["norms", "strides"]
)
def test_the_gradients_do_not_depend_on_the_memory_format(
    objective: Objective, channels: int, blocks: nn.Sequential
) -> None:
    """torch's own way would end the process."""
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    module = nn.Sequential(nn.Conv2d(3, channels, 3), blocks, *head).eval()
    teacher = Teacher(module, sections.of(module, ["1"]), IMAGES, CPU)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        student = make_student(module, {"1": (0,)}).to(memory_format=layout)  # type: ignore[call-overload]
        with Step(student, objective, sections.of_student(student, module, {"1": (0,)})) as step:
            images = IMAGES.contiguous(memory_format=layout)
            step.losses(images, LABELS, teacher(images))["loss"].backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert {"1.0.0.weight", "1.0.weight"} & set(gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(("channels", "compiled"), [(3, False), (7, False), (12, False), (4, True)])
def test_strided_convolutions_of_few_channels_get_their_gradients(channels: int, compiled: bool) -> None:
    """oneDNN's own backward pass would end the process, or be wrong, with AVX2 (8 channels) or AVX-512 (16)."""
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    student = nn.Sequential(nn.Conv2d(3, channels, 3), strided(channels), *head)
    exact = copy.deepcopy(student).double()
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start = IMAGES.contiguous(memory_format=torch.channels_last)
    nn.functional.cross_entropy(exact(IMAGES.double()), LABELS).backward()  # type: ignore[no-untyped-call]
    before = student(start)
    with Step(student, CrossEntropy(), (), compiled=compiled) as step:
        step(sgd(student), start, LABELS, None)
        gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
        state = copy.deepcopy(student.state_dict())
        with torch.no_grad():
            inside = student.eval()(start)
    assert student[1][0].stride == (2, 2)
    assert list(state) == list(exact.state_dict())
    torch.testing.assert_close(gradients, {name: p.grad.float() for name, p in exact.named_parameters()})  # type: ignore[union-attr]
    torch.testing.assert_close(student(start), inside)
    assert not torch.equal(inside, before)


def test_the_student_is_left_without_hooks(module: nn.Module) -> None:
    student = make_student(module, PLAN)
    with Step(student, Lit(Recipe(), NAMES), sections.of_student(student, module, PLAN)):
        assert student.layer1[0]._forward_pre_hooks
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in student.modules())


def test_what_is_frozen_stays_bit_equal_and_the_rest_moves(module: nn.Module) -> None:
    plan: DepthPlan = {"layer1": (0,), "layer2": (0,)}
    student, names = make_student(module, plan), ("layer1", "layer2")
    frozen = Teacher(module, sections.of(module, names), IMAGES, CPU)
    with Step(student, Lit(Recipe(), names), sections.of_student(student, module, plan)) as step:
        before = {name: value.clone() for name, value in student.state_dict().items()}
        teacher_before = {name: value.clone() for name, value in frozen.module.state_dict().items()}
        step(sgd(student), IMAGES, LABELS, frozen(IMAGES))
    for name, value in student.state_dict().items():
        moved = name.startswith(names)
        assert torch.equal(value, before[name]) is not moved, name
    for name, value in frozen.module.state_dict().items():
        assert torch.equal(value, teacher_before[name])


@pytest.mark.parametrize(
    "objective", [Distillation(Recipe()), Hint(NAMES), CrossEntropy()], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_objective_learns(module: nn.Module, objective: Objective, precision: str) -> None:
    student = make_student(module, PLAN)
    teacher = Teacher(module, sections.of(module, NAMES), IMAGES, CPU, precision)
    optimiser = torch.optim.SGD(student.parameters(), 0.05)
    with Step(student, objective, sections.of_student(student, module, PLAN), precision) as step:
        losses = [step(optimiser, IMAGES, LABELS, teacher(IMAGES))["loss"].item() for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]


def test_images_in_the_training_precision_give_the_same_losses(module: nn.Module, teacher: Teacher) -> None:
    student = make_student(module, PLAN)
    with Step(student, Lit(Recipe(), NAMES), sections.of_student(student, module, PLAN), "bf16") as step:
        wide, narrow = (step.losses(images, LABELS, teacher(IMAGES)) for images in (IMAGES, IMAGES.bfloat16()))
    for name, loss in wide.items():
        assert torch.equal(narrow[name], loss), name


def test_a_hint_trains_nothing_behind_its_section(module: nn.Module, teacher: Teacher) -> None:
    student = make_student(module, PLAN)
    with Step(student, Hint(NAMES), sections.of_student(student, module, PLAN)) as step:
        step.losses(IMAGES, LABELS, teacher(IMAGES))["loss"].backward()
    touched = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in touched} == {"conv1", "bn1", "layer1", "layer2"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_cuda_equals_one_on_the_cpu(module: nn.Module) -> None:
    losses = []
    for device in (CPU, torch.device("cuda")):
        student = make_student(module, PLAN).to(device)
        there = Teacher(module, sections.of(module, NAMES), IMAGES, device)
        images, labels = IMAGES.to(device), LABELS.to(device)
        with Step(student, Lit(Recipe(), NAMES), sections.of_student(student, module, PLAN)) as step:
            optimiser = sgd(student)
            losses.append([step(optimiser, images, labels, there(images))["loss"].item() for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_without_streams_they_run_where_they_are() -> None:
    found, others = side_by_side(lambda: torch.ones(1), [lambda: torch.zeros(1), lambda: torch.full((1,), 2.0)], [])
    assert (found.item(), [other.item() for other in others]) == (1, [0, 2])


@pytest.mark.gpu
def test_side_by_side_gives_the_same_values_and_gradients() -> None:
    weights = [torch.randn(512, 512, device="cuda", requires_grad=True) for _ in range(4)]
    given = torch.randn(512, 512, device="cuda")

    def work(weight: torch.Tensor) -> torch.Tensor:
        value = given
        for _ in range(20):
            value = torch.tanh(value @ weight)
        return value

    results = []
    for streams in ([], [torch.cuda.Stream() for _ in range(3)]):  # type: ignore[no-untyped-call]
        found, others = side_by_side(
            lambda: work(weights[0]), [lambda i=i: work(weights[i]) for i in (1, 2, 3)], streams
        )
        loss = sum(value.square().mean() for value in (found, *others))
        results.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


class Sum:
    """Adds what it is given to a state on the device, and counts how often Python itself ran it."""

    def __init__(self, synchronises: bool = False) -> None:
        self.state = torch.zeros(4, device="cuda")
        self.calls = 0
        self._synchronises = synchronises

    def __call__(self, table: Tensor, rows: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        self.state += table.index_select(0, rows).sum(0)
        if self._synchronises and self.state.sum().item() < 0:
            raise AssertionError
        return {"state": self.state * 2}


def expected(table: Tensor, batches: list[Tensor]) -> list[Tensor]:
    return list(2 * torch.stack([table[rows].sum(0) for rows in batches]).cumsum(0))


@pytest.mark.gpu
def test_replayed_it_does_what_it_did() -> None:
    table = torch.arange(40.0, device="cuda").view(10, 4)
    batches = [torch.tensor([i, (3 * i) % 10], device="cuda") for i in range(8)]
    function = Sum()
    captured = Captured(function)
    found = [captured(table, rows)["state"].clone() for rows in batches]
    for a, b in zip(found, expected(table, batches), strict=True):
        torch.testing.assert_close(a, b)
    assert function.calls == 4  # three eager ones, and the one that was recorded


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_as_it_is_and_says_so() -> None:
    table = torch.arange(40.0, device="cuda").view(10, 4)
    batches = [torch.tensor([i, i], device="cuda") for i in range(6)]
    captured = Captured(Sum(synchronises=True))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [captured(table, rows)["state"].clone() for rows in batches]
    assert "could not be captured as a CUDA graph" in str(told[0].message)
    for a, b in zip(found, expected(table, batches), strict=True):
        torch.testing.assert_close(a, b)


def test_forward_flops_counts_a_multiply_add_as_two() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.Flatten())
    assert forward_flops(module, torch.zeros(4, 3, 10, 10)) == 2 * 8 * 3 * 3 * 3 * 100


def test_forward_flops_leaves_the_module_as_it_is() -> None:
    module = resnet(8, width=4).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert forward_flops(module, torch.randn(2, 3, 8, 8)) > 0
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_section_flops_are_those_of_the_parts() -> None:
    module, example = resnet(14, width=4), torch.randn(2, 3, 8, 8)
    found = section_flops(module, sections.of(module, NAMES), example)
    around = 2 * 4 * 3 * 3 * 3 * 64 + 2 * 16 * 10  # stem and head
    assert sum(found.values()) + around == forward_flops(module, example)
    assert found["layer1"] == 4 * 2 * 4 * 4 * 3 * 3 * 64
    assert list(found) == ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize("decide", [compiles_teacher, compiles_step])
def test_compiling_is_by_choice_or_by_what_it_saves(decide: Any) -> None:
    assert decide("on", 0, CPU)
    assert decide("on", 0, torch.device("cuda"))
    assert not decide("off", 1e18, CPU)
    assert decide("auto", 1e18, CPU)
    assert not decide("auto", 1e9, CPU)
    assert not decide("auto", 1e18, torch.device("cuda"))


def test_a_failed_compilation_is_told_or_an_error() -> None:
    notes: list[str] = []
    fallback("auto", notes.append)("no compiler")
    assert notes == ["warning: not compiled, and slower for it: no compiler"]
    with pytest.raises(CompilationError, match=r"no compiler.*apt-get install g\+\+.*--compile off"):
        fallback("on", notes.append)("no compiler")
