"""A process of several that ends, or hangs, ends the others with a line that names it."""

import json
import os
import subprocess
import sys

import pytest
from two_processes import free_port

from consonar.config_io import to_dict

WORKER = """
import os, signal, sys, time, torch
from consonar import cli
from consonar.training import loop
torch.set_num_threads(1)
inner = loop.update
def update(run, *arguments):
    if run.state.step == 2 and run.world.rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "dies" else time.sleep(60)
    return inner(run, *arguments)
loop.update = update
cli.main(["train", *sys.argv[3:]])
"""


@pytest.mark.parametrize("fate", ["dies", "hangs"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_named_and_ends_the_others(lost, fate, make_config, tmp_path):

    (tmp_path / "tiny.json").write_text(json.dumps(to_dict(make_config(loop={"save_every": 1}))))
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1",
             "CONSONAR_TIMEOUT": "4"}  # fmt: skip
    words = [str(lost), fate, str(tmp_path / "tiny.json"), "--out", str(tmp_path / "run")]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *words], env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        _, said = workers[1 - lost].communicate(timeout=120)
    finally:
        workers[lost].kill()
        workers[lost].wait()
    line = next(line for line in said.splitlines() if line.startswith("consonar: "))
    assert workers[1 - lost].returncode == 2 and "Traceback" not in said, said
    assert f"rank {1 - lost}: rank {lost} " in line and "has ended, or does not answer" in line, said
    if lost == 1 or fate == "hangs":
        assert f"process {workers[lost].pid} on" in line
