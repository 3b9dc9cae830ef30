"""The exporter's small student and bundle."""

from __future__ import annotations

from tests.exporter.conftest import bundle, student

__all__ = ["bundle", "student"]
