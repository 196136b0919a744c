"""Package metadata. It ships the two libraries; configs/ and launch/ are used from the checkout."""

from setuptools import find_packages, setup

OLDER, NEWER = "python_version < '3.12'", "python_version >= '3.12'"

# A libtpu belongs to a jax: only these pairs are tested. libtpu compiles for TPUs on a machine that has none; there are
# wheels for Linux on x86-64 only, and elsewhere the tests that compile for TPUs are left out.
LINUX = "sys_platform == 'linux' and platform_machine == 'x86_64'"
AOT = [
  f"jax==0.10.2; {OLDER}", f"libtpu==0.0.42.1; {OLDER} and {LINUX}",
  f"jax==0.12.0.1; {NEWER}", f"libtpu==0.0.50.1; {NEWER} and {LINUX}",
]
# nbclient executes the notebooks (the tests do), nbformat reads them, ipykernel is the Python that they run in.
# transformers and torch are the independent truth about the model; the parity tests run on the older Python.
NOTEBOOKS = ["nbclient", "nbformat", "ipykernel"]
# ruff and mypy are pinned: another version has other opinions.
LINT = ["ruff==0.17.6", "mypy==2.4.1"]
TEST = AOT + NOTEBOOKS + LINT + ["pytest", "pytest-xdist", "hypothesis", "pyyaml", f"transformers==5.24.0; {OLDER}",
                          f"torch==2.13.0; {OLDER}"]

setup(
  name="deepseek-v4-jax",
  version="0.1.0",
  description="DeepSeek-V4 in JAX and Flax: model, training, checkpoints, kernels",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["deepseek_v4*", "pallas_kernels*"]),
  install_requires=[  # the compiler of jax 0.11.2 crashes on a training step of an emulated mesh; its neighbours' do not
    "jax>=0.10.2,!=0.11.2", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy", "absl-py",
    "safetensors", "tokenizers",  # released models
    "tqdm", "tensorboardX", "matplotlib",  # progress, metrics, pictures
  ],
  extras_require={"aot": AOT, "test": TEST, "notebooks": NOTEBOOKS},
)
