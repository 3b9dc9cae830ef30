"""Timing of teacher and student in turn: calls, samples, statistics, processes."""
