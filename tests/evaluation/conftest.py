"""The exporter's small student."""

from __future__ import annotations

from tests.exporter.conftest import student

__all__ = ["student"]
