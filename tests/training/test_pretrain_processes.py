"""Several processes make the run that one makes: by DDP, by FSDP, on two hosts, and when one of them dies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fork_server
import pretraining_cases as cases
from fastbert import BertForPreTraining
from fastbert.training.pretrain import pretrain
from fastbert.training.run import CHECKPOINTS


def losses(output: Path) -> list[float]:
    """The losses of a run, of training and of evaluation."""
    return [line["loss"] for line in cases.journal(output) if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process; each step has two batches."""
    output = tmp_path_factory.mktemp("alone") / "model"
    pretrain(cases.settings(output))
    return output


def test_two_processes_have_the_bits_of_one(alone: Path, tmp_path: Path) -> None:
    """Catches data, masks, dropout or means that depend on the number of processes; the sum of two has one order."""
    cases.run(cases.settings(tmp_path / "model"), processes=2)
    assert cases.weights(tmp_path / "model") == cases.weights(alone)
    assert losses(tmp_path / "model") == losses(alone)


def test_more_batches_than_processes_have_the_same_curve(tmp_path: Path) -> None:
    """Catches gradients that are averaged in each batch of a step, or scaled by it: losses agree to 1e-5."""
    fields = {"tokens_per_batch": 256, "steps": 8}
    pretrain(cases.settings(tmp_path / "one", **fields))
    cases.run(cases.settings(tmp_path / "two", **fields), processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_sharded_run_has_the_same_curve_and_resumes(alone: Path, tmp_path: Path) -> None:
    """Catches FSDP2 with other gradients, and a checkpoint of it that cannot be resumed or read."""
    output = tmp_path / "model"
    cases.run(cases.settings(output, fsdp=True), processes=2)
    assert losses(output) == pytest.approx(losses(alone), rel=1e-5)
    BertForPreTraining.from_pretrained(output / CHECKPOINTS / "step-00000008")
    whole = cases.weights(output)
    for name in ("model.safetensors", "training.jsonl"):
        (output / name).unlink()
    (output / CHECKPOINTS / "step-00000012" / "complete.json").unlink()
    shutil.copytree(output, tmp_path / "alone")
    cases.run(cases.settings(output, fsdp=True, resume=True), processes=2)
    assert cases.weights(output) == whole
    pretrain(cases.settings(tmp_path / "alone", resume=True))
    assert losses(tmp_path / "alone")[-1] == pytest.approx(losses(alone)[-1], rel=1e-5)


def test_sharded_run_goes_on_from_one_that_is_not(alone: Path, tmp_path: Path) -> None:
    """Catches a state of the optimiser that FSDP2 cannot read."""
    output = tmp_path / "model"
    shutil.copytree(alone, output)
    (output / "training.jsonl").unlink()
    (output / CHECKPOINTS / "step-00000012" / "complete.json").unlink()
    cases.run(cases.settings(output, fsdp=True, resume=True), processes=2)
    assert losses(output)[-1] == pytest.approx(losses(alone)[-1], rel=1e-5)


def test_two_hosts_make_one_run(alone: Path, tmp_path: Path) -> None:
    """Catches ranks that take their number on a host for their number in the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = cases.settings(tmp_path / "model")
    hosts = []
    for host in range(2):
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(host)]
        start += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port), "-m"]
        run = [*start, "fastbert.training.pretrain", *cases.arguments(settings)]
        hosts.append(fork_server.start(run, env=cases.environment(), stderr=subprocess.PIPE, text=True))
    errors = [host.communicate(timeout=150)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], errors
    assert cases.weights(tmp_path / "model") == cases.weights(alone)


def test_rank_that_dies_is_restarted_and_the_run_goes_on(alone: Path, tmp_path: Path) -> None:
    """Catches a run that hangs, or restarts from nothing, where `torchrun --max-restarts` starts it again."""
    output = tmp_path / "model"
    settings = cases.settings(output, steps=12, checkpoint_every=2, resume=True)
    command = cases.command(settings, 2)
    command.insert(command.index("--standalone"), "--max-restarts=1")
    process = subprocess.Popen(command, env=cases.environment(), stderr=subprocess.PIPE, text=True)
    cases.wait_until(lambda: (output / CHECKPOINTS / "step-00000002" / "complete.json").exists(), process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert cases.weights(output) == cases.weights(alone)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_ranks_with_other_texts_are_refused(tmp_path: Path) -> None:
    """Catches ranks that train on different corpora, or wait for one another for ever."""
    text = (cases.folder() / "text.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "text.jsonl").write_text("".join(text[rank:]), encoding="utf-8")
    program = (
        "import os, sys, pretraining_cases as cases\n"
        "from fastbert.training.pretrain import pretrain\n"
        "rank = os.environ['RANK']\n"
        f"folder = {str(tmp_path)!r}\n"
        "text = (f'{folder}/{rank}/text.jsonl',)\n"
        "tokenizer, model = sys.argv[1:]\n"
        "pretrain(cases.settings(folder + '/model', text=text, tokenizer=tokenizer, model_config=model))\n"
    )
    (tmp_path / "program.py").write_text(program)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    place = cases.folder()
    run = [*start, str(tmp_path / "program.py"), str(place / "tokenizer"), str(place / "model.json")]
    path = os.pathsep.join([cases.environment()["PYTHONPATH"], str(cases.ROOT / "tests")])
    before = time.monotonic()
    done = fork_server.run(run, env=cases.environment(PYTHONPATH=path), timeout=300)
    assert done.returncode != 0
    assert "text: the processes differ: rank 0: " in done.stderr
    assert time.monotonic() - before < 120


def test_other_number_of_processes_goes_on_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a resume that is refused, or silent, where the machine has another number of devices."""
    output = tmp_path / "model"
    pretrain(cases.settings(output, tokens_per_batch=256))
    for name in ("model.safetensors", "training.jsonl"):
        (output / name).unlink()
    (output / CHECKPOINTS / "step-00000012" / "complete.json").unlink()
    done = cases.run(cases.settings(output, tokens_per_batch=256, resume=True), processes=2)
    assert "began with 1 processes and continues with 2" in done.stderr
