"""The comparison as one page that needs nothing beside itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from litdeploy.comparison.result import headline

if TYPE_CHECKING:
    from litdeploy.comparison.result import MethodComparison


def render(result: MethodComparison, figure: Markup | None) -> str:
    """The page as HTML. Whatever came from files (names, paths) is escaped."""
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("litdeploy.comparison", "templates"), PackageLoader("litdeploy.profiler", "templates")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("comparison.html.j2").render(
        result=result,
        headline=headline(result.rows),
        figure=figure,
        recipe=yaml.safe_dump(result.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
        devices=sorted({outcome.device for outcome in result.outcomes}),
    )
