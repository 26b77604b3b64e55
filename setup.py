"""Metadata of the distribution; what was tested together stands in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGES = ("foundation", "data_prep", "model", "pipeline")
SERVE = ["starlette>=0.46", "uvicorn>=0.34"]


def _version() -> str:
    text = (ROOT / "pipeline" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found, "pipeline/__init__.py has the version"
    return found[1]


setup(
    name="headway",
    version=_version(),
    description="Pretraining of language models that predict several future tokens at once.",
    author="The Headway contributors",
    license="Apache-2.0",
    keywords="pretraining, multi-token prediction, speculative decoding, DeepSpeed, ZeRO",
    classifiers=[
        # The names of the packages are common ones: on an index, they would collide with others.
        "Private :: Do Not Upload",
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]),
    package_data={"": ["py.typed"], "foundation": ["templates/*.j2"]},
    py_modules=["headway"],
    entry_points={"console_scripts": ["headway = headway:main"]},
    install_requires=[
        "backports.zstd>=1.0; python_version<'3.14'",
        "datasets>=3.0",
        # Bounded: private parts of DeepSpeed are used (pipeline/engine/deepspeed_internals.py).
        # tests/pipeline/engine/test_library_versions.py runs on the bounds in `make stress`.
        # 0.19.7 and older add gradients up in bf16 under ZeRO-2, whatever they are told.
        "deepspeed>=0.19.8,<=0.19.8",
        "gigatoken>=0.10",
        "huggingface_hub>=0.25",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "matplotlib>=3.8",
        "megatron-core>=0.15.0,<=0.16.1",
        "mpi4py>=4.0",
        "numpy>=1.26",
        "orjson>=3.9",
        "psutil>=5.9",
        "pyarrow>=17.0",
        "pydantic>=2.7",
        "pydantic-core>=2.18",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.4.3",
        "tensorboard>=2.16",
        "tokenizers>=0.20",
        "torch>=2.8",
        "transformers>=4.56",
        "xxhash>=3.4",
    ],
    extras_require={
        "dev": [
            "accelerate>=1.1",
            "furo>=2024.8",
            "hypothesis>=6.100",
            "mpich>=5.0",
            "mypy>=1.15",
            "myst-parser>=4.0",
            "openai>=1.60",
            "pre-commit>=4.0",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "sphinx>=8.0",
            *SERVE,
            "types-PyYAML>=6.0",
            "types-docutils>=0.21",
            "types-setuptools>=75",
        ],
        "serve": SERVE,
        "evaluate": ["lm-eval[hf]>=0.4.9"],
        "wandb": ["wandb>=0.19"],
    },
)
