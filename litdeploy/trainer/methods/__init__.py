"""Methods: plans of phases. LIT, and what it is compared with on the same loop.

A method states which student it starts with and in which phases it trains. To add one, write a function that returns
its phases and add a row to `METHODS`.
"""

from __future__ import annotations

from litdeploy.trainer.methods.born_again import born_again, born_again_init
from litdeploy.trainer.methods.indistill import indistill
from litdeploy.trainer.methods.method import Init, Method, Start, TrainingPhase, Transition
from litdeploy.trainer.methods.plain import hint, kd, lit, scratch
from litdeploy.trainer.methods.slimming import slimming

__all__ = ["METHODS", "Init", "Method", "Start", "TrainingPhase", "Transition"]

METHODS: dict[str, Method] = {
    "lit": Method(lit),
    "kd": Method(kd),
    "hint": Method(hint),
    "scratch": Method(scratch, init=lambda recipe: "scratch", has_teacher=False),
    "born-again": Method(born_again, "whole", born_again_init),
    "indistill": Method(indistill, "own", lambda recipe: "scratch"),
    "slimming": Method(slimming, "whole", has_teacher=False),
}
