"""Builds reformer_ext._C from csrc/ against the torch that is installed.

REFORMER_CUDA=0/1 decides whether CUDA is built; TORCH_CUDA_ARCH_LIST and MAX_JOBS are torch's.
"""

import json
import os
import platform
from glob import glob
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension


def build_cuda() -> bool:
    """Whether torch and the toolkit allow it; no GPU need be in sight (images are built so)."""
    obstacle = None
    if torch.version.cuda is None:
        obstacle = f"torch {torch.__version__} has no CUDA"
    elif CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        obstacle = f"there is no nvcc (CUDA_HOME is {CUDA_HOME})"
    asked = os.environ.get("REFORMER_CUDA", "0" if obstacle else "1")
    if asked not in ("0", "1"):
        raise SystemExit(f"REFORMER_CUDA: expected 0 or 1, got {asked!r}")
    if asked == "1" and obstacle:
        raise SystemExit(f"REFORMER_CUDA=1: CUDA kernels cannot be built, {obstacle}")
    return asked == "1"


with_cuda = build_cuda()
if with_cuda:
    # Machine code for 8.x, for Hopper's own instructions, and PTX for whatever is newer.
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX;9.0a"
build_info = {
    "python": platform.python_version(),
    "torch": str(torch.__version__),
    "cuda": torch.version.cuda if with_cuda else None,
    "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else None,
}
quoted_info = json.dumps(json.dumps(build_info))  # a string literal for the compiler
sources = [f for f in sorted(glob("csrc/*.cpp")) if with_cuda or not f.endswith("_cuda.cpp")]
extension = (CUDAExtension if with_cuda else CppExtension)(
    "reformer_ext._C",
    sources + (sorted(glob("csrc/kernels/**/*.cu", recursive=True)) if with_cuda else []),
    include_dirs=[str(Path(folder).absolute()) for folder in ("csrc", "csrc/kernels")],
    extra_compile_args={
        # -fopenmp: at::parallel_for is serial without it. -g0: Python's -g doubles the build time.
        "cxx": ["-O3", "-g0", "-fopenmp", f"-DREFORMER_BUILD_INFO={quoted_info}"],
        # -U: the kernels know nothing of torch, nor of its ban on the operators of half types.
        "nvcc": ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xfatbin=-compress-all"]
        + [f"-U__CUDA_NO_HALF{x}__" for x in ("_OPERATORS", "_CONVERSIONS", "2_OPERATORS")]
        + ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__"],
    },
)


class BuildExt(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # Objects are kept, per torch: pip would discard them, and ninja rebuilds what changed.
        self.build_temp = str(Path("build", f"torch-{torch.__version__}"))

    def run(self) -> None:
        super().run()
        # Beside the library: reformer_ext/_extension.py reads it before it loads that.
        path = Path(self.get_ext_fullpath(extension.name)).with_name("_build_info.json")
        path.write_text(json.dumps(build_info, indent=2) + "\n")


setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
