"""The examples of clusters: whole shell and YAML, and what the scripts do where their tools are stubs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from consonar.recipes import RECIPES

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [EXAMPLES / "slurm" / "train.sbatch", EXAMPLES / "ssh" / "train.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_script_is_whole(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def run(words: list[str], folder: Path, **environment: str) -> str:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    given = os.environ | {"PATH": path, "SLURM_JOB_ID": "7", **environment}
    return subprocess.run(words, cwd=folder, env=given, capture_output=True, text=True, check=True).stdout


def test_the_slurm_job_saves_on_sigterm_goes_back_into_the_queue_and_resumes(tmp_path: Path) -> None:
    """`srun` stands for the run: asked to end, it saves after a while, which the job waits for."""
    asked = 'echo "$@" >> called; mkdir -p out; touch out/config.json; kill -TERM $PPID; '
    stub(tmp_path / "bin", "srun", asked + "trap 'sleep 0.3; touch saved; exit 0' TERM; while :; do sleep 0.05; done")
    stub(tmp_path / "bin", "scontrol", '[ -f saved ] && echo "$@"')
    words = ["bash", str(SCRIPTS[0]), "rear-l", "out", "--seed", "1"]
    assert run(words, tmp_path) == "requeue 7\n"
    stub(tmp_path / "bin", "srun", 'echo "$@" >> called')
    assert run(words, tmp_path) == ""
    first, second = (tmp_path / "called").read_text().splitlines()
    assert first.endswith("-m consonar train rear-l --out out --seed 1")
    assert second.endswith("-m consonar train rear-l --out out --resume --seed 1")


def test_the_ssh_script_starts_every_node_alike(tmp_path: Path) -> None:
    stub(tmp_path / "bin", "ssh-stub", 'echo "$@"')
    words = ["bash", str(SCRIPTS[1]), "a b", "rear-l", "out", "--seed", "1"]
    lines = sorted(run(words, tmp_path, SSH="ssh-stub").splitlines())
    assert [line[:2] for line in lines] == ["a ", "b "] and lines[0][2:] == lines[1][2:]
    assert f"cd {tmp_path} && exec torchrun --nnodes 2" in lines[0] and "--rdzv-endpoint a:29500" in lines[0]
    assert "-m consonar train rear-l --out out --seed 1" in lines[0]


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
