"""`litdeploy inspect`: what a file holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import output, print_json
from litdeploy.cli.recipe_options import changes, recipe_options

if TYPE_CHECKING:
    from litdeploy.inspection import FoundNetwork


@recipe_options({"network", "normalise", "input_shape"})
def command(file: o.AnyFile, json: o.Json = False, **given: Any) -> None:
    """Show which network a file holds, its sections, and the possible depths of a student."""
    from litdeploy.inspection import FoundNetwork

    found = litdeploy.inspect(file, **changes(given))
    if json:
        print_json(found.model_dump(mode="json"))
    elif isinstance(found, FoundNetwork):
        _show_network(found)
    else:
        for key, value in found.model_dump(mode="json").items():
            output.print(f"{key:<16} {value}", highlight=False)


def _show_network(found: FoundNetwork) -> None:
    named = f" ({', '.join(found.class_names[:10])})" if found.class_names else ""
    lines = {
        "network": found.title,
        "named": found.network,
        "task": found.task,
        "classes": f"{found.classes}{named}" if found.classes else "",
        "input": found.input.summary(),
        "parameters": f"{found.breakdown.parameters:,}",
        "FLOPs": f"{found.breakdown.flops:,} per {found.input.noun} (a multiply-add is two)",
        "SHA-256": found.sha256,
    }
    for key, value in lines.items():
        if value:
            output.print(f"{key:<12} {value}", highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("section")
    for name in ("blocks", "parameters", "FLOPs"):
        table.add_column(name, justify="right")
    for part in found.breakdown.parts:
        table.add_row(
            part.name, "" if part.blocks is None else str(part.blocks), f"{part.parameters:,}", f"{part.flops:,}"
        )
    if len(found.breakdown.parts) > 1:
        output.print(table)
    else:  # stem and head alone
        output.print("no sections: the network has no repeated blocks that can be left out", highlight=False)
    for each in found.candidates:
        output.print(
            f"no section   {each.name} ({each.blocks} modules): {each.reason}. It would be one with: {each.remedy}",
            highlight=False,
            markup=False,
        )
    if found.student_depths:
        depths = ", ".join(map(str, found.student_depths))
        shallower = [depth for depth in found.student_depths if depth < found.breakdown.depth]
        chain = f" (one; a chain: {shallower[-1]},{shallower[0]})" if len(shallower) > 1 else ""
        output.print(f"{'students':<12} --student-depth {depths}{chain}", highlight=False)
    if found.plan:
        kept = "; ".join(f"{name} {', '.join(map(str, blocks))}" for name, blocks in found.plan.items())
        output.print(f"{'student':<12} keeps the teacher's blocks {kept}", highlight=False)
    if found.narrowed:
        output.print(
            f"{'' if found.plan else 'student':<12} without some channels of {found.narrowed} layers", highlight=False
        )
