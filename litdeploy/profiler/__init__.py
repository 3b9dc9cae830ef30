"""How much faster the student is than its teacher, here, in what will be shipped, and what that cost in accuracy."""

from litdeploy.profiler.prediction import Prediction, predict
from litdeploy.profiler.profiler import profile
from litdeploy.profiler.report import Report, read_report

__all__ = ["Prediction", "Report", "predict", "profile", "read_report"]
