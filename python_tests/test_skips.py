"""skips.py: in CI a skipped test is an error, unless it needs a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.skip(reason="needs a CUDA device beside the first")
def test_gpu(): ...

def test_tool():
    pytest.skip("needs a tool")

@pytest.mark.xfail(reason="known")
def test_known():
    raise AssertionError

def test_right(): ...
"""
MODULE = """
import pytest

pytest.importorskip("no_such_module", reason="needs a module")
"""


@pytest.mark.parametrize("ci", ["true", ""], ids=["ci", "elsewhere"])
def test_a_skip_is_an_error_in_ci(ci: str, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("skips.py"), tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_whole.py").write_text(MODULE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
    )
    assert "1 passed, 3 skipped, 1 xfailed" in done.stdout
    assert done.returncode == (1 if ci else 0), done.stdout
    _, _, unwanted = done.stdout.partition("skipped in CI: an error")
    assert ("test_some.py::test_tool: needs a tool" in unwanted) == bool(ci)
    assert ("test_whole.py: needs a module" in unwanted) == bool(ci)
    assert "test_gpu" not in done.stdout and "test_known" not in unwanted
