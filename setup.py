"""Packaging of layerwise. Only the package is installed: a top-level `cache` or `cli` would clash with other projects."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (here / "layerwise/version.py").read_text(encoding="utf-8")).group(1)
COMPRESSION = ["zstandard>=0.22", "hdf5plugin>=4.1"]  # of caches; hdf5plugin is for h5py, layerwise itself does without
DOCS = ["sphinx>=8.2", "myst-parser>=4.0", "furo>=2024.8", "sphinx-click>=6.0"]  # the pages of docs/ as a site

setup(
    name="layerwise",
    version=version,
    description="Train deep networks that do not fit on the GPU, one gradient-isolated module at a time",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the layerwise maintainers",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["deep learning", "representation learning", "greedy training", "InfoNCE", "GPU memory", "PyTorch"],
    project_urls={"Paper": "https://arxiv.org/abs/1905.11786"},
    classifiers=[
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["layerwise", "layerwise.*"]),
    # One file for every Python from 3.11 on. Without a compiler it is left out, and caches are read by Python alone.
    ext_modules=[
        Extension(
            "layerwise.cache.compiled_reads",
            ["layerwise/cache/compiled_reads.c"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    package_data={"layerwise": ["py.typed", "cache/*.pyi", "recipes/*.toml", "report/*.jinja", "encoder/*.jinja"]},
    install_requires=[
        "torch>=2.9",
        "torchvision>=0.24",
        "torchaudio>=2.9",
        "h5py>=3.11",
        "numpy>=2.0",
        "click>=8.4",
        "psutil>=6.0",
        "rich>=14.0",
        "pydantic>=2.10",
        "safetensors>=0.5",
        "soundfile>=0.13",
        "tomli-w>=1.1",
        "pillow>=10.3",
        "isal>=1.7",
        "matplotlib>=3.9",
        "jinja2>=3.1",
    ],
    extras_require={
        "gpu": ["nvidia-ml-py>=12"],  # tells this process's memory from that of others on the GPU
        "compression": COMPRESSION,
        "parquet": ["pyarrow>=18"],  # features as a table
        "tensorboard": ["tensorboard>=2.18"],
        "wandb": ["wandb>=0.19"],
        "timm": ["timm>=1.0.20"],  # --net timm:NAME
        "transformers": ["transformers>=4.57"],  # --net hf:PATH
        "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"],
        "mlflow": ["mlflow>=3.0"],
        "dask": ["distributed>=2025.1"],
        "docs": DOCS,
        "dev": [
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.120",
            "ruff>=0.14",
            "build>=1.2",
            "mypy>=2.0",
            "scikit-learn>=1.5",
            *COMPRESSION,
            *DOCS,
            "playwright>=1.50",  # drives the system's Chromium, where there is one
            "tensorboard>=2.18",
            "layerwise[onnx,dask,timm,transformers,parquet]",
        ],
    },
    entry_points={"console_scripts": ["layerwise = layerwise.commands:main"]},
)
