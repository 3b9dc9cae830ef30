from __future__ import annotations

from pathlib import Path

import pytest

from litdeploy.errors import SettingsError
from litdeploy.profiler.report.outputs import check_output, write_output


def test_a_file_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.csv"
    write_output(path, "ä\n", "--csv")
    assert path.read_text(encoding="utf-8") == "ä\n"
    assert [file.name for file in path.parent.iterdir()] == ["x.csv"]


def test_what_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SettingsError, match=r"--csv .*folder cannot be made"):
        check_output(tmp_path / "taken" / "x.csv", "--csv")
    with pytest.raises(SettingsError, match=r"--html .*is a folder"):
        write_output(tmp_path, "", "--html")
