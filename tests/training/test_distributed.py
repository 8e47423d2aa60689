"""Two processes on gloo give what one process gives for the same global batch."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import Quarters, same, save_pictures
from forked import run_on_two
from torch.nn.parallel import DistributedDataParallel

from consonar.distributed import ALONE
from consonar.errors import NonFiniteLoss
from consonar.files.readers import read_json
from consonar.generators.rear import ReARConfig
from consonar.networks import FEATURE_NETWORKS
from consonar.training import best, run
from consonar.training import config as settings
from consonar.training.checkpoints import State, load_resume
from consonar.training.config import DataConfig
from consonar.training.loop import Built, Running, train_loop, update
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import Autoregressive, AutoregressiveConfig, NoisyTokens
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.optim import build_optimizer
from consonar.training.run import train
from consonar.training.tracking import Tracker, read_metrics
from consonar.training.trainee import Trainee

NO_GRADIENT = "k_norm.bias"  # see test_loop.py


@pytest.fixture
def configs(make_config, tokenizer, picture_folder):
    """Everything that is drawn but dropout masks, which each process draws for itself."""
    noise = NoiseConfig(schedule="uniform", max_rate=0.8)
    objective = AutoregressiveConfig(embedding_weight=0.5, head_width=16, class_dropout=0.5, noise=noise)
    nearest = replace(objective, noise=replace(noise, schedule="constant", corruption="nearest", num_neighbours=4))
    reconstruction = ReconstructionConfig(
        perceptual_weight=0, discriminator_weight=0.1, discriminator_start=2, revive_after=0
    )
    return {
        "generator": make_config(
            objective=objective, loop={"steps": 4, "accumulation": 2, "activation_checkpointing": 1}
        ),
        "nearest": make_config(objective=nearest, loop={"steps": 4}),
        "tokenizer": make_config(
            recipe="tokenizer-tiny", tokenizer=None, model=tokenizer.config, objective=reconstruction,
            data=DataConfig(images=str(picture_folder), flip=True), loop={"steps": 4},
        ),
    }  # fmt: skip


def train_and_keep(config, out):
    """Keeps the weights of both ranks: only rank 0 writes a run folder."""

    def recording(running, *args):
        train_loop(running, *args)
        torch.save(running.state.model.state_dict(), f"{out}.rank{os.environ['RANK']}.pt")

    run.train_loop = recording
    train(config, out, quiet=True)


def test_two_processes_equal_one(configs, tmp_path):
    # One more tokenizer run, in which codes are revived: the ranks see different vectors and must still agree.
    revived = replace(configs["tokenizer"].objective, revive_after=1)
    both = configs | {"revived": replace(configs["tokenizer"], objective=revived)}
    run_on_two(train_and_keep, both, tmp_path)
    for name in both:
        first, second = (torch.load(tmp_path / f"{name}.rank{rank}.pt") for rank in "01")
        assert all(torch.equal(first[key], second[key]) for key in first), name
    for name, config in configs.items():
        alone = train(config, tmp_path / f"{name}-alone", quiet=True)
        ours = load_resume(tmp_path / name / "checkpoints" / "step_00000004.pt")["model"]
        theirs = load_resume(alone / "checkpoints" / "step_00000004.pt")["model"]
        for key in ours:
            if not key.endswith(NO_GRADIENT):
                # Adam moves a weight by the learning rate whose gradient is rounding alone, in either direction.
                apart = ~torch.isclose(ours[key], theirs[key], rtol=1e-3, atol=5e-5)
                assert apart.float().mean() <= 1e-3, (name, key)
        for measured in ("train/loss", "train/grad_norm"):
            curves = [
                [line[measured] for line in read_metrics(run / "metrics.jsonl") if measured in line]
                for run in (tmp_path / name, alone)
            ]
            assert curves[0] == pytest.approx(curves[1], rel=1e-3), (name, measured)


@pytest.fixture
def lone_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_are_exchanged_once_per_step(accumulation, lone_process_group, make_config, tiny_generator, tmp_path):
    config = make_config(loop={"accumulation": accumulation})
    trainee = Trainee(tiny_generator().train())
    state = State(trainee, build_optimizer(trainee, config.optim))
    model = DistributedDataParallel(trainee, bucket_cap_mb=1000)
    exchanged = []

    def exchange(_, bucket):
        exchanged.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, exchange)
    tokens = torch.arange(8)[:, None].expand(8, 16).contiguous()
    prepared = NoisyTokens(tokens, tokens, torch.arange(8) % 3, torch.zeros_like(tokens, dtype=torch.bool))
    objective = Autoregressive(config.objective, None, total_steps=2, seed=0)
    tracker = Tracker(tmp_path, config, enabled=False)
    running = Running(config, Built(trainee, objective, None), state, tracker, tmp_path, ALONE)
    for _ in range(2):
        exchanged.clear()
        update(running, model, prepared, None)
        assert exchanged == [0]


def train_part(config, out):
    kind, part = out.name.split()
    settings = {"whole": {}, "first": {"stop_at": 3}, "second": {"resume": True}}[part]
    torch.manual_seed(len(part))  # another process would be in another state
    best.NETWORK, FEATURE_NETWORKS["quarters"] = "quarters", lambda device: Quarters()
    train(config, out.with_name(f"{kind}-{'whole' if part == 'whole' else 'half'}"), quiet=True, **settings)


def test_two_processes_resume_exactly(make_config, configs, tmp_path):
    """With dropout, in the middle of an epoch, weights, moments, averages, running baselines and all."""
    shape = ReARConfig(width=32, num_layers=2, num_heads=4, dropout=0.3)
    start = train(make_config(model=shape, loop={"steps": 1}), tmp_path / "start", quiet=True)
    pictures = save_pictures(tmp_path / "pictures", train=24)
    policy = PolicyConfig(rewards={"mse": 1.0}, group_size=2, estimator="reinforce", class_dropout=0.2)
    loop = {"steps": 7, "accumulation": 2, "ema_decay": 0.9}
    kinds = {
        "ar": make_config(model=shape, loop=loop),
        "rear": make_config(model=shape, objective=configs["generator"].objective, loop=loop),
        "vapi": make_config(
            init=str(start), tokenizer=None, model=None, objective=policy, data=DataConfig(images=str(pictures)),
            loop=loop | {"fd_samples": 4},
        ),
        "tokenizer": replace(configs["tokenizer"], loop=replace(configs["tokenizer"].loop, **loop)),
    }  # fmt: skip
    parts = {f"{kind} {part}": config for kind, config in kinds.items() for part in ("whole", "first", "second")}
    run_on_two(train_part, parts, tmp_path)
    for kind in kinds:
        runs = [tmp_path / f"{kind}-{how}" for how in ("whole", "half")]
        whole, half = (load_resume(run / "checkpoints" / "step_00000007.pt") for run in runs)
        assert whole["processes"] == 2 and whole["average"] and same(whole, half), kind
        lines = [
            [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(run / "metrics.jsonl")]
            for run in runs
        ]
        assert lines[0] == lines[1], kind
        if kind == "vapi":
            assert whole["model"]["num_baseline_updates"] == 7 and whole["model"]["reward_baseline"].any()
            assert len({(run / "best.json").read_text() for run in runs}) == 1


def at_a_bound(config, out):
    """Each rank measures something else, as by rounding; the bound lies between them. The second one alone meets a
    loss that is no number, with a gradient that is one."""
    rank, step_of = float(os.environ["RANK"]), config.loop.steps // 2
    loss, low = Autoregressive.loss, set()

    def breaking(self, model, prepared, step):
        low.add(torch.is_autocast_enabled("cpu"))
        value, terms = loss(self, model, prepared, step)
        return value + (math.inf if rank and step == step_of and out.name == "loss" else 0), terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autoregressive, "loss", breaking)
        if out.name == "precision":
            patch.setattr(settings, "pick_precision", lambda *_: "fp32" if rank else "bf16")
        if out.name == "bound":
            patch.setattr(Autoregressive, "validate", lambda *_: {"cross_entropy": 1 + rank})
            patch.setattr(Autoregressive, "breach", lambda _, values: "above" if values["cross_entropy"] < 2 else None)
        if out.name == "validation":
            patch.setattr(Autoregressive, "validate", lambda *_: {"cross_entropy": math.nan if rank else 1.0})
        try:
            train(config, out, quiet=True)
            ended = f"done, bf16: {low}"
        except NonFiniteLoss as error:
            ended = str(error)
    Path(f"{out}.rank{int(rank)}").write_text(ended)


def test_processes_decide_alike_whatever_each_has_measured(make_config, tmp_path):
    """A bound between their numbers, a loss or a metric that only one cannot count: all stop, or none does. What is
    faster, too: all multiply alike."""
    loop = {"steps": 4, "log_every": 4}
    names = {"bound": {"validate_every": 2}, "loss": {}, "validation": {"validate_every": 2}, "precision": {"steps": 2}}
    configs = {name: make_config(loop=loop | more) for name, more in names.items()}
    run_on_two(at_a_bound, configs, tmp_path)
    first, second = ([(tmp_path / f"{name}.rank{rank}").read_text() for name in names] for rank in "01")
    assert first == second
    assert first[0] == first[2] == "done, bf16: {False}" and first[3] == "done, bf16: {True}"
    assert first[1].startswith("step 2: loss inf, gradient norm")
    assert read_json(tmp_path / "bound" / "stopped.json") == {"step": 2, "reason": "above"}
    assert not (tmp_path / "validation" / "stopped.json").exists()
