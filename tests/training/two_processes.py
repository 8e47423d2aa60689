"""Runs the same script as ranks 0 and 1 of one gloo world."""

import json
import os
import socket
import subprocess
import sys
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
