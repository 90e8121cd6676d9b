"""Imports: `import fastbert` is light and needs no Triton, and modules import from one direction only."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAZY = {"triton", "transformers", "sentence_transformers", "huggingface_hub", "tqdm"}

# From the bottom to the top. A module imports from its own layer or from an earlier one, inside functions as well.
# A name is a module or a sub-package of fastbert; `__init__` is `import fastbert` itself.
LAYERS: list[set[str]] = [
    {"fastbert_kernels"},
    {
        "_version",
        "fastbert",
        "tracing",
        "activations",
        "derived",
        "silent_writes",
        "families",
        "config",
        "config_access",
        "checkpoint",
        "hub",
        "text_io",
        "text_windows",
        "tokenizer",
        "tokenizer_files",
        "tokenizer_older",
        "tokenizer_settings",
        "wordpiece",
        "varlen",
    },
    {"reference"},
    {"ops"},
    {"graphs", "cpu_encoder"},
    {
        "forward_arguments",
        "hooks",
        "loading_arguments",
        "model_access",
        "trainer_saving",
        "pretrained",
        "quantized",
        "model",
        "heads",
        "outputs",
    },
    {
        "sentence",
        "sentence_api",
        "sentence_inputs",
        "sentence_layout",
        "sentence_loading",
        "sentence_modules",
        "sentence_names",
        "sentence_run",
        "sentence_settings",
        "vectors",
        "search",
        "search_corpus",
        "cross_encoder",
    },
    {"adapters"},
    {
        "verify",
        "verify_report",
        "verify_run",
        "verify_page",
        "verify_ends",
        "drawing",
        "explain",
        "explain_costs",
        "explain_ops",
        "explain_report",
        "readiness",
    },
    {"training"},
    {"__init__"},
    {"bench", "tune", "tune_jobs"},
    {"cli", "cli_options", "cli_retrieval", "commands", "commands_retrieval", "demo", "__main__"},
]


def run_python(code: str) -> str:
    """Standard output of `code` in a process of its own, which imports from the checkout."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_models_need_no_compiler() -> None:
    """Catches a decorator of torch.compiler at import time: torch._dynamo, and Triton with it, takes over a second."""
    code = "import sys, fastbert; fastbert.BertModel; print(sorted({'torch._dynamo', 'triton'} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_import_brings_no_heavy_library() -> None:
    """Catches a top-level import of Triton, transformers, the hub client or tqdm."""
    code = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastbert\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    added = set(json.loads(run_python(code)))
    assert "fastbert" in added
    assert not added & LAZY, "import these inside the functions that need them"


def test_import_adds_little_time_to_torch() -> None:
    """Catches slow work at import time: 0.2 s on top of `import torch`, best of up to five."""
    code = "import time, torch; start = time.perf_counter(); import fastbert; print(time.perf_counter() - start)"
    seconds: list[float] = []
    while len(seconds) < 5 and min(seconds, default=1.0) >= 0.2:
        seconds.append(float(run_python(code)))
    assert min(seconds) < 0.2, seconds


def test_public_names_need_no_triton() -> None:
    """Catches a public name that resolves only where Triton or a peer library is installed."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['triton', 'transformers', 'sentence_transformers']))\n"
        "import fastbert\n"
        "assert 'BertModel' in fastbert.__all__ and 'SentenceEncoder' in fastbert.__all__\n"
        "for name in fastbert.__all__: getattr(fastbert, name)"
    )
    run_python(code)


def test_public_names_outlast_modules_of_the_same_name() -> None:
    """Catches `fastbert.explain`, a function, turning into the module once something imports `fastbert.explain`."""
    code = (
        "import importlib.util, fastbert\n"
        "callables = [name for name in fastbert.__all__ if not name.startswith('_')]\n"
        "for name in callables:\n"
        "    if importlib.util.find_spec('fastbert.' + name): importlib.import_module('fastbert.' + name)\n"
        "bad = [name for name in callables if not callable(getattr(fastbert, name))]\n"
        "assert not bad, f'not callable: {bad}'"
    )
    run_python(code)


def module_name(path: Path) -> str:
    """The dotted name of a file of the two packages; a package has the name of its folder."""
    source_root = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    parts = path.relative_to(source_root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(path for folder in ("fastbert", "kernels/fastbert_kernels") for path in (ROOT / folder).rglob("*.py"))
MODULES = {module_name(path) for path in FILES}


def unit(module: str) -> str:
    """What LAYERS calls a module: `fastbert.ops.gelu` is `ops`, `fastbert` is `__init__`."""
    package, *rest = module.split(".")
    if package != "fastbert":
        return package
    return rest[0] if rest else "__init__"


def rank(module: str) -> int:
    """The layer of a module, counted from the bottom; fails for a module that has none."""
    for index, layer in enumerate(LAYERS):
        if unit(module) in layer:
            return index
    pytest.fail(f"{module} is in no layer: add '{unit(module)}' to LAYERS in tests/test_imports.py")


def imported(source: str, package: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import of our own packages, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from fastbert import model` names a module, `from fastbert import BertModel` an attribute of the package.
            names = [f"{origin}.{a.name}" if f"{origin}.{a.name}" in modules else origin for a in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in ("fastbert", "fastbert_kernels"))


def upward_imports(module: str, package: str, source: str, modules: set[str]) -> list[str]:
    """Imports of `module` that reach a later layer than its own."""
    return [
        f"line {line}: {module} imports {name}"
        for line, name in imported(source, package, modules)
        if rank(name) > rank(module)
    ]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fastbert.ops.gelu", "def f():\n    from fastbert.models.bert import BertModel"),
        ("fastbert.ops.gelu", "from fastbert import model"),
        ("fastbert.ops.gelu", "from ..model import BertModel"),
        ("fastbert.ops.gelu", "from .. import BertModel"),
        ("fastbert.reference", "import fastbert.ops.gelu as gelu"),
        ("fastbert.verify", "import fastbert"),
        ("fastbert_kernels.gelu", "from fastbert.checkpoint.config import BertConfig"),
    ],
)
def test_an_upward_import_is_recognised(module: str, line: str) -> None:
    """Catches a form of import that the search of the next test does not see."""
    assert upward_imports(module, module.rpartition(".")[0], line, {"fastbert.models.bert", "fastbert.ops.gelu"})


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fastbert.models.bert", "from fastbert.models.heads import BertForMaskedLM"),
        ("fastbert.models.bert", "from . import config"),
        ("fastbert.models.bert", "from fastbert.ops import gelu\nimport fastbert_kernels.launch\nimport torch"),
        ("fastbert.cli.main", "import fastbert"),
    ],
)
def test_a_permitted_import_is_let_pass(module: str, line: str) -> None:
    """Catches a search that forbids what the layers allow."""
    assert not upward_imports(
        module, module.rpartition(".")[0], line, {"fastbert.checkpoint.config", "fastbert.ops.gelu"}
    )


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_imports_run_one_way(path: Path) -> None:
    """Catches an import from a later layer, at module level or inside a function, and a module that has no layer."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    rank(module)
    assert not upward_imports(module, package, path.read_text(encoding="utf-8"), MODULES)


@pytest.mark.parametrize(
    "path", [path for path in FILES if "kernels" in path.relative_to(ROOT).parts], ids=lambda path: path.name
)
def test_kernels_import_torch_and_triton_alone(path: Path) -> None:
    """Catches a dependency of the kernels on anything else than PyTorch, Triton and the standard library."""
    allowed = {"fastbert_kernels", "torch", "triton", *sys.stdlib_module_names}
    if path.name == "interpreter.py":
        allowed.add("numpy")  # which Triton's interpreter runs on
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    assert found <= allowed, f"{path.name} imports {sorted(found - allowed)}"
