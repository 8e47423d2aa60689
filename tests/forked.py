"""Other processes for tests: children of a server that has imported what commands need, so that each starts at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from consonar.training.config import TrainConfig

Job = Callable[[TrainConfig, Path], object]
SERVER = multiprocessing.get_context("forkserver")
"""Processes are forked from it before anything was calculated: threads and devices are not forked."""
COMMANDS = ("evaluate", "sample", "tokenize", "train")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "datasets", "pytest", *(f"consonar.cli.{name}" for name in COMMANDS)]
)
SECONDS, GLOO = 300, "[Gloo]"
"""How long one may take; what lines begin with that PyTorch 2.10 itself prints."""


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
        """Waits for it; one that takes `SECONDS` is killed."""
        self.process.join(SECONDS)
        self.process.kill()
        self.process.join()
        with self.said as folder:
            said = ((Path(folder) / name).read_text().splitlines(keepends=True) for name in ("out", "err"))
            ours = ("".join(line for line in lines if not line.startswith(GLOO)) for lines in said)
            return Ended(self.process.exitcode, *ours)


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


def two(run: Callable[..., object], *arguments: object, count: int = 2, **environment: str) -> list[Child]:
    """The ranks of one world, 0 and 1 where no other `count` is given, as torchrun starts them."""
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    world = {"WORLD_SIZE": str(count), **port, "TORCHELASTIC_RUN_ID": "none"}
    ranks = map(str, range(count))
    return [Child(run, *arguments, **world, **environment, RANK=rank, LOCAL_RANK=rank) for rank in ranks]


def on_two(run: Callable[..., object], *arguments: object, **environment: str) -> list[Ended]:
    return [rank.end() for rank in two(run, *arguments, **environment)]


def run_on_two(run: Job, configs: dict[str, TrainConfig], folder: Path, count: int = 2) -> None:
    """`run(config, folder / name)` for every configuration, each in a world of its own, of two processes where no other
    `count` is given; `run` is a module's function.

    Raises AssertionError with what a rank wrote to stderr when it fails.
    """
    jobs = [(config, folder / name, free_port()) for name, config in configs.items()]
    for rank in [child.end() for child in two(run_each, run, jobs, count=count)]:
        assert rank.code == 0, rank.err


def run_each(run: Job, jobs: list[tuple[TrainConfig, Path, str]]) -> None:
    for config, out, port in jobs:
        os.environ["MASTER_PORT"] = port
        run(config, out)


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
