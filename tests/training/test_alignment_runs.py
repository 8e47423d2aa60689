"""Post-training as a user starts it: from a trained run, resumed, stopped by the guard, best kept, two processes."""

import json
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import NUM_CLASSES, TINY_VQ, picture
from forked import run_on_two
from PIL import Image

from consonar.components import load_generator, load_tokenizer, read_origin, save_tokenizer
from consonar.errors import UserError
from consonar.files.weights import map_tensors
from consonar.generators.rear import ReARConfig
from consonar.tokenizers.vq import VQTokenizer
from consonar.training import best as best_model
from consonar.training.checkpoints import list_resume, load_resume
from consonar.training.config import DataConfig
from consonar.training.objectives import policy as policy_objective
from consonar.training.objectives.alignment import GuardConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.controls import CrossEntropyConfig, StraightThroughConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics

REWARDS = {"mse": 1.0}
VAPI = PolicyConfig(rewards=REWARDS, group_size=4, context_noise=0.2)
OBJECTIVES = {
    "vapi": VAPI,
    "reinforce": replace(VAPI, estimator="reinforce", class_dropout=0.2),
    "spatial": replace(VAPI, credit="token", smooth_credit=True, inner_epochs=2),
    "held": replace(VAPI, entropy="position", credit="token", corruption="drawn"),
    "free": PolicyConfig(rewards=REWARDS, group_size=2, rollout="free", kl_weight=0.1, ce_weight=0.0),
    "soft": CrossEntropyConfig(rewards=REWARDS, target="soft"),
    "ste": StraightThroughConfig(rewards=REWARDS, perceptual_weight=0.0),
}


@pytest.fixture(scope="module")
def labelled_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled")
    for split, first, count in (("train", 0, 24), ("validation", 100, 6)):
        for index in range(first, first + count):
            folder = root / split / "abc"[index % NUM_CLASSES]
            folder.mkdir(parents=True, exist_ok=True)
            picture(index).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture
def start(make_config, tmp_path):
    """A finished run of plain AR."""
    return train(make_config(loop={"steps": 3}), tmp_path / "start", quiet=True)


@pytest.fixture
def make(make_config, labelled_folder, start):
    def make(objective=VAPI, loop=None, **changes):
        data = DataConfig(images=str(labelled_folder))
        settings = {"init": str(start), "tokenizer": None, "model": None, "data": data, "objective": objective}
        return make_config(loop={"steps": 4, "batch_size": 4} | (loop or {}), **{**settings, **changes})

    return make


def test_the_receptive_field_is_measured_on_all_classes(make, labelled_folder, monkeypatch, tmp_path, capsys):
    """The folder is read class by class, eight pictures each."""
    probes, measure = [], policy_objective.measure_influence

    def note(codec, tokens, **settings):
        probes.append(tokens)
        return measure(codec, tokens, **settings)

    monkeypatch.setattr(policy_objective, "measure_influence", note)
    config = make(OBJECTIVES["spatial"], loop={"steps": 1})
    train(config, tmp_path / "run")
    assert "what tokens change does not follow their places (correlation " in capsys.readouterr().out  # untrained
    codec = load_tokenizer(read_origin(config.init).tokenizer)
    known = {}
    for path in sorted((labelled_folder / "train").rglob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 127.5 - 1
        known[tuple(codec.encode(pixels)[0].tolist())] = path.parent.name
    assert {known[tuple(tokens)] for tokens in probes[0].tolist()} == set("abc")


def weights(run):
    return map_tensors(run / "model" / "model.safetensors")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resume_is_exact(name, make, tmp_path):
    config = make(OBJECTIVES[name], loop={"accumulation": 2})
    whole = train(config, tmp_path / "whole", quiet=True)
    train(config, tmp_path / "parts", stop_at=2, quiet=True)
    parts = train(config, tmp_path / "parts", resume=True, quiet=True)
    one, two = weights(whole), weights(parts)
    assert all(torch.equal(one[key], two[key]) for key in one)
    columns = [
        [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(run / "metrics.jsonl")]
        for run in (whole, parts)
    ]
    assert columns[0] == columns[1]


def test_a_run_starts_at_the_weights_of_init_and_moves_away(make, start, tmp_path):
    config = make(loop={"steps": 1}, optim={"lr": 1e-12, "min_lr": 0.0, "warmup_steps": 0})
    run = train(config, tmp_path / "run", quiet=True)
    before, after = weights(start), weights(run)
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in before)
    stored = json.loads((run / "config.json").read_text())
    assert stored["model"]["width"] == 32 and stored["init"] == str(start.resolve())
    assert stored["tokenizer"] and read_origin(run).tokenizer_fingerprint == read_origin(start).tokenizer_fingerprint
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 1] and lines[0]["validation/kl"] < 1e-6
    assert lines[1]["train/ratio_deviation"] == 0
    assert {"train/reward", "train/reward_mse", "train/entropy", "train/clip_fraction"} < set(lines[1])
    assert {"validation/reward", "validation/reward_mse", "validation/kl", "validation/entropy"} < set(lines[2])
    assert load_generator(run).config.dropout == 0.0


def test_rear_training_also_starts_from_init(make_config, start, tmp_path):
    config = make_config(
        init=str(start), objective=AutoregressiveConfig(embedding_weight=0.5, head_width=16),
        loop={"steps": 1}, optim={"lr": 1e-12, "min_lr": 0.0, "warmup_steps": 0},
    )  # fmt: skip
    run = train(config, tmp_path / "run", quiet=True)
    before, after = weights(start), weights(run)
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in before)


def test_heads_of_a_rear_run_are_kept_and_trained_on(make, make_config, start, tmp_path):
    """They come from the run's checkpoint, with its averaged weights where it averages, and go into no model."""
    rear = AutoregressiveConfig(embedding_weight=0.5, heads="decode", head_width=16)
    origin = train(make_config(objective=rear, loop={"steps": 2, "ema_decay": 0.5}), tmp_path / "rear", quiet=True)
    config = make(
        replace(VAPI, embedding_weight=0.25), init=str(origin), loop={"accumulation": 2},
        optim={"lr": 1e-12, "min_lr": 0.0, "warmup_steps": 0},
    )  # fmt: skip

    def heads(run, part):
        payload = load_resume(list_resume(run / "checkpoints")[-1])[part]
        return {key: value for key, value in payload.items() if key.startswith("heads.")}

    whole = train(config, tmp_path / "whole", quiet=True)
    before, after = heads(origin, "average"), heads(whole, "model")
    assert len(before) == 6 and before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in before)
    assert not any(key.startswith("heads.") for key in weights(whole))
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if "train/align_next" in line]
    assert lines and "train/align_current" not in lines[0] and 0 < lines[0]["train/align_next"] < 2

    config = replace(config, optim=replace(config.optim, lr=1e-3, min_lr=1e-3))
    moved = train(config, tmp_path / "moved", quiet=True)
    train(config, tmp_path / "parts", stop_at=2, quiet=True)
    parts = train(config, tmp_path / "parts", resume=True, quiet=True)
    assert not torch.equal(heads(moved, "model")["heads.next.0.weight"], after["heads.next.0.weight"])
    one, two = (load_resume(list_resume(run / "checkpoints")[-1])["model"] for run in (moved, parts))
    assert all(torch.equal(one[key], two[key]) for key in one)

    further = train(
        replace(config, init=str(moved), optim=replace(config.optim, lr=1e-12, min_lr=0.0)), tmp_path / "on"
    )
    before, after = heads(moved, "model"), heads(further, "model")
    assert before and all(torch.allclose(before[key], after[key], atol=1e-9) for key in before)

    for init, message in ((start, "was trained without alignment heads"), (origin / "model", "start from the folder")):
        with pytest.raises(UserError, match=message) as caught:
            train(replace(config, init=str(init)), tmp_path / "refused", quiet=True)
        assert "\n" not in str(caught.value) and "objective.embedding_weight" in str(caught.value)


def same_for_all(images, originals, batch):
    return torch.ones(len(images))


def test_each_reward_says_its_spread_and_an_idle_one_is_warned_of_once(make, tmp_path, capsys):
    idle = f"{__name__}:same_for_all"
    # The float32 mean of ten ones, a tenth at a time, is not 1.
    steps = {"steps": 12, "log_every": 1, "batch_size": 10, "accumulation": 10}
    config = make(replace(VAPI, rewards={"mse": 1.0, idle: 0.5}), loop=steps)
    run = train(config, tmp_path / "run", quiet=True)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    assert len(lines) == 12
    for line in lines:
        assert line[f"train/reward_ties_{idle}"] == pytest.approx(1) and line[f"train/reward_spread_{idle}"] == 0
        assert line["train/reward_ties_mse"] < 1 and line["train/reward_spread_mse"] > 0
    said = capsys.readouterr().err
    assert said.count("is the same for all draws") == 1 and f"reward '{idle}'" in said


def test_the_guard_stops_the_run_and_keeps_its_model(make, tmp_path, capsys):
    config = make(replace(VAPI, guard=GuardConfig(max_entropy=0.5)))
    run = train(config, tmp_path / "run")
    reason = json.loads((run / "stopped.json").read_text())
    assert reason["step"] == 1 and "objective.guard.max_entropy 0.5" in reason["reason"]
    assert "stopped at step 1: entropy" in capsys.readouterr().err
    assert (run / "model" / "model.safetensors").is_file()
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [0, 1, 1]
    train(config, run, resume=True, quiet=True)
    assert json.loads((run / "stopped.json").read_text()) == reason, "resumed, it ends where it had ended"
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [0, 1, 1]


@pytest.mark.parametrize(
    "guard", [GuardConfig(max_entropy=0.5), GuardConfig(max_kl=1e-9)], ids=["training", "validation"]
)
def test_a_run_that_ended_between_its_guard_and_its_export_is_resumed_to_the_same_end(
    guard, make, tmp_path, monkeypatch
):
    config = make(
        replace(VAPI, guard=guard), loop={"validate_every": 2}, optim={"lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 0}
    )
    straight = train(config, tmp_path / "straight", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("consonar.training.trainee.save_generator", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", quiet=True)
    (tmp_path / "run" / "stopped.json").unlink()  # nor was there time for this
    train(config, tmp_path / "run", resume=True, quiet=True)
    texts = [(run / "stopped.json").read_text() for run in (straight, tmp_path / "run")]
    assert texts[0] == texts[1]
    ours, theirs = weights(straight), weights(tmp_path / "run")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_guard_also_reads_validation(make, tmp_path):
    config = make(
        replace(VAPI, guard=GuardConfig(max_kl=1e-9)), loop={"validate_every": 2},
        optim={"lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 0},
    )  # fmt: skip
    run = train(config, tmp_path / "run", quiet=True)
    reason = json.loads((run / "stopped.json").read_text())
    assert reason["step"] == 2 and reason["reason"].startswith("kl ")


def test_without_validation_a_bound_on_kl_is_refused_and_no_start_model_is_kept(
    make, labelled_folder, tmp_path, monkeypatch
):
    data, bound = DataConfig(images=str(labelled_folder), validation_split="0%"), GuardConfig(max_kl=1e-9)
    fast = {"lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 0}
    with pytest.raises(
        UserError, match=r"^objective\.guard\.max_kl: 1e-09 is read only with data for validation, and "
    ):
        train(make(replace(VAPI, guard=bound), data=data), tmp_path / "refused", quiet=True)
    run = train(
        make(replace(VAPI, guard=bound, kl_weight=0.1), {"log_every": 1}, data=data, optim=fast),
        tmp_path / "weighed", quiet=True,
    )  # fmt: skip
    assert json.loads((run / "stopped.json").read_text())["reason"].startswith("kl ")
    monkeypatch.setattr("consonar.training.build.load_generator", Mock(side_effect=AssertionError))
    train(make(data=data), tmp_path / "run", quiet=True)


def test_the_best_model_is_kept_beside_the_last(make, tmp_path, quarters, monkeypatch):
    monkeypatch.setattr(best_model, "NETWORK", "quarters")
    config = make(
        loop={"steps": 3, "validate_every": 1, "fd_samples": 8},
        optim={"lr": 2e-2, "min_lr": 2e-2, "warmup_steps": 0},
    )  # fmt: skip
    run = train(config, tmp_path / "run", quiet=True)
    key = f"validation/{best_model.METRIC}"
    distances = {line["step"]: line[key] for line in read_metrics(run / "metrics.jsonl") if key in line}
    best = json.loads((run / "best.json").read_text())
    assert len(distances) == 4 and best["value"] == min(distances.values()) == distances[best["step"]]
    drawn = "8 samples at temperature 1 of seeds from 0 on, not rounded to 8 bits, quarters, against imagefolder:"
    assert best["protocol"] == f"{drawn}{config.data.images}[validation]: 6 images as validation"
    kept, last = map_tensors(run / "best" / "model.safetensors"), weights(run)
    same = all(torch.equal(kept[name], last[name]) for name in kept)
    assert same == (best["step"] == 3)
    load_generator(run / "best")


def train_quietly(config, out):
    train(config, out, quiet=True)


def test_two_processes_draw_and_learn_what_one_does(make, tmp_path):
    """Contexts, dropped classes, actions and Gumbel noise belong to the images, not to the process that has them."""
    steps = {"steps": 3}
    configs = {
        "ce": make(CrossEntropyConfig(rewards=REWARDS), loop=steps),
        "reinforce": make(replace(OBJECTIVES["reinforce"], group_size=2), loop=steps),
        "vapi": make(replace(VAPI, class_dropout=0.5), loop=steps),
        "free": make(OBJECTIVES["free"], loop=steps),
        "held": make(OBJECTIVES["held"], loop=steps),
        "ste": make(OBJECTIVES["ste"], loop=steps),
    }
    run_on_two(train_quietly, configs, tmp_path)
    for name, config in configs.items():
        alone = train(config, tmp_path / f"{name}-alone", quiet=True)
        curves = [
            [{k: v for k, v in line.items() if k.startswith("train/")} for line in read_metrics(run / "metrics.jsonl")]
            for run in (tmp_path / name, alone)
        ]
        assert len(curves[0]) == len(curves[1])
        for ours, theirs in zip(*curves, strict=True):
            # Sums in another order; other draws would move the reward by percents.
            assert ours == pytest.approx(theirs, rel=5e-3, abs=1e-4), name


def one_held_out(folder):
    for name in ("train/a/0", "train/b/1", "train/c/2", "train/c/3", "validation/c/4"):
        path = folder / "few" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(int(path.stem)).save(path)
    return folder / "few"


def test_mistakes_about_the_start_are_one_line(make, start, tmp_path, tokenizer_folder):
    other = VQTokenizer(TINY_VQ, name="other")
    with torch.no_grad():
        other.quantize.embedding.weight.add_(1.0)
    save_tokenizer(other, tmp_path / "other")
    mistakes = {
        "no init": (make(init=None), "init: 'tiny' starts from a trained generator"),
        "no folder": (
            make(init=str(tmp_path / "nothing")),
            "init: no folder /.*nothing; choices: openmoji, a run folder",
        ),
        "a tokenizer": (make(init=str(tokenizer_folder)), "not a generator folder"),
        "another tokenizer": (make(tokenizer=str(tmp_path / "other")), "the tokenizer is 'other'"),
        "another shape": (
            make(model=ReARConfig(width=64, num_layers=2, num_heads=4, dropout=0.0)),
            "model.width: 64, but the generator in",
        ),
        "one held out": (
            make(data=DataConfig(images=str(one_held_out(tmp_path))), loop={"fd_samples": 4}),
            "needs 2 validation images",
        ),
        "no images": (make(data=DataConfig()), "data.images: post-training needs the images"),
    }
    for name, (config, message) in mistakes.items():
        with pytest.raises(UserError, match=message) as caught:
            train(config, tmp_path / name.replace(" ", "-"), quiet=True)
        assert "\n" not in str(caught.value), name
        assert not (tmp_path / name.replace(" ", "-")).exists(), name


def test_steps_are_those_of_the_optimiser_with_several_updates_on_each_batch(make, tmp_path):
    """Seven steps are two batches of three updates and one of one; intervals fall on the ends of batches."""
    config = make(replace(VAPI, inner_epochs=3), loop={"steps": 7, "save_every": 2, "keep_checkpoints": 9})
    run = train(config, tmp_path / "run", quiet=True)
    saved = list_resume(run / "checkpoints")
    assert [path.name for path in saved] == ["step_00000003.pt", "step_00000006.pt", "step_00000007.pt"]
    moments = load_resume(saved[-1])["optimizer"]["state"].values()
    assert {int(moment["step"]) for moment in moments} == {7}


def test_a_run_that_counted_the_updates_on_a_batch_as_one_step_is_not_resumed(make, tmp_path):
    config = make(replace(VAPI, inner_epochs=2), loop={"steps": 4})
    run = train(config, tmp_path / "run", quiet=True, stop_at=2)
    path = list_resume(run / "checkpoints")[-1]
    payload = load_resume(path)
    del payload["updates"]
    torch.save(payload, path)
    with pytest.raises(UserError, match="counts the 2 updates on a batch as one step, as older versions did"):
        train(config, run, quiet=True, resume=True)
