"""Metadata of r1jax; kernels/ and configs/ of the checkout become r1jax.kernels and r1jax.configs."""

import pathlib

from setuptools import find_namespace_packages, setup

ROOT = pathlib.Path(__file__).parent
README = ROOT / "README.md"
BESIDE = {"r1jax.kernels": "kernels", "r1jax.configs": "configs"}

# What JetStream's engine, driver and server import at run time. Its wheel also asks for seqio, and so for tensorflow,
# which none of the three uses: after these, `pip install --no-deps google-jetstream==0.2.2` completes the light install.
JETSTREAM_LIGHT = ["protobuf>=4.25", "grpcio>=1.60", "shortuuid", "prometheus-client", "tiktoken"]

# The TPU compiler, which also runs without a TPU; jax[tpu] pins a version of its own, so none is pinned here.
LIBTPU = "libtpu>=0.0.42; sys_platform == 'linux' and platform_machine == 'x86_64'"

# Parquet files, and data sets saved by the package datasets or named on the Hugging Face Hub; JSON Lines need neither.
DATA = ["datasets>=3.0", "pyarrow>=15.0"]

# Gets the rows of metrics of a run that names a project; the oldest version whose login can be asked about quietly.
WANDB = ["wandb>=0.31"]


def inside() -> list[str]:
    """Returns r1jax and its subpackages: the folders that hold Python files."""
    names = find_namespace_packages(include=["r1jax", "r1jax.*"], exclude=["*.__pycache__*"])
    return [name for name in names if any(ROOT.joinpath(*name.split(".")).glob("*.py"))]


setup(
    name="r1jax",
    version="0.1.0",
    description="The DeepSeek-R1 training recipe in JAX: GRPO, cold start, rejection sampling and distillation",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=inside() + sorted(BESIDE),
    package_dir={"r1jax": "r1jax", **BESIDE},
    package_data={"r1jax": ["assets/*"]},
    install_requires=[
        "absl-py>=2.0",
        "flax>=0.10",
        "fsspec>=2024.6",
        "jax>=0.7",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "mpmath>=1.3",
        "numpy>=2.0",
        "optax>=0.2.4",
        "orbax-checkpoint>=0.11.20",
        "pebble>=5.0",
        "protobuf>=4.25",
        "pyseccomp>=0.1.2",
        "reasoning-gym>=0.1.25",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "scipy>=1.13",
        "sentencepiece>=0.2.0",
        "sympy>=1.13",
        "tensorboardX>=2.6.2",
        "tokenizers>=0.20",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.7"],
        "plan": [LIBTPU],
        "jetstream": ["google-jetstream==0.2.2"],
        "jetstream-light": JETSTREAM_LIGHT,
        "data": DATA,
        "wandb": WANDB,
        "test": [
            *DATA,
            *WANDB,
            "hypothesis>=6.100",
            LIBTPU,
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "ruff>=0.9",
            "setuptools>=68",
            "ty==0.0.108",
            "wheel>=0.40",
        ],
        "parity": [  # Tunix: launch/venv.sh
            "gguf",
            "math-verify[antlr4_13_2]>=0.8",
            "torch==2.13.0",
            "transformers>=4.51",
            "trl==1.16.0",
        ],
    },
)
