"""What the student learns by: LIT, and the methods that it is measured against. One file a method.

An objective says what it needs of a step (`Objective`), turns a step's `Outputs` into losses, and says in which phases
its method trains. Adding one is a class in a file here and a row in `OBJECTIVES`.
"""

from __future__ import annotations

from litdeploy.trainer.objectives.cross_entropy import CrossEntropy
from litdeploy.trainer.objectives.distillation import Distillation
from litdeploy.trainer.objectives.hint import Hint
from litdeploy.trainer.objectives.lit import Lit, LitSections
from litdeploy.trainer.objectives.objective import Init, Objective, Outputs, TrainingPhase

__all__ = [
    "OBJECTIVES",
    "CrossEntropy",
    "Distillation",
    "Hint",
    "Init",
    "Lit",
    "LitSections",
    "Objective",
    "Outputs",
    "TrainingPhase",
]

OBJECTIVES: dict[str, type[Lit] | type[Distillation] | type[Hint] | type[CrossEntropy]] = {
    "lit": Lit,
    "kd": Distillation,
    "hint": Hint,
    "scratch": CrossEntropy,
}
