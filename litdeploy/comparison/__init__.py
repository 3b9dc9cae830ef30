"""Compare methods: the same teacher, data and epochs, over depths and seeds."""

from litdeploy.comparison.comparison import Grid, GridCell, commands, compare
from litdeploy.comparison.report import MethodComparison

__all__ = ["Grid", "GridCell", "MethodComparison", "commands", "compare"]
