"""Other processes for tests: children of a server that has imported what commands need, so that each starts at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

SERVER = multiprocessing.get_context("forkserver")
"""Processes are forked from it before anything was calculated: threads and devices are not forked."""
COMMANDS = ("evaluate", "sample", "tokenize", "train")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "datasets", "pytest", *(f"consonar.cli.{name}" for name in COMMANDS)]
)
SECONDS = 300


class Ended(NamedTuple):
    """How a process ended: its status, below 0 the signal; what it said."""

    code: int
    out: str
    err: str


class Child:
    """`run(*arguments)`, a function of a module, in a process of its own under this environment and some more."""

    def __init__(self, run: Callable[..., object], *arguments: object, **environment: str) -> None:
        self.said = TemporaryDirectory()
        given = (self.said.name, os.environ | environment, run, arguments)
        self.process = SERVER.Process(target=begin, args=given)
        self.process.start()

    def end(self) -> Ended:
        """Waits for it; one that takes minutes is killed."""
        self.process.join(SECONDS)
        self.process.kill()
        self.process.join()
        with self.said as folder:
            return Ended(self.process.exitcode, *((Path(folder) / name).read_text() for name in ("out", "err")))


def begin(folder: str, environment: dict[str, str], run: Callable[..., object], arguments: tuple[object, ...]) -> None:
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    run(*arguments)


def call(run: Callable[..., object], *arguments: object, **environment: str) -> Ended:
    return Child(run, *arguments, **environment).end()


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def two(run: Callable[..., object], *arguments: object, **environment: str) -> list[Child]:
    """Ranks 0 and 1 of one world, as torchrun starts them."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "none"}
    return [Child(run, *arguments, **world, **environment, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def on_two(run: Callable[..., object], *arguments: object, **environment: str) -> list[Ended]:
    return [rank.end() for rank in two(run, *arguments, **environment)]
