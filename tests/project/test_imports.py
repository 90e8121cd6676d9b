"""`import fastbert` is light and needs no Triton, modules import in one direction, and files are short."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAZY = {"triton", "transformers", "sentence_transformers", "huggingface_hub", "tqdm"}

# From the bottom to the top. A module imports from its own layer or from an earlier one, inside functions as well.
# A name is a module or a sub-package of fastbert; `__init__` is `import fastbert` itself.
LAYERS: list[set[str]] = [
    {"fastbert_kernels"},
    {"_version", "fastbert"},
    {"checks", "threads"},
    {"checkpoint"},
    {"text"},
    {"reference"},
    {"ops"},
    {"engine"},
    {"models"},
    {"vectors"},
    {"pipelines"},
    {"adapters"},
    {"pages"},
    {"training"},
    {"diagnostics"},
    {"__init__"},
    {"serving"},
    {"bench"},
    {"tune"},
    {"cli", "__main__"},
]
# Files that were too long, or imported one another, when this test was written. Both lists may only shrink.
LONGEST, LONGEST_TEST = 400, 500
LONG: set[str] = set()
CIRCLES: list[set[str]] = []


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
    """Catches a decorator of torch.compiler at import time, which takes over a second for Triton and more."""
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
    pytest.fail(f"{module} is in no layer: add '{unit(module)}' to LAYERS in tests/project/test_imports.py")


def imported(source: str, package: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import of our own packages, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from fastbert import models` names a module, `from fastbert import BertModel` an attribute.
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
        ("fastbert.ops.gelu", "from fastbert import models"),
        ("fastbert.ops.gelu", "from ..models import BertModel"),
        ("fastbert.ops.gelu", "from .. import BertModel"),
        ("fastbert.reference.bert", "import fastbert.ops.gelu as gelu"),
        ("fastbert.diagnostics.warmup", "import fastbert"),
        ("fastbert_kernels.gelu", "from fastbert.checkpoint.config import BertConfig"),
    ],
)
def test_an_upward_import_is_recognised(module: str, line: str) -> None:
    """Catches a form of import that the search of the next test does not see."""
    assert upward_imports(module, module.rpartition(".")[0], line, {"fastbert.models.bert", "fastbert.ops.gelu"})


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fastbert.models.bert", "from fastbert.models.tasks import BertForMaskedLM"),
        ("fastbert.models.bert", "from ..checkpoint import config"),
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
    if path.name in ("interpreter.py", "work_list.py"):
        allowed.add("numpy")  # on which Triton's interpreter runs, and in which the host lists the tiles of a batch
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.split(".")[0])
    assert packages <= allowed, f"{path.name} imports {sorted(packages - allowed)}"


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Every set of modules that import one another, directly or by way of others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        open_ends = [start]
        while open_ends:
            for name in edges.get(open_ends.pop(), set()) - seen:
                seen.add(name)
                open_ends.append(name)
        return seen

    reach = {module: reached(module) for module in edges}
    groups = {frozenset(other for other in reach[m] if m in reach[other]) for m in edges if m in reach[m]}
    return [set(each) for each in sorted(groups, key=sorted)]


def test_a_circle_is_recognised() -> None:
    """Catches a search that overlooks a circle, or sees one where modules only share what they import."""
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]


def test_no_files_import_one_another() -> None:
    """Catches a circle among files, none of which can be read, tested or moved without the others."""
    edges: dict[str, set[str]] = {}
    for path in FILES:
        module = module_name(path)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = {name for _, name in imported(path.read_text(encoding="utf-8"), package, MODULES)}
        edges[module] = {name for name in names if name in MODULES} - {module}
    assert [circle for circle in circles(edges) if circle not in CIRCLES] == []


ELSEWHERE = {("fastbert", "FastBERT")}  # a name of the other distribution `fastbert`, which a test installs


def missing_names(text: str) -> list[str]:
    """The imports from our packages, in code and in strings of code, that name nothing."""
    missing = []
    for module, names in re.findall(r"from (fastbert(?:_kernels)?(?:\.\w+)*) import \(?([\w ,]+)", text):
        for name in (each.split()[0] for each in names.split(",") if each.strip()):
            if (module, name) in ELSEWHERE:
                continue
            try:
                if not hasattr(importlib.import_module(module), name):
                    importlib.import_module(f"{module}.{name}")
            except ImportError:
                missing.append(f"{module}: {name}")
    return missing


def test_imports_in_strings_name_something() -> None:
    """Catches code for another process, in a string of a test, that imports a module or a name which has moved."""
    wrong = "code = 'from fastbert import " + "nothing, ops as o\\nfrom fastbert." + "gone import here'"
    assert missing_names(wrong) == ["fastbert: nothing", "fastbert.gone: here"]
    paths = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    missing = {path.relative_to(ROOT).as_posix(): missing_names(path.read_text(encoding="utf-8")) for path in paths}
    assert {name: names for name, names in missing.items() if names} == {}


SOURCES = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]


def n_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_long() -> None:
    """Catches a file of more than 400 lines, which does two jobs."""
    names = {path.relative_to(ROOT).as_posix(): n_lines(path) for path in SOURCES}
    assert {name: lines for name, lines in names.items() if lines > LONGEST and name not in LONG} == {}
    assert {name for name in LONG if names.get(name, 0) <= LONGEST} == set(), "no longer too long: take it off the list"


def test_no_test_file_is_long() -> None:
    """Catches a test file of more than 500 lines."""
    names = {path.relative_to(ROOT).as_posix(): n_lines(path) for path in sorted((ROOT / "tests").rglob("*.py"))}
    assert {name: lines for name, lines in names.items() if lines > LONGEST_TEST} == {}


def test_tests_mirror_the_packages() -> None:
    """Catches a folder of tests that no package, and nothing else that the project has, stands behind."""
    packages = {path.parent.name for path in (ROOT / "fastbert").glob("*/__init__.py")}
    others = {"on_kernels", "project", "docs"}  # fastbert_kernels; the repository as a whole; pages and examples
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= packages | others
    assert [path.name for path in (ROOT / "tests").glob("test_*.py")] == []


def test_the_text_of_bert_sees_one_door_of_the_engine() -> None:
    """Catches a model that asks an engine's inner parts, and a text of BERT that takes long to read."""
    path = ROOT / "fastbert" / "models" / "bert.py"
    names = {name for _, name in imported(path.read_text(encoding="utf-8"), "fastbert.models", MODULES)}
    assert {name for name in names if name.startswith("fastbert.engine")} == {"fastbert.engine"}
    assert n_lines(path) <= 350
