"""Checkpoints of a run whose weights lie in shards: on as many processes, on others, on one; damaged; without room."""

import errno
import io
import os
import pickle
import re
import signal
import sys
from dataclasses import replace
from pathlib import PurePosixPath

import pytest
import torch
from conftest import same
from forked import fork_two, run_on_two

from consonar import shards
from consonar.errors import UserError
from consonar.generators.rear import ReARConfig
from consonar.parallel import ParallelConfig
from consonar.training.checkpoints import list_resume, load_resume
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics

STEPS = 4
FSDP = ParallelConfig(strategy="fsdp")


@pytest.fixture
def config(make_config):
    return make_config(
        model=ReARConfig(width=32, num_layers=2, num_heads=4, dropout=0.0),
        objective=AutoregressiveConfig(embedding_weight=0.5, head_width=16),
        loop={"steps": STEPS, "save_every": 2, "ema_decay": 0.9},
    )


def close(ours, theirs):
    """Whether two nested payloads hold the same but for sums in another order; moments are not compared."""
    for part in ("model", "average"):
        for key, value in theirs[part].items():
            if not key.endswith("k_norm.bias"):  # its gradient is rounding alone
                torch.testing.assert_close(ours[part][key], value, rtol=1e-3, atol=2e-4)


def train_part(config, place):
    name, how = place.name.split()
    torch.manual_seed(len(how))
    out, inner = place.with_name(name), shards.Writer.write_data
    settings = {"whole": {}, "first": {"stop_at": 2}, "second": {"resume": True}, "full": {}}[how]
    if how == "second":  # what SIGKILL leaves of a save
        left = out / "checkpoints" / ".step_00000004.partial"
        left.mkdir(exist_ok=True)
        (left / ".metadata").write_text("half")

    def full(writer, *arguments):
        if how == "full" and os.environ["RANK"] == "1" and "step_00000004" in str(writer.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(writer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Writer, "write_data", full)
        try:
            train(config, out, quiet=True, **settings)
            assert how != "full"
        except UserError as error:
            assert how == "full" and "step_00000004: the disk is full" in str(error), error


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the second is Python 3.13's
def test_a_description_is_read_whatever_python_wrote_it(module):
    path = f"c{module}\nPurePosixPath\n(S'a'\ntR."
    assert shards.Description(io.BytesIO(path.encode())).load() == PurePosixPath("a")
    for other in ("posix\nsystem", "pathlib\nos", "os._local\nsystem"):
        with pytest.raises(pickle.UnpicklingError, match="it names"):
            shards.Description(io.BytesIO(f"c{other}\n(S'a'\ntR.".encode())).load()


def test_shards_are_gone_on_with_on_two_processes_and_on_one(config, tmp_path):
    alone = train(config, tmp_path / "alone", quiet=True)
    train(config, tmp_path / "joined", stop_at=2, quiet=True)  # by one process, gone on with in shards
    dropped = replace(config, model=replace(config.model, dropout=0.3), parallel=FSDP)
    sharded = replace(config, parallel=FSDP)
    run_on_two(
        train_part,
        {
            "exact whole": dropped, "half first": dropped, "half second": dropped,
            "joined second": sharded, "left full": sharded,
        },
        tmp_path,
    )  # fmt: skip
    runs = {name: tmp_path / name / "checkpoints" for name in ("exact", "half", "joined", "left")}
    for name in ("exact", "half", "joined"):
        path = runs[name] / "step_00000004"
        assert {each.name for each in path.iterdir()} == {"state.pt", ".metadata", "__0_0.distcp", "__1_0.distcp"}
        assert not list((tmp_path / name).rglob("*.partial"))
    assert [path.name for path in list_resume(runs["joined"])] == ["step_00000002.pt", "step_00000004"]
    whole, half = (load_resume(runs[name] / "step_00000004") for name in ("exact", "half"))
    assert whole["processes"] == 2 and len(whole["optimizer"]["state"]) > 9 and same(whole, half)

    theirs = load_resume(alone / "checkpoints" / "step_00000004.pt")
    close(load_resume(runs["joined"] / "step_00000004"), theirs)
    assert [path.name for path in runs["left"].iterdir()] == ["step_00000002"]  # of the one that failed nothing
    train(sharded, tmp_path / "left", resume=True, quiet=True)  # by two in shards, gone on with by one
    assert [path.name for path in list_resume(runs["left"])] == ["step_00000002", "step_00000004.pt"]
    close(load_resume(runs["left"] / "step_00000004.pt"), theirs)

    check_damage(tmp_path / "half" / "checkpoints" / "step_00000004")


WRITING = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def killed_at(moment, who):
    """From now on that file operation of a save, from 1 on, kills rank `who` or both, before it is done."""
    passed = []

    def see(event, about):
        opened = event == "open" and (about[1] is None or set(about[1]) & set("wa+"))
        if (opened or event in WRITING) and re.search(r"step_\d{8}|distcp|metadata|state.pt", str(about[0])):
            passed.append(event)
            if len(passed) == moment and who in (None, int(os.environ["RANK"])):
                os.kill(os.getpid(), signal.SIGKILL) if who is not None else os.killpg(0, signal.SIGKILL)

    sys.addaudithook(see)


@pytest.mark.slow
@pytest.mark.parametrize(("who", "stride"), [(None, 1), (0, 4), (1, 4)])
def test_processes_that_are_killed_at_any_moment_of_a_save_go_on(who, stride, config, tmp_path, monkeypatch):
    """With one checkpoint kept; both ranks, or one, upon which the other ends by itself."""
    monkeypatch.setenv("CONSONAR_TIMEOUT", "60")
    loop = replace(config.loop, keep_checkpoints=1, sample_every=0)
    config = replace(config, loop=loop, model=replace(config.model, num_layers=1, dropout=0.3), parallel=FSDP)
    assert fork_two(lambda: train(config, tmp_path / "straight", quiet=True)) == [0, 0]
    wanted = load_resume(tmp_path / "straight" / "checkpoints" / f"step_{STEPS:08d}")
    for moment in range(1, 99, stride):
        run = tmp_path / f"{moment}"

        def killed(moment=moment, run=run):
            killed_at(moment, who)
            train(config, run, quiet=True)

        ended = fork_two(killed)
        if ended == [0, 0]:
            break
        assert ended == [-signal.SIGKILL] * 2 if who is None else ended[who] == -signal.SIGKILL != ended[1 - who] != 0
        steps = [load_resume(path)["step"] for path in list_resume(run / "checkpoints")]
        reached = max((line["step"] for line in read_metrics(run / "metrics.jsonl")), default=0)
        assert reached - max(steps, default=0) <= 2 * loop.save_every, (moment, steps, reached)
        assert fork_two(lambda run=run: train(config, run, quiet=True, resume=True)) == [0, 0]
        assert same(load_resume(run / "checkpoints" / f"step_{STEPS:08d}"), wanted), moment
        assert not list(run.rglob("*.partial"))
    assert moment > 12


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def check_damage(path):
    """Every file of the folder, cut, changed or gone, is found, and nothing in it is executed."""
    kept = {file: file.read_bytes() for file in path.iterdir()}
    for file, content in kept.items():
        middle = len(content) // 2
        changed = bytearray(content)
        changed[middle] ^= 1
        for damaged in (b"", content[:middle], bytes(changed), pickle.dumps(Evil())):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{path.name}.*remove it to resume from the one before") as caught:
                load_resume(path)
            assert "\n" not in str(caught.value)
        file.unlink()
        with pytest.raises(UserError, match=path.name):
            load_resume(path)
        file.write_bytes(content)
    load_resume(path)
