"""Checkpoints are written while the run goes on, and outlast what happens to process, disk and clock."""

import errno
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import same

from consonar import cli
from consonar.errors import UserError
from consonar.generators.rear import ReARConfig
from consonar.training import build, checkpoints
from consonar.training.checkpoints import list_resume, load_resume, save_resume
from consonar.training.run import train

STEPS = 4


@pytest.fixture
def config(make_config):
    model = ReARConfig(width=32, num_layers=1, num_heads=4, dropout=0.1)
    return make_config(model=model, loop={"steps": STEPS, "save_every": 1, "keep_checkpoints": STEPS})


def assert_same_end(*runs):
    first, second = (load_resume(list_resume(run / "checkpoints")[-1]) for run in runs)
    assert first["step"] == STEPS and same(first, second)
    assert len({(run / "model" / "model.safetensors").read_bytes() for run in runs}) == 1


def steps_of(run):
    return [load_resume(path)["step"] for path in list_resume(run / "checkpoints")]


def test_the_steps_after_a_save_do_not_wait_for_it_and_do_not_change_it(config, tmp_path, monkeypatch):
    straight = train(config, tmp_path / "straight", quiet=True)
    written = threading.Event()
    save, saved_at = save_resume, []

    def slow(folder, step, payload, keep):
        if step == 1:
            assert written.wait(60), "the run waits for the disk"
        saved_at.append(step)
        return save(folder, step, payload, keep)

    def on_step(step):
        if step == 2:
            assert saved_at == []
            written.set()

    monkeypatch.setattr(checkpoints, "save_resume", slow)
    run = train(config, tmp_path / "run", quiet=True, on_step=on_step)
    assert saved_at == [1, 2, 3, 4] == steps_of(run)
    for ours, theirs in zip(*(list_resume(each / "checkpoints") for each in (run, straight)), strict=True):
        assert same(load_resume(ours), load_resume(theirs)), ours.name


def failing(at, error):
    """`torch.save` that writes half and raises at its call number `at`."""
    inner, calls = torch.save, []

    def save(payload, path):
        calls.append(path)
        if len(calls) == at:
            path.write_bytes(b"half")
            raise error
        inner(payload, path)

    return save


REFUSED = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "step_00000003.pt: the disk is full"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "checkpoints"), "checkpoints: Read-only file system"),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied", "checkpoints"), "checkpoints: Permission denied"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("steps", [3, STEPS])  # while steps are left, and at the end
def test_a_save_that_fails_ends_the_run_in_one_line_and_it_goes_on_later(
    kind, steps, config, tmp_path, monkeypatch, capsys
):
    error, message = REFUSED[kind]
    straight = train(config, tmp_path / "straight", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing(3, error))
        with pytest.raises(SystemExit, match="2"), cli.errors_told("train"):
            train(config, tmp_path / "run", quiet=True, stop_at=steps)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert steps_of(tmp_path / "run") == [1, 2] and not list((tmp_path / "run").rglob("*.partial"))
    train(config, tmp_path / "run", resume=True, quiet=True)
    assert_same_end(straight, tmp_path / "run")


def test_what_the_disk_gives_back_otherwise_than_it_was_written_is_not_kept(tmp_path, monkeypatch):
    payload = {"a": torch.arange(99.0)}
    kept, inner = save_resume(tmp_path, 1, payload, keep=1), torch.save

    def damaged(payload, path):
        inner(payload, path)
        held = bytearray(path.read_bytes())
        held[held.index(payload["a"].numpy().tobytes()) + 7] ^= 1
        path.write_bytes(held)

    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(UserError, match=r"step_00000002\.pt: .*the checksum of .* is another.*the one before it is"):
        save_resume(tmp_path, 2, payload, keep=1)
    assert list(tmp_path.iterdir()) == [kept] and same(load_resume(kept)["a"], payload["a"])


def killed_at(moment):
    """Makes this process kill itself, as SIGKILL does, at its so many-th moment of saving checkpoints."""
    passed = []

    def pass_one():
        if threading.current_thread().name.startswith("checkpoint"):
            passed.append(1)
            if len(passed) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(inner):
        def call(*arguments, **options):
            pass_one()
            result = inner(*arguments, **options)
            pass_one()
            return result

        return call

    inner = torch.save

    def save(payload, path):
        inner(payload, path)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        pass_one()
        Path(path).write_bytes(whole)
        pass_one()

    torch.save = save
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, around(getattr(os, name)))


def in_a_child(run):
    """Forks a process that calls `run`; returns the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def test_a_run_that_is_killed_at_any_moment_of_a_save_goes_on(make_config, tmp_path):
    """With one checkpoint kept: that of the step before is there until the next one is."""
    config = make_config(
        model=ReARConfig(width=32, num_layers=1, num_heads=4, dropout=0.1),
        loop={"steps": STEPS, "save_every": 2, "keep_checkpoints": 1},
    )
    straight = train(config, tmp_path / "straight", quiet=True)
    before = None
    for moment in range(1, 99):
        run = tmp_path / f"{moment}"

        def killed(moment=moment, run=run):
            killed_at(moment)
            train(config, run, quiet=True)

        if not in_a_child(killed):
            break
        steps = steps_of(run)  # every one that is listed can be read
        assert not (before and not steps) and len(steps) <= 2, (moment, steps)
        before = steps
        train(config, run, resume=True, quiet=True)
        assert_same_end(straight, run)
        assert not list(run.rglob("*.partial"))
    assert moment > 12 and before[-1] == STEPS


def test_a_checkpoint_is_there_when_the_picture_of_its_step_kills_the_process(config, tmp_path, monkeypatch):
    config = replace(config, loop=replace(config.loop, sample_every=1))
    straight = train(config, tmp_path / "straight", quiet=True)
    run = tmp_path / "run"

    def picture(*arguments):
        while not list_resume(run / "checkpoints"):  # it waits for the disk alone, not for the picture
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def trained():
        build.preview_samples = picture
        train(config, run, quiet=True)

    assert in_a_child(trained) == signal.SIGKILL and steps_of(run) == [1]
    train(config, run, resume=True, quiet=True)
    assert_same_end(straight, run)


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_jumps_changes_nothing(jump, config, tmp_path, monkeypatch):
    straight = train(config, tmp_path / "straight", quiet=True)
    run = train(config, tmp_path / "run", stop_at=3, quiet=True)
    for age, path in enumerate(list_resume(run / "checkpoints")):
        os.utime(path, (1e9 - age, 1e9 - age))  # the newest file is the oldest checkpoint
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    train(config, run, resume=True, quiet=True)
    assert steps_of(run) == [1, 2, 3, 4]
    assert_same_end(straight, run)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_gone_on_from(damage, config, tmp_path):
    straight = train(config, tmp_path / "straight", quiet=True)
    run = train(config, tmp_path / "run", stop_at=3, quiet=True)
    last = list_resume(run / "checkpoints")[-1]
    whole = bytearray(last.read_bytes())
    if damage == "cut":
        whole = whole[: len(whole) // 2]
    else:
        whole[len(whole) // 2] ^= 1
    last.write_bytes(whole)
    with pytest.raises(UserError, match=rf"{last.name}: .*; remove it to resume from the one before"):
        train(config, run, resume=True, quiet=True)
    last.unlink()
    train(config, run, resume=True, quiet=True)
    assert_same_end(straight, run)


def test_a_tensor_that_one_bit_calls_a_folder_is_refused(tmp_path):
    """PyTorch reads it as what lies in memory just then, whatever the checksums say."""
    path = save_resume(tmp_path, 1, {"model": {"w": torch.ones(64)}}, keep=1)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0"))
    content[entry + 38] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data/0 is a folder\); remove it to resume from the one before"):
        load_resume(path)


def test_casts_of_the_average_are_not_kept(monkeypatch):
    """Autocast keeps them until the outermost context ends, in older PyTorch those of inference mode too."""
    model, cleared = torch.nn.Linear(1, 1), []
    own = {key: value.clone() for key, value in model.state_dict().items()}
    state = checkpoints.State(
        model, torch.optim.SGD(model.parameters()), {key: value + 1 for key, value in own.items()}
    )
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(same(dict(model.state_dict()), own)))
    with state.averaged():
        assert not cleared and not same(dict(model.state_dict()), own)
    assert cleared == [True], "after the weights are those of the model again"
