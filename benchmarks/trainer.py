"""The block trainer against the form in which LIT was published: python -m benchmarks.trainer [--device cuda] [--help]

Four ways to train one LIT student, timed turn by turn in one run:

published     eager, fp32, batch 32; the teacher as it is, the student's chain and each section's own pass over the
              teacher's input; the loss read on the host after every step
tuned         the same with our batch size, precision and memory format, and nothing else
ours          litdeploy's trainer as `compress` sets it up for a whole CIFAR run
ours_cached   the same once the teacher's features of all views are kept

All four begin with uint8 images in the device's memory and end with an updated student. The last line on the terminal
is one JSON object; `images_per_s` has the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import interleaved
from litdeploy.batch import moved
from litdeploy.config.recipe import Phase, Recipe
from litdeploy.config.spec import DepthPlan, InputSpec
from litdeploy.data import Data, augment, draw_crops, normalise, shuffled
from litdeploy.data.split import Resident
from litdeploy.networks import FAMILIES, Network, find_sections, new
from litdeploy.networks.sections import Section, recording, run_section
from litdeploy.networks.student import make_student, own_sections, plan_for_depth
from litdeploy.profiler.machine.roofline import count_work, measure_rates, roof
from litdeploy.runtime import device_name, resolve_device, resolve_precision
from litdeploy.trainer.distributed import ALONE
from litdeploy.trainer.feature_cache import FeatureCache, Layout
from litdeploy.trainer.kernels.reference import distillation_loss
from litdeploy.trainer.methods import TrainingPhase
from litdeploy.trainer.objectives import Lit
from litdeploy.trainer.plan import Plan
from litdeploy.trainer.progress import Callback
from litdeploy.trainer.resume import Checkpoints, Every
from litdeploy.trainer.step import (
    Step,
    compiles_step,
    compiles_teacher,
    forward_flops,
    inputs_needed,
    outputs_needed,
)
from litdeploy.trainer.teacher import Teacher
from litdeploy.trainer.trainer import Trainer

PUBLISHED_BATCH = 32
# What `compress` plans for, when it decides what is worth compiling.
CIFAR_IMAGES = 47_500
CHANNELS_LAST = torch.channels_last


class Plain:
    """LIT as its published code trains it: every section by a pass of its own, the loss read after each step."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        sections: Sequence[Section],
        plan: DepthPlan,
        spec: InputSpec,
        recipe: Recipe,
        precision: str,
        device: torch.device,
    ) -> None:
        self._teacher = teacher.eval().requires_grad_(False)
        self._student = student.train()
        self._sections = sections
        self._spec = spec
        self._recipe = recipe
        self._autocast = precision == "bf16"
        self._device = device
        self._own = {each.name: each for each in own_sections(student, sections, plan)}
        blocks = [block for each in self._own.values() for block in each.blocks_in(student)]
        parameters = [p for block in blocks for p in block.parameters()]
        self._optimiser = torch.optim.SGD(
            parameters, 0.01, momentum=recipe.momentum, weight_decay=recipe.weight_decay or 0.0
        )

    def pass_over(self, split: Resident) -> None:
        order, draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        batches = shuffled(len(split), self._recipe.batch_size, order)
        for indices_N, picked in zip(batches, split.pick(batches), strict=True):
            crops = draw_crops(len(indices_N), self._recipe.augmentation, draws).to(self._device)
            images_NCHW = picked.images()
            assert isinstance(images_NCHW, Tensor)
            self.step(normalise(augment(images_NCHW, crops), self._spec), picked.labels_N)

    def step(self, images_NCHW: Tensor, labels_N: Tensor) -> float:
        recipe = self._recipe
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            with torch.no_grad(), recording(self._teacher, self._sections) as calls:
                teacher_logits_NK = self._teacher(images_NCHW)
            logits_NK = self._student(images_NCHW)
            branches = [
                F.mse_loss(
                    run_section(
                        self._own[name].blocks_in(self._student), call.input, self._own[name].own(call.arguments)
                    ).float(),
                    call.output.float(),
                )
                for name, call in calls.items()
            ]
            kd = distillation_loss(
                logits_NK.float(), teacher_logits_NK.float(), labels_N, recipe.alpha, recipe.temperature
            )
            loss = recipe.beta * kd + (1 - recipe.beta) * recipe.section_weight * torch.stack(branches).sum()
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        return loss.item()


def ours(
    teacher: Teacher,
    student: Network,
    sections: Sequence[Section],
    plan: DepthPlan,
    recipe: Recipe,
    precision: str,
    device: torch.device,
    split: Resident,
    cached: bool,
) -> Trainer:
    """Our trainer; with a cache of the teacher's features of one view of each image, if `cached`."""
    own = own_sections(student.module, sections, plan)
    objective = Lit(recipe, [section.name for section in own])
    nowhere = Path(os.devnull)
    trainer = Trainer(
        Plan(recipe, student, [], tuple(own), tuple(sections)),
        cast(Data, SimpleNamespace(train=split, noun="image", classes=(), given=False)),
        precision,
        device,
        nowhere,
        nowhere,
        Callback(),
        ALONE,
        Checkpoints(nowhere, {}, Every(), print),
    )
    trainer.teacher = teacher
    if cached:
        layout = Layout.of(teacher.template, inputs_needed(objective, own), outputs_needed(objective))
        assert layout is not None
        trainer.cache = FeatureCache(teacher.template, layout, 1, len(split), recipe.augmentation.padding or 0, device)
    return trainer


def _pass(trainer: Trainer) -> None:
    trainer.train_epoch()
    trainer.position.end_epoch({})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = _arguments(argv)
    device = resolve_device(arguments.device)
    precision = resolve_precision(arguments.precision, device)
    torch.manual_seed(0)
    recipe = Recipe(student_depth=arguments.student, batch_size=arguments.batch_size).filled("sgd")
    made = new(arguments.teacher, normalise="cifar10", input_shape=(3, 32, 32), classes=10, seed=0)
    spec = made.spec.input
    assert isinstance(spec, InputSpec)
    found = find_sections(made.module, made.example())
    plan = plan_for_depth(found, arguments.student, FAMILIES.get(made.spec.name))
    sections = [section for section in found if section.key in plan]

    def network(memory_format: torch.memory_format) -> nn.Module:
        again = new(arguments.teacher, normalise="cifar10", input_shape=(3, 32, 32), classes=10, seed=0)
        return again.module.to(device, memory_format=memory_format)  # type: ignore[call-overload, no-any-return]

    def student(memory_format: torch.memory_format) -> nn.Module:
        return make_student(made.module, plan).to(device, memory_format=memory_format)  # type: ignore[call-overload, no-any-return]

    images = arguments.batch_size * arguments.steps
    split = Resident(
        torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, device=device),
        torch.randint(10, (images,), device=device),
    )
    published = Plain(
        network(torch.contiguous_format),
        student(torch.contiguous_format),
        sections,
        plan,
        spec,
        recipe.model_copy(update={"batch_size": PUBLISHED_BATCH}),
        "fp32",
        device,
    )
    tuned = Plain(network(CHANNELS_LAST), student(CHANNELS_LAST), sections, plan, spec, recipe, precision, device)
    run_images = recipe.epochs * CIFAR_IMAGES
    teacher_compiled = compiles_teacher(
        arguments.compile, run_images * forward_flops(made.module, made.example()), device
    )
    step_compiled = compiles_step(
        arguments.compile, 3 * run_images * forward_flops(student(CHANNELS_LAST), moved(made.example(), device)), device
    )
    frozen = Teacher(made.module, sections, made.example(), device, precision, teacher_compiled)
    set_up = recipe.model_copy(update={"compile": "on" if step_compiled else "off"})
    constant = Phase(epochs=recipe.epochs, learning_rate=0.01, schedule="step")
    with ExitStack() as held:
        fresh, kept = (
            ours(
                frozen,
                Network(student(CHANNELS_LAST), made.spec, "student"),
                sections,
                plan,
                set_up,
                precision,
                device,
                split,
                cached,
            )
            for cached in (False, True)
        )
        for trainer in (fresh, kept):
            held.enter_context(trainer)
            held.enter_context(
                trainer.begun(TrainingPhase("lit", constant, Lit(set_up, [section.name for section in sections])))
            )
        candidates: dict[str, Callable[[], Any]] = {
            # As many images as the others, in more steps.
            "published": lambda: published.pass_over(split),
            "tuned": lambda: tuned.pass_over(split),
            "ours": lambda: _pass(fresh),
            "ours_cached": lambda: _pass(kept),
        }
        for _ in range(2):  # compiles, captures, fills the cache
            candidates["ours"]()
            candidates["ours_cached"]()
        seconds = interleaved.seconds(candidates, device, arguments.rounds, arguments.limit)
        roofs = _roofs(published, tuned, fresh.step, frozen, recipe, precision, device)
    result = _result(arguments, device, precision, images, seconds, roofs, teacher_compiled, step_compiled)
    _show(result)
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("images_per_s", "speedup_over_published", "device", "precision")}))
    return result


def _roofs(
    published: Plain,
    tuned: Plain,
    step: Step,
    teacher: Teacher,
    recipe: Recipe,
    precision: str,
    device: torch.device,
) -> dict[str, Any]:
    """For each candidate what it computes and moves an image, and the shortest time for that on this device."""
    images_NCHW = torch.randn(recipe.batch_size, 3, 32, 32, device=device).to(memory_format=CHANNELS_LAST)
    labels_N = torch.zeros(recipe.batch_size, dtype=torch.int64, device=device)
    features = teacher.eager(images_NCHW)

    def train() -> None:
        step.losses(images_NCHW, labels_N, features)["loss"].backward()  # type: ignore[no-untyped-call]

    trained, taught = count_work(train), count_work(lambda: teacher.eager(images_NCHW))
    few_NCHW, few_N = images_NCHW[:PUBLISHED_BATCH].contiguous(), labels_N[:PUBLISHED_BATCH]
    works = {
        "published": (count_work(lambda: published.step(few_NCHW, few_N)), PUBLISHED_BATCH, torch.float32),
        "tuned": (count_work(lambda: tuned.step(images_NCHW, labels_N)), recipe.batch_size, _dtype(precision)),
        "ours": (
            replace(trained, operations=trained.operations + taught.operations, bytes=trained.bytes + taught.bytes),
            recipe.batch_size,
            _dtype(precision),
        ),
        "ours_cached": (trained, recipe.batch_size, _dtype(precision)),
    }
    rates = {dtype: measure_rates(device, dtype) for dtype in {torch.float32, _dtype(precision)}}
    return {
        "rates": {str(dtype).removeprefix("torch."): asdict(rate) for dtype, rate in rates.items()},
        "an_image": {
            name: {
                **{key: value / batch for key, value in asdict(work).items()},
                **{key: value / batch for key, value in asdict(roof(work, rates[dtype])).items()},
            }
            for name, (work, batch, dtype) in works.items()
        },
    }


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _result(
    arguments: argparse.Namespace,
    device: torch.device,
    precision: str,
    images: int,
    seconds: dict[str, list[float]],
    roofs: dict[str, Any],
    teacher_compiled: bool,
    step_compiled: bool,
) -> dict[str, Any]:
    per_second = {name: interleaved.median([images / each for each in found]) for name, found in seconds.items()}
    return {
        "command": "python -m benchmarks.trainer " + " ".join(sys.argv[1:]),
        "teacher": arguments.teacher,
        "student_depth": arguments.student,
        "batch_size": arguments.batch_size,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "compiled": {"teacher": teacher_compiled, "step": step_compiled},
        "captured": device.type == "cuda",
        "rounds": len(seconds["ours"]),
        "images_a_round": images,
        "images_per_s": {name: round(interval.value, 1) for name, interval in per_second.items()},
        "images_per_s_interval": {name: [interval.low, interval.high] for name, interval in per_second.items()},
        "speedup_over_published": _ratios(seconds, "published"),
        "speedup_over_tuned": _ratios(seconds, "tuned"),
        "share_of_roof": {
            name: round(per_second[name].value * found["seconds"], 3) for name, found in roofs["an_image"].items()
        },
        "roof": roofs,
    }


def _ratios(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    return {
        name: {key: round(value, 3) for key, value in asdict(interleaved.ratio(seconds[base], found)).items()}
        for name, found in seconds.items()
    }


def _show(result: dict[str, Any]) -> None:
    print(
        f"{result['teacher']} → depth {result['student_depth']}, batch {result['batch_size']}, {result['precision']}, "
        f"{result['device']}, {result['threads']} threads, torch {result['versions']['torch']}; compiled: "
        f"{', '.join(name for name, is_so in result['compiled'].items() if is_so) or 'nothing'}; "
        f"{result['rounds']} rounds of {result['images_a_round']} images\n"
    )
    print("| | images/s (95 %) | × published (95 %) | × tuned | GFLOP an image | MB an image | share of roof |")
    print("|---|---|---|---|---|---|---|")
    for name, value in result["images_per_s"].items():
        low, high = result["images_per_s_interval"][name]
        published, tuned = result["speedup_over_published"][name], result["speedup_over_tuned"][name]
        work = result["roof"]["an_image"][name]
        print(
            f"| {name} | {value:,.0f} ({low:,.0f}–{high:,.0f}) "
            f"| {published['value']:.2f} ({published['low']:.2f}–{published['high']:.2f}) | {tuned['value']:.2f} "
            f"| {work['operations'] / 1e9:.2f} | {work['bytes'] / 1e6:.1f} | {result['share_of_roof'][name]:.0%} |"
        )
    for name, rate in result["roof"]["rates"].items():
        print(
            f"\nmeasured, {name}: {rate['operations'] / 1e9:,.0f} GFLOP/s, {rate['bytes'] / 1e9:,.1f} GB/s of copying"
        )
    print(
        "\nCounted: convolutions and matrix products, forward and backward, each reading what it is given and writing "
        "what it gives once. Roof: the longer of operations / matmul rate and bytes / copy bandwidth."
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description="See the module's docstring.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--teacher", default="resnet110")
    parser.add_argument("--student", default="20", type=_depth, help="resnet20, or 20")
    parser.add_argument("--batch-size", default=Recipe().batch_size, type=int)
    parser.add_argument("--steps", default=4, type=int, help="of our batch size, a round")
    parser.add_argument("--rounds", default=15, type=int)
    parser.add_argument("--limit", default=300.0, type=float, help="seconds; no round begins after them")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--out", default=None, help="the JSON file to write")
    return parser.parse_args(argv)


def _depth(text: str) -> int:
    return int("".join(letter for letter in text if letter.isdigit()))


if __name__ == "__main__":
    main()
