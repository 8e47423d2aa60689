"""Calls a function as ranks 0 and 1 of one gloo world: processes of a server, or children of this one."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

from processes import free_port, on_two

from consonar.training.config import TrainConfig

Job = Callable[[TrainConfig, Path], object]


def run_on_two(run: Job, configs: dict[str, TrainConfig], folder: Path) -> None:
    """`run(config, folder / name)` for every configuration, each in a world of its own; `run` is a module's function.

    Raises AssertionError with what a rank wrote to stderr when it fails.
    """
    jobs = [(config, folder / name, free_port()) for name, config in configs.items()]
    for rank in on_two(run_each, run, jobs):
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
