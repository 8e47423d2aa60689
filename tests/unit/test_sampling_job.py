"""Sampling jobs: their output is made of what they expect, whatever lies beside it."""

import json
import os
import shutil
import signal
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import call, on_two
from torch.nn import functional as F

from consonar import cli
from consonar.components import save_generator
from consonar.data.transforms import to_uint8
from consonar.errors import UserError
from consonar.files import shared_work
from consonar.files.lock import hold
from consonar.generators import build_generator
from consonar.generators.llamagen import LlamaGenConfig
from consonar.origin import Origin
from consonar.sampling import job as jobs
from consonar.sampling.sample import SamplerConfig
from consonar.types import Grid

COUNT = 6


@pytest.fixture
def draw(tiny_generator, tokenizer, tmp_path):
    """Runs the job of six images (or with other settings) into tmp_path/name, in shards of `size`."""
    generator = tiny_generator()

    def run(name="a.npz", size=2, stop=None, seed=0, source="run", origin=None, progress=None, **options):
        labels, sampler = jobs.balanced_labels(COUNT, 3), SamplerConfig()
        job = jobs.Job(generator, tokenizer, labels, seed=seed, sampler=sampler, source=source, origin=origin)

        def stopped(done):
            if done == stop:
                raise KeyboardInterrupt

        return jobs.run_job(job, tmp_path / name, shard_size=size, progress=progress or stopped, **options)

    return run


def content(path):
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    if path.suffix == ".png":
        return {"": path.read_bytes()}
    with np.load(path) as arrays:
        return {key: arrays[key].tobytes() for key in arrays.files}


@pytest.fixture
def counted(monkeypatch):
    """How many images each call of the sampler drew."""
    drawn, original = [], jobs.draw
    monkeypatch.setattr(jobs, "draw", lambda *a, **k: drawn.append(len(a[2])) or original(*a, **k))
    return drawn


def test_pictures_are_reduced_before_they_are_clamped(tiny_generator, tokenizer, tmp_path):
    def job(image_size):
        labels = jobs.balanced_labels(COUNT, 3)
        return jobs.Job(
            tiny_generator(), tokenizer, labels, seed=0, sampler=SamplerConfig(), source="x", image_size=image_size
        )

    with np.load(jobs.run_job(job(12), tmp_path / "a.npz")) as found:
        pictures, tokens = found["arr_0"], torch.from_numpy(found["tokens"])
        assert json.loads(str(found["settings"]))["image_size"] == 12
    whole = tokenizer.decode(tokens)
    expected = to_uint8(F.interpolate(whole, (12, 12), mode="bicubic").clamp(-1, 1)).numpy()
    assert np.abs(pictures.astype(int) - expected).max() <= 1 < np.ptp(expected)
    assert "image_size" not in job(None).settings
    for wrong in (0, 17, "12"):
        with pytest.raises(UserError, match=f"^image_size: {wrong} is not from 1 to 16"):
            job(wrong)


def ended_while_it_tidies(monkeypatch):
    """The next removal of a folder does not come to its end."""

    def ended(folder):
        monkeypatch.undo()
        next(Path(folder).glob("shard_*")).rename(Path(folder) / "half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shared_work, "remove", ended)


def test_shards_of_a_finished_job_are_removed_by_the_next_call(draw, tmp_path, monkeypatch):
    ended_while_it_tidies(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        draw()
    assert (tmp_path / "a.npz").exists() and (tmp_path / "a.npz.parts" / "half").exists()
    with pytest.raises(UserError, match=r"a\.npz exists"):
        draw(seed=5)
    assert (tmp_path / "a.npz.parts" / "half").exists(), "they are another job's"
    with pytest.raises(UserError, match=r"a\.npz exists"):
        draw()
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_file_that_comes_meanwhile_is_not_taken_for_the_samples(draw, tmp_path, monkeypatch):
    original = jobs.draw

    def another_came(*args, **options):
        (tmp_path / "a.npz").write_text("the user's")
        return original(*args, **options)

    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"a\.npz came meanwhile; .*a\.npz\.parts"):
        patched.setattr(jobs, "draw", another_came)
        draw()
    with pytest.raises(UserError, match=r"a\.npz exists"):
        draw()
    assert (tmp_path / "a.npz").read_text() == "the user's"
    (tmp_path / "a.npz").unlink()
    draw()
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_what_a_failing_removal_leaves_is_still_the_jobs(tmp_path, monkeypatch):
    for name in ("job.json", "shard_0.npz", "shard_1.npz"):
        (tmp_path / name).touch()

    def refused(path):
        raise OSError(5, "no")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="no"):
        broken.setattr(Path, "unlink", refused)
        shared_work.remove(tmp_path)
    assert (tmp_path / "job.json").exists()
    shared_work.remove(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize("name", ["a.npz", "a.png", "a"])
def test_shards_of_another_size_are_not_mixed_in(name, draw, tmp_path):
    whole = content(draw(f"whole{name[1:]}", size=COUNT))
    with pytest.raises(KeyboardInterrupt):
        draw(name, size=4, stop=4)
    assert list((tmp_path / f"{name}.parts").glob("shard_*_4.npz"))
    assert content(draw(name, size=2)).keys() == whole.keys()
    if name == "a.npz":
        with np.load(tmp_path / name) as arrays:
            assert arrays["seeds"].tolist() == list(range(COUNT)) and len(arrays["arr_0"]) == COUNT
    assert not (tmp_path / f"{name}.parts").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 255
    path.write_bytes(data)


def another(path):
    path.write_bytes((path.parent / "shard_00000002_2.npz").read_bytes())


@pytest.mark.parametrize("damage", [cut, flip, another, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_shard_that_is_not_whole_is_drawn_again(damage, draw, counted, tmp_path):
    whole = content(draw("whole.npz"))
    with pytest.raises(KeyboardInterrupt):
        draw(stop=4)
    counted.clear()
    damage(tmp_path / "a.npz.parts" / "shard_00000000_2.npz")
    assert content(draw()) == whole and counted == [2, 2]


def test_an_old_folder_of_pictures_is_not_mixed_in(draw, tmp_path):
    whole = content(draw("whole"))
    with pytest.raises(KeyboardInterrupt):
        draw("a", stop=6)
    (tmp_path / "a.parts" / "pictures").mkdir()
    (tmp_path / "a.parts" / "pictures" / "000009_class1.png").touch()
    assert content(draw("a")) == whole


def test_a_shard_that_goes_while_the_output_is_made_leaves_no_output(draw, tmp_path, monkeypatch):
    assemble = jobs.assemble

    def racing(shards, *given):
        shards[0][0].unlink()
        assemble(shards, *given)

    monkeypatch.setattr(jobs, "assemble", racing)
    with pytest.raises(UserError, match="the same command goes on"):
        draw()
    assert not (tmp_path / "a.npz").exists()
    monkeypatch.setattr(jobs, "assemble", assemble)
    assert len(np.load(draw())["arr_0"]) == COUNT


def test_a_job_of_another_precision_is_told_how_it_goes_on(draw, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        draw(stop=4)
    record = next(tmp_path.glob("*.parts")) / "job.json"
    record.write_text(record.read_text().replace('"precision": "fp32"', '"precision": "bf16"'))
    with pytest.raises(UserError, match=r"another job \(another precision: --precision bf16 goes on\); remove it or"):
        draw()


def test_another_job_is_refused_by_what_differs_or_begins_anew(draw, counted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        draw(stop=4)
    with pytest.raises(UserError, match=r"unfinished samples of another job \(another seed\); remove it or"):
        draw(seed=1)
    counted.clear()
    with np.load(draw(seed=1, restart=True)) as arrays:
        assert arrays["seeds"].tolist() == list(range(1, COUNT + 1)) and counted == [2, 2, 2]


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_that_is_not_the_jobs_is_left_alone(restart, draw, tmp_path):
    (tmp_path / "a.npz.parts").mkdir()
    for name in ("notes.txt", "shard_00000.npz"):
        (tmp_path / "a.npz.parts" / name).write_text("mine")
        with pytest.raises(UserError, match=r"--out: .*a\.npz\.parts.*holds something else; choose another name"):
            draw(restart=restart)
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name]
        (tmp_path / "a.npz.parts" / name).unlink()
    (tmp_path / "a.npz.parts" / ".lock").touch()  # what a killed process left that had not begun
    assert draw().is_file() and not (tmp_path / "a.npz.parts").exists()


@pytest.mark.parametrize("record", [b"\xd9\xff", b"[]", b"{", b"{}"])
def test_a_damaged_record_of_a_job_is_refused_in_one_line(record, draw, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        draw(stop=4)
    (tmp_path / "a.npz.parts" / "job.json").write_bytes(record)
    with pytest.raises(UserError, match=r"unfinished samples of another job \((its job.json is damaged|another gen)"):
        draw()
    assert draw(restart=True).is_file()


def test_a_job_goes_on_when_its_generator_is_called_otherwise(draw, counted, tmp_path):
    """`runs/x/` for `runs/x`, or a run that was moved: what it is made of is compared, not where it lies."""
    origin = Origin(tokenizer="old/place", class_names=("a", "b", "c"))
    with pytest.raises(KeyboardInterrupt):
        draw(stop=4, source="runs/x", origin=origin)
    counted.clear()
    draw(source="runs/x/", origin=replace(origin, tokenizer="new/place"))
    assert counted == [2]


@pytest.mark.parametrize("ended", ["well", "before it drew"])
def test_processes_share_a_job(ended, draw, counted, tmp_path):
    """While another process is at the first shard its siblings are drawn; then it is there, or drawn as well."""
    with pytest.raises(KeyboardInterrupt):
        draw("b.npz", stop=2)
    counted.clear()
    first, messages = "shard_00000000_2", []
    with ExitStack() as other:
        other.enter_context(hold(tmp_path / "a.npz.parts" / first))
        shutil.copy(tmp_path / "b.npz.parts" / "job.json", tmp_path / "a.npz.parts")

        def progress(done):
            messages.append((done, list(counted)))
            if done == 4:
                if ended == "well":
                    shutil.copy(tmp_path / "b.npz.parts" / f"{first}.npz", tmp_path / "a.npz.parts")
                other.close()

        assert draw(progress=progress) == tmp_path / "a.npz"
    last = [2, 2] if ended == "well" else [2, 2, 2]
    assert messages == [(2, [2]), (4, [2, 2]), (6, last)]
    assert content(tmp_path / "a.npz") == content(draw("b.npz"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_a_process_that_hangs_is_named_and_one_that_works_says_so(draw, tmp_path, monkeypatch):
    """The hung one holds the first shard; the others are drawn before."""
    beats = Counter()

    @contextmanager
    def counting(folder, **how):
        with hold(folder, **how) as beat:
            yield lambda: (beat(), beats.update([folder.name]))

    monkeypatch.setattr(shared_work, "hold", counting)
    monkeypatch.setenv("CONSONAR_TIMEOUT", "1")
    with pytest.raises(KeyboardInterrupt):
        draw(stop=2)
    (tmp_path / "a.npz.parts" / "shard_00000000_2.npz").unlink()
    with (
        hold(tmp_path / "a.npz.parts" / "shard_00000000_2"),
        pytest.raises(UserError, match=rf"shard_00000000_2: process {os.getpid()} on .* has not got on for \d+ s"),
    ):
        draw()
    draw()
    assert beats.pop("a.npz.parts") >= 3 and beats == {
        f"shard_0000000{first}_2": 1 + (first == 0) for first in (0, 2, 4)
    }


def test_who_comes_last_finds_the_output(draw, tmp_path, monkeypatch):
    """Another process makes `out` of the last shards between two looks."""
    made = draw("b.npz")
    monkeypatch.setattr(jobs, "of_every", lambda value, world: made.rename(tmp_path / "a.npz"))
    assert draw() == tmp_path / "a.npz"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_the_record_knows_the_architecture(tokenizer):
    """Two models with equal weights that calculate something else."""
    config = LlamaGenConfig(
        width=32, num_layers=1, num_heads=2, vocab_size=32, num_tokens=16, num_classes=3, grid=Grid(4, 4)
    )
    models = [build_generator(config), build_generator(replace(config, rope_base=100.0))]
    models[1].load_state_dict(models[0].state_dict())
    records = [
        jobs.Job(m, tokenizer, jobs.balanced_labels(2, 3), seed=0, sampler=SamplerConfig(), source="x").settings
        for m in models
    ]
    assert records[0]["generator_sha256"] != records[1]["generator_sha256"]


@pytest.fixture
def model(tiny_generator, tokenizer, tokenizer_folder, tmp_path):
    origin = Origin(tokenizer=str(tokenizer_folder), tokenizer_fingerprint=tokenizer.fingerprint)
    save_generator(tiny_generator(), tmp_path / "model", origin)
    return tmp_path / "model"


def sample(model, out, size, killed=False):
    """The command, in shards of `size`; killed in the middle of the second, or not."""
    jobs.run_job.__kwdefaults__["shard_size"] = size
    inner, calls = jobs.write_npz, []

    def write(path, arrays):
        print("drew", path.name[:15], flush=True)
        calls.append(path)
        if killed and len(calls) == 2:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        inner(path, arrays)

    jobs.write_npz = write
    cli.main(["sample", str(model), "--num-samples", str(COUNT), "--out", str(out)])


def test_a_killed_command_goes_on(model, tmp_path):
    """SIGKILL in the middle of the second shard."""
    out, parts = tmp_path / "a.npz", tmp_path / "a.npz.parts"
    assert call(sample, model, out, 2, True).code == -signal.SIGKILL and not out.exists()
    assert {"job.json", "shard_00000000_2.npz"} < {path.name for path in parts.iterdir()}
    done = call(sample, model, out, 2)
    assert done.code == 0, done.err
    with np.load(out) as arrays:
        assert arrays["seeds"].tolist() == list(range(6)) and json.loads(str(arrays["settings"]))["num_samples"] == 6
    assert not parts.exists()


def test_torchrun_shares_a_job(model, tmp_path):
    """Two ranks draw each shard once, both end well, and one says so."""
    ranks = on_two(sample, model, tmp_path / "a.npz", 1)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    drawn = [f"drew .shard_{index:08d}" for index in range(6)]
    lines = sorted(line for rank in ranks for line in rank.out.splitlines())
    assert lines == sorted([f"6 images: {tmp_path / 'a.npz'}", *drawn])
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["seeds"].tolist() == list(range(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "model"]
