"""The source distribution holds what the repository does."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_source_distribution_is_complete(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    tree = tmp_path / "tree"
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)],
        cwd=tree,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("reformer_ext-*.tar.gz")
    with tarfile.open(archive) as files:
        names = {file.name.partition("/")[2] for file in files.getmembers() if file.isfile()}
    made = {name for name in names if name.startswith("reformer_ext.egg-info/")}
    assert names - made - {"PKG-INFO", "setup.cfg"} == tracked
