"""Runs the same script, or a function in children of this process, as ranks 0 and 1 of one gloo world."""

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from consonar.config_io import to_dict
from consonar.training.config import TrainConfig


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def run_on_two(script: str, configs: dict[str, TrainConfig], folder: Path) -> None:
    """Writes folder/NAME.json for every configuration; `script` gets each path and a free port for it as arguments.

    Raises AssertionError with what a rank wrote to stderr when it fails.
    """
    arguments = []
    for name, config in configs.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(to_dict(config)))
        arguments += [str(path), free_port()]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments], env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors


def fork_two(run: Callable[[], object]) -> list[int]:
    """Calls `run` in two children, a process group of their own: how each ended, a signal below 0."""
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    children: list[int] = []
    for rank in "01":
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, children[0] if children else 0)
                os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
                run()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
        if len(children) == 1:
            os.setpgid(child, child)  # whoever is first: the second one needs it
    del os.environ["WORLD_SIZE"]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
