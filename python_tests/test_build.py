"""Building and loading: what decides on CUDA, what a wrong torch is told, what is bound."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reformer_ext
from reformer_ext import _C
from reformer_ext.info import info

PACKAGE = Path(reformer_ext.__file__).parent
ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the installed package that a test may damage."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "reformer_ext"))


def import_error(copy: Path) -> str:
    done = python("-c", "import reformer_ext", cwd=copy.parent)
    assert done.returncode != 0
    return done.stderr.splitlines()[-1]


def test_intact_copy_imports(copy: Path) -> None:
    done = python("-c", "import reformer_ext; print(reformer_ext.__file__)", cwd=copy.parent)
    assert Path(done.stdout.strip()).parent == copy, done.stderr


def test_other_torch_is_named(copy: Path) -> None:
    path = copy / "_build_info.json"
    built = {**json.loads(path.read_text()), "torch": "2.1.0+cu121", "cuda": "12.1"}
    path.write_text(json.dumps(built))
    message = import_error(copy)
    assert "ImportError: reformer_ext was built for torch 2.1.0+cu121 (CUDA 12.1)" in message
    assert f"present is torch {torch.__version__}" in message


def test_other_python_is_named(copy: Path) -> None:
    path = copy / "_build_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "python": "3.9.1"}))
    message = import_error(copy)
    assert "and Python 3.9.1, but present is" in message


def test_not_built(copy: Path) -> None:
    (copy / "_build_info.json").unlink()
    assert "the operators are not built" in import_error(copy)


def test_damaged_library(copy: Path) -> None:
    (library,) = copy.glob("_C.*.so")
    library.write_text("no library" * 100)
    message = import_error(copy)
    assert "were built for this torch" in message
    assert "do not load" in message


def test_cuda_asked_for_but_impossible() -> None:
    done = python("setup.py", "--name", cwd=ROOT, REFORMER_CUDA="1", CUDA_HOME="/nonexistent")
    assert done.returncode != 0
    assert "REFORMER_CUDA=1: CUDA kernels cannot be built" in done.stderr


def test_cuda_switch_is_checked() -> None:
    done = python("setup.py", "--name", cwd=ROOT, REFORMER_CUDA="yes")
    assert done.returncode != 0
    assert "REFORMER_CUDA: expected 0 or 1, got 'yes'" in done.stderr


def test_sources_have_objects_of_their_own() -> None:
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/kernels/**/*.cu")]
    assert len(sources) > 30
    assert len({source.with_suffix(".o") for source in sources}) == len(sources)


def test_info_lists_operators_and_backends() -> None:
    facts = info()
    json.dumps(facts)
    assert facts["reformer_ext"] == reformer_ext.__version__
    assert facts["built_for"] == json.loads((PACKAGE / "_build_info.json").read_text())
    kernels = ["CPU", "CUDA"] if facts["built_for"]["cuda"] else ["CPU"]
    assert facts["operators"] == {
        "reformer::apply_rotary": [*kernels[1:], "composite"],
        "reformer::bucket_sort": kernels,
        "reformer::chunked_attention": kernels,
        "reformer::chunked_attention_backward": kernels,
        "reformer::lsh_attention": ["composite"],
        "reformer::lsh_cache_append": [*kernels, "composite"],
        "reformer::lsh_cross_attention": ["composite"],
        "reformer::lsh_decode": [*kernels, "composite"],
        "reformer::lsh_hash": kernels,
        "reformer::merge_attention": ["composite"],
        "reformer::merge_heads": [*kernels[1:], "composite"],
        "reformer::next_values": kernels,
        "reformer::next_values_backward": kernels,
        "reformer::split_heads": [*kernels[1:], "composite"],
    }


def test_info_command() -> None:
    done = python("-m", "reformer_ext", "info", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"built for torch {torch.__version__}" in done.stdout
    assert "reformer::lsh_attention" in done.stdout


def test_bindings_are_the_operators() -> None:
    generator = torch.Generator().manual_seed(0)
    qk, v = torch.randn(2, 1, 2, 100, 16, generator=generator).unbind()
    v.requires_grad_()
    n_buckets = reformer_ext.default_n_buckets(100, 16)
    assert _C.default_n_buckets(100, 16) == n_buckets
    rotations = reformer_ext.sample_rotations(2, 16, 4, n_buckets, generator=generator)
    options = _C.AttentionOptions()
    options.chunk_size = 16
    options.causal = True

    out, lse, buckets = _C.lsh_attention(qk, v, rotations, n_buckets, options)
    expected = reformer_ext.lsh_attention(
        qk, v, n_buckets=n_buckets, rotations=rotations, chunk_size=16, causal=True
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(out.sum(), v)
    (expected_grad,) = torch.autograd.grad(expected.sum(), v)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)

    assert torch.equal(_C.lsh_hash(qk, rotations, n_buckets), buckets)
    order = _C.bucket_sort(buckets, 8)
    again, _ = _C.chunked_attention(qk, None, v, order, options)
    torch.testing.assert_close(again, out, rtol=0, atol=0)
    cross, _, _ = _C.lsh_cross_attention(qk, v, v, rotations, n_buckets)
    expected_cross = reformer_ext.lsh_cross_attention(
        qk, v, v, n_buckets=n_buckets, rotations=rotations, look_ahead=0
    )
    torch.testing.assert_close(cross, expected_cross, rtol=0, atol=0)
    merged, merged_lse = _C.merge_attention([out, out], [lse, lse])
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse + torch.log(torch.tensor(2.0)))
    turn_by_nothing = torch.ones(100, 16), torch.zeros(100, 16)
    assert torch.equal(_C.apply_rotary(out, *turn_by_nothing), out)
    assert torch.equal(
        _C.next_values(out, torch.ones(2, 2)), reformer_ext.next_values(out, torch.ones(2, 2))
    )
    rows = _C.merge_heads(qk, None, out, *turn_by_nothing)
    for got, part in zip(_C.split_heads(rows, 2, *turn_by_nothing), (qk, out), strict=True):
        assert torch.equal(got, part)
