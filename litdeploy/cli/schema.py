"""`litdeploy schema`: the JSON Schema of report.json."""

from __future__ import annotations

import litdeploy
from litdeploy.cli.console import print_json


def command() -> None:
    """Print the JSON Schema of report.json, with the meaning of each field."""
    print_json(litdeploy.schema())
