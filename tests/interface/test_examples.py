"""The examples of clusters: whole shell and YAML, and what the scripts do where their tools are stubs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from consonar.config_io import to_dict
from consonar.recipes import RECIPES
from consonar.training.checkpoints import list_resume
from consonar.training.config import TrainConfig
from consonar.training.tracking import read_metrics

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [EXAMPLES / "slurm" / "train.sbatch", EXAMPLES / "ssh" / "train.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_script_is_whole(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def lint(words: list[str], text: str | None = None) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("no shellcheck")
    found = subprocess.run([checker, *words], input=text, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_shellcheck_finds_nothing() -> None:
    lint([str(path) for path in SCRIPTS])
    _, job = yaml.safe_load_all((EXAMPLES / "kubernetes" / "train.yaml").read_text())
    lint(["-s", "bash", "-"], job["spec"]["template"]["spec"]["containers"][0]["args"][0])


def stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def run(words: list[str], folder: Path, **environment: str) -> str:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    given = os.environ | {"PATH": path, "SLURM_JOB_ID": "7", **environment}
    return subprocess.run(words, cwd=folder, env=given, capture_output=True, text=True, check=True).stdout


def slurm(folder: Path) -> None:
    """Slurm's part: `srun` kills its task when it is asked to end, `scancel` asks the task; `hostname` is this one."""
    asked = """trap 'kill -KILL "$task"; exit 137' TERM; while [[ $1 == --* ]]; do shift; done; "$@" & task=$!; """
    stub(folder, "srun", asked + 'echo "$task" > task; wait "$task"')
    stub(folder, "scancel", '[ "$*" = "--signal=TERM 7" ] && kill -TERM "$(cat task)"')
    stub(folder, "hostname", "echo 127.0.0.1")


def test_the_slurm_job_saves_on_sigterm_goes_back_into_the_queue_and_resumes(tmp_path: Path) -> None:
    """`torchrun` stands for the run: asked to end, it saves after a while, which the job waits for."""
    slurm(tmp_path / "bin")
    stub(tmp_path / "bin", "scontrol", '[ -f saved ] && echo "$@"')
    saves = """trap 'sleep 0.3; touch saved; exit 1' TERM; kill -TERM "$JOB"; while :; do sleep 0.05; done"""
    stub(tmp_path / "bin", "torchrun", f'echo "$@" >> called; [ -f saved ] || {{ JOB=$(ps -o ppid= $PPID); {saves}; }}')
    assert run(["bash", str(SCRIPTS[0])], tmp_path) == "requeue 7\n"
    assert run(["bash", str(SCRIPTS[0])], tmp_path) == ""
    assert run(["bash", str(SCRIPTS[0]), "rear-b", "out", "--seed", "1"], tmp_path) == ""
    first, second, third = (tmp_path / "called").read_text().splitlines()
    assert first == second and first.endswith("-m consonar train rear-l --out runs/rear-l --resume-if-begun")
    assert third.endswith("-m consonar train rear-b --out out --resume-if-begun --seed 1")


@pytest.mark.slow
def test_the_slurm_job_trains_on_two_processes_is_taken_off_and_goes_on(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """With torchrun and two processes of gloo. After each save the step is there."""
    slurm(tmp_path / "bin")
    stub(tmp_path / "bin", "scontrol", 'echo "$@" >> requeued')
    (tmp_path / "bin" / "torchrun").symlink_to(Path(sys.executable).with_name("torchrun"))
    config = make_config(loop={"steps": 100_000, "save_every": 10, "log_every": 5, "validate_every": 100_000})
    (tmp_path / "tiny.json").write_text(json.dumps(to_dict(config)))
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = os.environ | {"PATH": path, "SLURM_JOB_ID": "7", "GPUS": "2", "PORT": str(port), "OMP_NUM_THREADS": "1"}
    words = ["bash", str(SCRIPTS[0]), "tiny.json", "out", "--quiet"]
    saved: list[int] = []
    for _ in range(2):
        job = subprocess.Popen(words, cwd=tmp_path, env=given, stderr=subprocess.PIPE, text=True)
        while [int(path.stem[5:]) for path in list_resume(tmp_path / "out" / "checkpoints")][-1:] == saved[-1:]:
            assert job.poll() is None, job.communicate()
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=300)
        saved.append(int(list_resume(tmp_path / "out" / "checkpoints")[-1].stem[5:]))
        assert job.returncode == 0 and f"step {saved[-1]} is saved" in said, said
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" * 2
    lines = [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")]
    assert saved[0] < saved[1] and lines == list(range(5, saved[1] + 1, 5))


def test_the_ssh_script_starts_every_node_alike(tmp_path: Path) -> None:
    stub(tmp_path / "bin", "ssh-stub", 'echo "$@"')
    stub(tmp_path / "bin", "torchrun", "")
    torchrun = tmp_path / "bin" / "torchrun"
    words = ["bash", str(SCRIPTS[1]), "me@a b", "rear-l", "out", "--seed", "1"]
    lines = sorted(run(words, tmp_path, SSH="ssh-stub").splitlines())
    assert [line.split()[0] for line in lines] == ["b", "me@a"] and lines[0].split()[1:] == lines[1].split()[1:]
    command = f"cd {tmp_path} && exec env TORCH_ELASTIC_SHUTDOWN_TIMEOUT=570 {torchrun} --nnodes 2"
    assert command in lines[0] and "--rdzv-endpoint a:29500" in lines[0]
    assert "-m consonar train rear-l --out out --resume-if-begun --seed 1" in lines[0]


def test_the_ssh_script_fails_where_a_node_does(tmp_path: Path) -> None:
    stub(tmp_path / "bin", "ssh-stub", '[ "$1" = b ]')
    with pytest.raises(subprocess.CalledProcessError):
        run(["bash", str(SCRIPTS[1]), "a b", "rear-l", "out"], tmp_path, SSH="ssh-stub")


def test_the_kubernetes_job_has_what_an_indexed_job_needs() -> None:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes" / "train.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    (container,) = pod["containers"]
    (text,) = container["args"]
    subprocess.run(["bash", "-n", "-c", text], check=True)
    assert (
        f"--nnodes {spec['completions']} --nproc-per-node {container['resources']['limits']['nvidia.com/gpu']}" in text
    )
    assert text.split("consonar train ")[1].split()[0] in RECIPES
    assert f"{job['metadata']['name']}-0.{pod['subdomain']}:" in text
    (place,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "runs")
    assert container["workingDir"] == place  # tokens, models and the run are named relative to it
    assert container["env"] == [{"name": "CONSONAR_CACHE", "value": f"{place}/cache"}]
    (shared,) = (mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    assert {"name": shared, "emptyDir": {"medium": "Memory"}} in pod["volumes"]


def test_a_pod_saves_when_it_is_taken_off_and_starts_again_until_the_model_is_there(tmp_path: Path) -> None:
    _, job = yaml.safe_load_all((EXAMPLES / "kubernetes" / "train.yaml").read_text())
    words = ["bash", "-c", job["spec"]["template"]["spec"]["containers"][0]["args"][0]]
    asked = """trap 'sleep 0.3; touch saved; exit 1' TERM; sleep 0.3; kill -TERM $PPID; while :; do sleep 0.05; done"""
    for of_torchrun in (asked, "exit 0"):  # taken off; its neighbour was
        stub(tmp_path / "bin", "torchrun", of_torchrun)
        with pytest.raises(subprocess.CalledProcessError):
            run(words, tmp_path)
        assert (tmp_path / "saved").exists()
    stub(tmp_path / "bin", "torchrun", "mkdir -p rear-l/model; touch rear-l/model/config.json")
    assert run(words, tmp_path) == ""
