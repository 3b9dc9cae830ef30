"""Losses that a student is trained with. One file each for LIT, logits, InDistill and the adversarial loss.

An objective declares what it needs from a step (`Objective`) and turns the step's `Outputs` into losses. When each one
is used is a method's decision: see `litdeploy.trainer.methods`.
"""

from __future__ import annotations

from litdeploy.trainer.objectives.adversarial import Adversarial
from litdeploy.trainer.objectives.indistill import Layer, ProbabilisticTransfer
from litdeploy.trainer.objectives.lit import Lit, LitSections
from litdeploy.trainer.objectives.logits import CrossEntropy, Distillation, Hint, SparseCrossEntropy
from litdeploy.trainer.objectives.objective import Objective, Outputs

__all__ = [
    "Adversarial",
    "CrossEntropy",
    "Distillation",
    "Hint",
    "Layer",
    "Lit",
    "LitSections",
    "Objective",
    "Outputs",
    "ProbabilisticTransfer",
    "SparseCrossEntropy",
]
