"""How much faster the student is than its teacher on this machine, in the exported form, and the cost in accuracy."""

from litdeploy.profiler.analysis.diff import ReportDiff, compare_reports
from litdeploy.profiler.analysis.verdict import check_gates
from litdeploy.profiler.predict import predict
from litdeploy.profiler.profile import profile
from litdeploy.profiler.schema import Prediction, Report, read_report

__all__ = ["Prediction", "Report", "ReportDiff", "check_gates", "compare_reports", "predict", "profile", "read_report"]
