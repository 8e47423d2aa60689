"""Exact resume, and what a run folder refuses."""

import json
import os
from dataclasses import replace

import pytest
import torch

from consonar.components import load_generator, load_tokenizer, save_tokenizer
from consonar.cpu import timing
from consonar.errors import UserError
from consonar.files.lock import hold
from consonar.generators.rear import ReARConfig
from consonar.training.checkpoints import list_resume, load_resume
from consonar.training.config import DataConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.run import check_folder, train
from consonar.training.tracking import read_metrics

STEPS = 8


@pytest.fixture
def generator_config(make_config):
    """Everything that draws or moves is on."""
    return make_config(
        model=ReARConfig(width=32, num_layers=2, num_heads=4, dropout=0.1),
        objective=AutoregressiveConfig(embedding_weight=0.5, head_width=16, noise=NoiseConfig(schedule="linear")),
        loop={"steps": STEPS, "ema_decay": 0.9, "accumulation": 2},
    )


@pytest.fixture
def tokenizer_config(make_config, tokenizer, picture_folder):
    objective = ReconstructionConfig(
        perceptual_weight=0, discriminator_weight=0.1, discriminator_start=3, revive_after=1
    )
    return make_config(
        recipe="tokenizer-tiny", tokenizer=None, model=tokenizer.config, objective=objective,
        data=DataConfig(images=str(picture_folder), flip=True),
        loop={"steps": STEPS, "ema_decay": 0.9, "accumulation": 2},
    )  # fmt: skip


def flat(payload, path=""):
    """Every leaf of nested dicts and lists, by path."""
    items = payload.items() if isinstance(payload, dict) else enumerate(payload)
    leaves = {}
    for key, value in items:
        if isinstance(value, dict | list | tuple):
            leaves |= flat(value, f"{path}{key}.")
        else:
            leaves[f"{path}{key}"] = value
    return leaves


@pytest.mark.parametrize("kind", ["generator_config", "tokenizer_config"])
@pytest.mark.parametrize("stop", [3])
def test_resume_is_exact(kind, stop, request, tmp_path):
    config = request.getfixturevalue(kind)
    straight = train(config, tmp_path / "straight", quiet=True)
    broken = train(config, tmp_path / "broken", stop_at=stop, quiet=True)
    assert not (broken / "model").exists()
    torch.manual_seed(12345)  # another process would be in another state
    train(config, broken, resume=True, quiet=True)
    last = f"checkpoints/step_{STEPS:08d}.pt"
    ours, theirs = (flat(load_resume(run / last)) for run in (straight, broken))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
        assert same, key
    lines = [read_metrics(run / "metrics.jsonl") for run in (straight, broken)]
    strip = [[{k: v for k, v in line.items() if k != "time"} for line in run] for run in lines]
    assert strip[0] == strip[1]
    assert [line["step"] for line in lines[0] if "train/loss" in line] == list(range(1, STEPS + 1))
    if kind == "tokenizer_config":
        assert ours["model.steps_unused"].max() < STEPS, "no code was revived: the test shows nothing"
        assert load_tokenizer(broken / "model").fingerprint == load_tokenizer(straight / "model").fingerprint
    else:
        assert load_generator(broken).config == load_generator(straight).config


def test_a_run_keeps_the_kernel_of_the_optimizer_that_it_was_started_with(generator_config, tmp_path):
    """Whatever is faster on the machine that goes on with it."""
    for started, resumed in ((True, False), (False, True)):
        runs = [tmp_path / f"{name}-{started}" for name in ("straight", "broken")]
        with timing.forced("adamw", started):
            train(generator_config, runs[0], quiet=True)
            train(generator_config, runs[1], stop_at=3, quiet=True)
        with timing.forced("adamw", resumed):
            train(generator_config, runs[1], resume=True, quiet=True)
        ours, theirs = (load_resume(run / "checkpoints" / f"step_{STEPS:08d}.pt")["model"] for run in runs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_resumed_run_is_calculated_as_it_began_whatever_was_measured_since(generator_config, tmp_path, monkeypatch):
    """Where nothing could be kept on a busy machine, a quieter one later would take the other ways."""
    monkeypatch.setenv("CONSONAR_KERNELS", "measured")
    monkeypatch.setattr("consonar.precision.cpu_multiplies_bf16", lambda: True)
    generator_config = replace(generator_config, loop=replace(generator_config.loop, precision="auto"))
    runs = [tmp_path / name for name in ("straight", "broken")]
    for found, calls in ((None, ({"out": runs[0]}, {"out": runs[1], "stop_at": 3})), (3.0, ({"out": runs[1]},))):
        monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / f"cache {found}"))
        monkeypatch.setattr(timing, "time_ratio", lambda *ways, found=found: found)
        monkeypatch.setattr(timing, "_known", {})
        for call in calls:
            train(generator_config, resume=found is not None, quiet=True, **call)
    (answers,) = json.loads((runs[1] / "kernels.json").read_text()).values()
    assert set(answers.values()) == {1.0} and any("with dropout" in choice for choice in answers)
    sessions = json.loads((runs[1] / "sessions.json").read_text())["sessions"]
    assert [session["precision"] for session in sessions] == ["fp32", "fp32"]
    ours, theirs = (load_resume(run / "checkpoints" / f"step_{STEPS:08d}.pt")["model"] for run in runs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_finished_run_can_be_resumed_and_does_nothing(generator_config, tmp_path):
    run = train(generator_config, tmp_path / "run", quiet=True)
    before = (run / "metrics.jsonl").read_text(), (run / "model" / "model.safetensors").read_bytes()
    train(generator_config, run, resume=True, quiet=True)
    assert before == ((run / "metrics.jsonl").read_text(), (run / "model" / "model.safetensors").read_bytes())


def test_a_run_that_had_too_little_memory_goes_on_with_other_settings_of_it(generator_config, tmp_path):
    """More micro-batches and recomputed activations: the same run but for rounding."""
    config = replace(generator_config, model=replace(generator_config.model, dropout=0.0))
    whole = train(config, tmp_path / "whole", quiet=True)
    train(config, tmp_path / "run", stop_at=1, quiet=True)
    loop = replace(config.loop, accumulation=2 * config.loop.accumulation, activation_checkpointing=1)
    run = train(replace(config, loop=loop), tmp_path / "run", resume=True, quiet=True)
    ours, theirs = (load_resume(list_resume(each / "checkpoints")[-1])["model"] for each in (run, whole))
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-4) for key in ours)
    assert json.loads((run / "config.json").read_text())["loop"]["accumulation"] == loop.accumulation


def test_folders_that_are_refused(generator_config, tmp_path):
    run = train(generator_config, tmp_path / "run", stop_at=1, quiet=True)
    files = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=r"--out: .*run already holds a run; .*--resume"):
        train(generator_config, run, quiet=True)
    other = replace(generator_config, optim=replace(generator_config.optim, lr=0.5))
    with pytest.raises(UserError, match=r"--resume: optim\.lr is 0\.5, but .* was started with 0\.002"):
        train(other, run, resume=True, quiet=True)
    with pytest.raises(UserError, match=r"--resume: .* holds no run"):
        train(generator_config, tmp_path / "nothing", resume=True, quiet=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UserError, match="exists and is not a run"):
        train(generator_config, tmp_path / "photos", quiet=True)
    model = train(generator_config, tmp_path / "whole", quiet=True) / "model"
    for resume in (False, True):
        with pytest.raises(UserError, match=r"--out: .*model exists and is not a run"):
            train(generator_config, model, resume=resume, quiet=True)
    assert sorted(run.rglob("*")) == files and sorted(p.name for p in tmp_path.iterdir()) == ["photos", "run", "whole"]


def test_a_run_has_one_process_and_a_killed_one_hinders_nobody(generator_config, tmp_path, monkeypatch):
    run = train(generator_config, tmp_path / "run", stop_at=2, quiet=True)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with hold(run), pytest.raises(UserError, match=rf"run: process {os.getpid()} on .* is writing it"):
        train(generator_config, run, resume=True, quiet=True)
    assert files == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    left = [
        run / ".lock",
        run / "checkpoints" / ".step_00000004.pt.17.partial",
        run / "model" / ".config.json.17.partial",
    ]
    (run / "model").mkdir()
    for path in left:  # what SIGKILL leaves
        path.write_text("half")
    train(generator_config, run, resume=True, quiet=True)
    assert not any(path.exists() for path in left) and load_generator(run).num_tokens == 16


def test_a_run_made_by_another_process_meanwhile_is_not_taken_over(generator_config, tmp_path, monkeypatch):
    """Both find no folder; the second gets the lock when the first has finished."""
    checks = []

    def check(config, out, resume):
        checks.append(out)
        if len(checks) == 2:
            train(replace(config, seed=1), tmp_path / "other", stop_at=1, quiet=True)
            (tmp_path / "other" / "config.json").replace(out / "config.json")
        check_folder(config, out, resume)

    monkeypatch.setattr("consonar.training.run.check_folder", check)
    with pytest.raises(UserError, match="already holds a run"):
        train(generator_config, tmp_path / "run", quiet=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1


def test_a_damaged_checkpoint_is_named(generator_config, tmp_path):
    run = train(generator_config, tmp_path / "run", stop_at=2, quiet=True)
    (saved,) = list_resume(run / "checkpoints")
    saved.write_bytes(saved.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"step_00000002\.pt: damaged or cut short"):
        train(generator_config, run, resume=True, quiet=True)


def test_a_store_of_another_tokenizer_is_refused(generator_config, tokenizer, tmp_path):
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[0, 0] += 0.5
    save_tokenizer(tokenizer, tmp_path / "other")
    config = replace(generator_config, tokenizer=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"the tokenizer is 'tiny-vq' .*, in this run it is"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop": {"trackers": ("tensorbord",)}}, r"loop\.trackers: unknown 'tensorbord' \(did you mean 'tensorboard'"),
        ({"loop": {"batch_size": 9, "accumulation": 3}, "data": DataConfig()}, r"data\.tokens: no token store given"),
        ({"data": DataConfig(tokens="nowhere")}, r"data\.tokens: no token store at nowhere; make it with: consonar"),
        ({"data": DataConfig(tokens="nowhere", views="ten_crop")}, r"--views ten_crop --data \.\.\. --out nowhere"),
        (
            {"model": ReARConfig(width=32, num_heads=4, vocab_size=9)},
            r"model\.vocab_size: 9, but the token store has 32",
        ),
        ({"objective": AutoregressiveConfig(embedding_weight=1, encode_layer=7)}, r"head at layer 7, .* layers 0\.\.1"),
        ({"tokenizer": "nothing"}, r"tokenizer: unknown 'nothing'"),
    ],
)
def test_mistakes_leave_no_folder_behind(changes, message, make_config, tmp_path):
    """Else the corrected command would be told that the folder already holds a run."""
    with pytest.raises(UserError, match=message) as caught:
        train(make_config(**changes), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_run_folder_says_what_was_run(generator_config, tmp_path):
    from consonar.recipes import read_config

    run = train(generator_config, tmp_path / "run", stop_at=1, quiet=True)
    assert read_config(run / "config.json") == generator_config
    assert json.loads((run / "config.json").read_text())["loop"]["steps"] == STEPS


def test_a_finished_run_without_checkpoints_is_not_trained_anew(generator_config, tmp_path):
    """People remove checkpoints, which are large; the numbers and the model must outlive a --resume."""
    run = train(generator_config, tmp_path / "run", quiet=True)
    for path in list_resume(run / "checkpoints"):
        path.unlink()
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"--resume: .* holds a trained model and no checkpoint to go on from"):
        train(generator_config, run, resume=True, quiet=True)
    assert files == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_damaged_model_is_written_again_by_a_resume(generator_config, tmp_path):
    run = train(generator_config, tmp_path / "run", quiet=True)
    weights = run / "model" / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:3000], b"", whole[:-1]):
        weights.write_bytes(damaged)
        train(generator_config, run, resume=True, quiet=True)
        assert weights.read_bytes() == whole


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_a_run_that_goes_on_with_another_number_of_processes_says_so(dropout, generator_config, tmp_path, capsys):
    generator_config = replace(generator_config, model=replace(generator_config.model, dropout=dropout))
    run = train(generator_config, tmp_path / "run", stop_at=2, quiet=True)
    (saved,) = list_resume(run / "checkpoints")
    payload = load_resume(saved)
    assert payload["processes"] == 1
    torch.save(payload | {"processes": 4}, saved)
    train(generator_config, run, resume=True, stop_at=3, quiet=True)
    said = "step 2 was reached on 4 processes, now there are 1: dropout is drawn otherwise"
    assert (said in capsys.readouterr().err) == (dropout > 0)
    train(generator_config, run, resume=True, stop_at=4, quiet=True)
    assert capsys.readouterr().err == ""
