"""The C++ package: configured, built, tested, installed, and used there by examples/cpp."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path) -> str:
    # The environment's own cmake and ninja come first, also when it is not activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def build(source: Path, to: Path, *options: str) -> None:
    torch_cmake = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    run("cmake", "-S", source, "-B", to, "-G", "Ninja", torch_cmake, *options)
    run("cmake", "--build", to)


@pytest.fixture(scope="module")
def built() -> Path:
    """The build tree; kept under build/ so that a second run compiles only what changed."""
    tree = ROOT / "build" / f"cmake-torch-{torch.__version__}"
    build(ROOT, tree, "-DREFORMER_CUDA=OFF")
    return tree


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", built, "--prefix", prefix)
    return prefix


def test_ctest(built: Path) -> None:
    report = run("ctest", "--test-dir", built, "--output-on-failure")
    assert "100% tests passed" in report


def test_example_uses_installed_package(installed: Path, tmp_path: Path) -> None:
    build(ROOT / "examples" / "cpp", tmp_path, f"-Dreformer_ROOT={installed}")
    report = run(tmp_path / "example")
    assert report.endswith("ok\n")
    library = re.search(r"libreformer\.so => (\S+)", run("ldd", tmp_path / "example"))
    assert library
    assert Path(library[1]).is_relative_to(installed)


def test_library_needs_no_python(installed: Path) -> None:
    (library,) = installed.rglob("libreformer.so")
    undefined = run("nm", "-D", "--undefined-only", library)
    assert "c10" in undefined  # nm did list symbols
    assert not re.findall(r" U (_?Py\w+)", undefined)
    assert not re.findall(r"lib(?:torch_)?python\S*", run("ldd", library))


def test_header_is_all_that_is_installed(installed: Path) -> None:
    assert [p.name for p in (installed / "include").rglob("*")] == ["reformer.h"]
