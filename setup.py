"""Metadata of the distribution; what was tested together stands in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="headway",
    version="0.1.0",
    description="Pretraining of language models that predict several future tokens at once.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{name}{below}"
            for name in ("data_prep", "foundation", "model", "pipeline")
            for below in ("", ".*")
        ]
    ),
    package_data={"foundation": ["templates/*.j2"]},
    install_requires=[
        "backports.zstd>=1.0; python_version<'3.14'",
        "datasets>=3.0",
        "deepspeed>=0.18",
        "gigatoken>=0.10",
        "huggingface_hub>=0.25",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "matplotlib>=3.8",
        "megatron-core>=0.15",
        "mpi4py>=4.0",
        "numpy>=1.26",
        "orjson>=3.9",
        "psutil>=5.9",
        "pyarrow>=17.0",
        "pydantic>=2.7",
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
            "hypothesis>=6.100",
            "mpich>=5.0",
            "mypy>=1.15",
            "pytest>=8.3",
            "ruff>=0.9",
            "types-PyYAML>=6.0",
            "types-setuptools>=75",
        ],
        "wandb": ["wandb>=0.19"],
    },
)
