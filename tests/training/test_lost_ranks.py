"""A process of several that ends, or hangs, ends the others with a line that names it."""

import json
import os
import signal
import time

import pytest
from forked import two

from consonar import cli
from consonar.config_io import to_dict
from consonar.training import loop


def work(lost, fate, words):
    inner = loop.update

    def update(run, *arguments):
        if run.state.step == 2 and run.world.rank == lost:
            os.kill(os.getpid(), signal.SIGKILL) if fate == "dies" else time.sleep(60)
        return inner(run, *arguments)

    loop.update = update
    cli.main(["train", *words])


@pytest.mark.parametrize("fate", ["dies", "hangs"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_named_and_ends_the_others(lost, fate, make_config, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(to_dict(make_config(loop={"save_every": 1}))))
    words = [str(tmp_path / "tiny.json"), "--out", str(tmp_path / "run")]
    ranks = two(work, lost, fate, words, CONSONAR_TIMEOUT="4")
    pid = ranks[lost].process.pid
    try:
        ended = ranks[1 - lost].end()
    finally:
        ranks[lost].process.kill()
        ranks[lost].end()
    said = ended.err
    line = next(line for line in said.splitlines() if line.startswith("consonar: "))
    assert ended.code == 2 and "Traceback" not in said, said
    assert f"rank {1 - lost}: rank {lost} " in line and "has ended, or does not answer" in line, said
    if lost == 1 or fate == "hangs":
        assert f"process {pid} on" in line
