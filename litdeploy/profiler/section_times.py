"""Where the time goes: each section of teacher and student in eager PyTorch."""

from __future__ import annotations

from litdeploy.bundle import Record


class SectionTime(Record):
    """The time of one section in a call, or of all that is outside of the sections.

    Attributes:
        name: as of `breakdown.Part`: the section's container, or `stem and head`.
        batch_size: images a call.
        teacher_ms, student_ms: medians, measured side by side in eager PyTorch.
    """

    name: str
    batch_size: int
    teacher_ms: float
    student_ms: float
