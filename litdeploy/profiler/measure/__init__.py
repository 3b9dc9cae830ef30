"""Timing teacher and student in turn: calls, samples, statistics, processes."""
