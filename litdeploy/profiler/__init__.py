"""How much faster the student is than its teacher, here, in what will be shipped, and what that cost in accuracy."""

from litdeploy.profiler.gates import check_gates
from litdeploy.profiler.prediction import Prediction, predict
from litdeploy.profiler.profiler import profile
from litdeploy.profiler.report import Report
from litdeploy.profiler.report_files import read_report
from litdeploy.profiler.side_by_side import SideBySide, compare_reports

__all__ = ["Prediction", "Report", "SideBySide", "check_gates", "compare_reports", "predict", "profile", "read_report"]
