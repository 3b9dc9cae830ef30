"""What the student learns by: LIT, and the methods that it is measured against. One file a method.

An objective says what it needs of a step (`Objective`) and turns a step's `Outputs` into losses; a method says with
which student it starts and in which phases it trains (`Method`). Adding one is a class in a file here and a row in
`OBJECTIVES`.
"""

from __future__ import annotations

from litdeploy.trainer.objectives.adversarial import Adversarial
from litdeploy.trainer.objectives.born_again import BornAgain
from litdeploy.trainer.objectives.cross_entropy import CrossEntropy
from litdeploy.trainer.objectives.distillation import Distillation
from litdeploy.trainer.objectives.hint import Hint
from litdeploy.trainer.objectives.indistill import InDistill
from litdeploy.trainer.objectives.lit import Lit, LitSections
from litdeploy.trainer.objectives.objective import (
    Init,
    Method,
    Objective,
    Outputs,
    Start,
    TrainingPhase,
    check_fits,
)
from litdeploy.trainer.objectives.slimming import Slimming

__all__ = [
    "OBJECTIVES",
    "Adversarial",
    "BornAgain",
    "CrossEntropy",
    "Distillation",
    "Hint",
    "InDistill",
    "Init",
    "Lit",
    "LitSections",
    "Method",
    "Objective",
    "Outputs",
    "Slimming",
    "Start",
    "TrainingPhase",
    "check_fits",
]

OBJECTIVES: dict[str, type[Method]] = {
    "lit": Lit,
    "kd": Distillation,
    "hint": Hint,
    "scratch": CrossEntropy,
    "born-again": BornAgain,
    "indistill": InDistill,
    "slimming": Slimming,
}
