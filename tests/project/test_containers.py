"""Files for containers name files, versions, routes and options that exist. No image is built here."""

from __future__ import annotations

import fnmatch
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fastbert.cli.main import _parser

yaml = pytest.importorskip("yaml", reason="PyYAML reads the files; transformers brings it")

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
Instruction = tuple[str, str]


def instructions(path: Path) -> list[Instruction]:
    """The instructions of a Dockerfile with their arguments, lines that go on joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines)).split("\n")
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined)]


def stages(path: Path) -> list[list[Instruction]]:
    """The instructions of each stage, from FROM on."""
    parts: list[list[Instruction]] = []
    for instruction in instructions(path):
        if instruction[0] == "FROM":
            parts.append([])
        if parts:
            parts[-1].append(instruction)
    return parts


def values(stage: list[Instruction], name: str) -> list[str]:
    return [rest for instruction, rest in stage if instruction == name]


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """The arguments of `setup`."""
    import setuptools

    arguments: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", arguments.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def test_there_is_one_for_each_device() -> None:
    """Catches a file that was moved or renamed, so that the tests below look at nothing."""
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_image_is_slim_and_its_user_is_not_root(path: Path) -> None:
    """Catches a base image without a version, a compiler's stage that is shipped, and what hadolint would say."""
    build, final = stages(path)
    for stage in (build, final):
        assert re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+( AS build)?", stage[0][1])
        assert not values(stage, "ADD") and not values(stage, "MAINTAINER")
        assert all(place.startswith("/") for place in values(stage, "WORKDIR"))
        for command in values(stage, "RUN"):
            assert "sudo" not in command and "|" not in command
            for install in re.findall(r"apt-get install[^&]*", command):
                assert "--yes" in install and "--no-install-recommends" in install
                assert "rm -rf /var/lib/apt/lists/*" in command and "apt-get update" in command
            for install in re.findall(r"pip install[^&]*", command):
                assert "--no-cache-dir" in install
    [user] = values(final, "USER")
    assert int(user) > 1000, "a number, or Kubernetes cannot tell that it is not root"
    names = [name for name, _ in final]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    for name in ("ENTRYPOINT", "CMD"):
        assert len(values(final, name)) == 1 and isinstance(json.loads(values(final, name)[0]), list)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_exists(path: Path) -> None:
    """Catches a file that is not there or that .dockerignore leaves out, and one that setup.py reads and misses."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    copied: set[str] = set()
    for stage in stages(path):
        for line in values(stage, "COPY"):
            if line.startswith("--from="):
                continue
            *sources, _ = shlex.split(line)
            for source in sources:
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), f"{source} is in .dockerignore"
            copied |= set(sources)
    assert copied >= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "fastbert", "kernels"}
    assert "*" in ignored


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_versions_are_supported(path: Path, metadata: dict[str, Any]) -> None:
    """Catches a Python or a PyTorch that setup.py does not support, and requirements that are not those of setup.py."""
    arguments = dict(line.split("=", 1) for name, line in instructions(path) if name == "ARG")
    assert SpecifierSet(metadata["python_requires"]).contains(arguments["PYTHON"])
    assert f"Programming Language :: Python :: {arguments['PYTHON']}" in metadata["classifiers"]
    requirements = {one.name: one for one in map(Requirement, metadata["install_requires"])}
    assert requirements["torch"].specifier.contains(arguments["TORCH"])
    pins = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert next(pins) == f"torch=={arguments['TORCH']}", "not the one that is tested"
    commands = " ".join(values(stages(path)[0], "RUN"))
    extras = set(re.findall(r'"\.\[(\w+)\]"', commands))
    assert extras <= set(metadata["extras_require"])
    if not extras:
        listed = {one for one in re.findall(r'"([\w-]+>=[\d.]+)"', commands)}
        expected = [one for one in metadata["install_requires"] if not one.startswith(("torch", "triton"))]
        served = {one.partition(";")[0] for one in metadata["extras_require"]["serve"]}
        assert listed == {*expected, *served}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_health_is_asked_where_the_server_listens(path: Path) -> None:
    """Catches a port that is another one in one of the places, and a check that Python cannot run."""
    final = stages(path)[-1]
    [health], [port] = values(final, "HEALTHCHECK"), values(final, "EXPOSE")
    command = json.loads(health.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"] and f":{port}/health" in command[2]
    compile(command[2], "HEALTHCHECK", "exec")
    arguments = _parser().parse_args(json.loads(values(final, "CMD")[0]))
    assert (arguments.command, arguments.host, arguments.port) == ("serve", "0.0.0.0", int(port))
    assert json.loads(values(final, "ENTRYPOINT")[0]) == ["fastbert"]


def longest_stop(arguments: Any) -> float:
    """The seconds from SIGTERM to the last answer."""
    return arguments.drain + arguments.body_timeout + arguments.timeout


def test_compose_names_what_exists() -> None:
    """Catches a build of a file that is not there, a service that anyone on the network may ask, and one that is
    killed before what it accepted is answered."""
    content = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert set(content["services"]) == {"cpu", "gpu"}
    for service in content["services"].values():
        context = (ROOT / "docker" / service["build"]["context"]).resolve()
        assert context == ROOT and (context / service["build"]["dockerfile"]).is_file()
        assert all(port.startswith("127.0.0.1:") and port.endswith(":8000") for port in service["ports"])
        arguments = _parser().parse_args(service["command"])
        assert (arguments.host, arguments.port) == ("0.0.0.0", 8000) and service["read_only"] is True
        assert int(service["stop_grace_period"].removesuffix("s")) > longest_stop(arguments)
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(content["volumes"])


def test_kubernetes_asks_health_and_readiness_apart() -> None:
    """Catches a probe that ends a server which drains, a port without a name, a selector that selects nothing, and a
    pod that is killed before what it accepted is answered."""
    deployment, service = yaml.safe_load_all((ROOT / "docker" / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    arguments = _parser().parse_args(container["args"])
    assert arguments.host == "0.0.0.0" and pod["spec"]["terminationGracePeriodSeconds"] > longest_stop(arguments)
    [port] = container["ports"]
    probes = [container[f"{name}Probe"]["httpGet"]["port"] for name in paths]
    assert port == {"name": "http", "containerPort": 8000} and set(probes) == {"http"}
    assert service["spec"]["ports"][0]["targetPort"] == "http"
    labels = pod["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    users = {values(stages(path)[-1], "USER")[0] for path in DOCKERFILES}
    assert pod["spec"]["securityContext"]["runAsNonRoot"] and users == {
        str(pod["spec"]["securityContext"]["runAsUser"])
    }
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert container["resources"]["limits"]["cpu"] == container["resources"]["requests"]["cpu"]
