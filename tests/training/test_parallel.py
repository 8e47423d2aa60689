"""Two gloo processes, each with the whole model or with a shard of it, give what one process gives."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from conftest import NUM_CLASSES, picture
from forked import run_on_two
from torch.distributed.tensor import DTensor

from consonar.compiling import compile_for_training
from consonar.distributed import ALONE, World
from consonar.errors import UserError
from consonar.files.readers import read_json
from consonar.files.weights import map_tensors
from consonar.memory import size_of
from consonar.parallel import ParallelConfig, exchange_of_gradients, full, is_sharded, shard, whole
from consonar.training import run as runs
from consonar.training.checkpoints import list_resume, load_resume
from consonar.training.config import DataConfig
from consonar.training.lora import LoRAConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.controls import CrossEntropyConfig, StraightThroughConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.optim import build_optimizer
from consonar.training.tracking import read_metrics
from consonar.training.trainee import Trainee

STEPS = 20
# AdamW moves a weight whose gradient is rounding alone by the learning rate, in either direction, unless its epsilon is
# above that rounding (k_norm.bias and the like, whose gradient is 0 in exact arithmetic, are such weights): with 1e-8
# they end up anywhere and the others reach 6e-6, with this one all are compared. Real gradients here are 1e-4 and more.
EPSILON = 1e-5
POLICY = PolicyConfig(rewards={"mse": 1.0}, group_size=4, context_noise=0.2)
ALIGNED = {
    **{name: replace(POLICY, estimator=name) for name in ("grpo", "dr_grpo", "rloo", "gspo", "dapo", "reinforce")},
    "spatial": replace(POLICY, credit="token", smooth_credit=True, inner_epochs=2),
    "held": replace(POLICY, entropy="position", credit="token", corruption="drawn"),
    "free": PolicyConfig(rewards={"mse": 1.0}, group_size=2, rollout="free", kl_weight=0.1, ce_weight=0.0),
    "cross-entropy": CrossEntropyConfig(rewards={"mse": 1.0}, class_dropout=0.2),
    "soft": CrossEntropyConfig(rewards={"mse": 1.0}, target="soft"),
    "straight-through": StraightThroughConfig(rewards={"mse": 1.0}, perceptual_weight=0.0),
}
TOKENS, CLASSES = torch.arange(8)[:, None].expand(8, 16).contiguous(), torch.arange(8) % 3
QUICK = {"rear", "tokenizer", "grpo", "adapters"}
EVERY = ["ar", "rear", "tokenizer", *ALIGNED, "adapters"]


@pytest.fixture
def configs(make_config, tokenizer, picture_folder, tmp_path):
    """Every way to train; all that is drawn but dropout masks, which each process draws for itself."""
    for split, first, count in (("train", 0, 24), ("validation", 100, 6)):
        for index in range(first, first + count):
            folder = tmp_path / "labelled" / split / "abc"[index % NUM_CLASSES]
            folder.mkdir(parents=True, exist_ok=True)
            picture(index).save(folder / f"{index:03d}.png")
    start = str(runs.train(make_config(loop={"steps": 30}), tmp_path / "start", quiet=True))
    loop = {"steps": STEPS, "save_every": 10, "validate_every": 10}
    rear = AutoregressiveConfig(
        embedding_weight=0.5, head_width=16, class_dropout=0.5, noise=NoiseConfig(schedule="uniform", max_rate=0.8)
    )
    reconstruction = ReconstructionConfig(
        perceptual_weight=0, discriminator_weight=0.1, discriminator_start=2, revive_after=5
    )
    saving = {"accumulation": 2, "activation_checkpointing": 1, "ema_decay": 0.9}
    data = DataConfig(images=str(tmp_path / "labelled"))
    settings = {"init": start, "tokenizer": None, "model": None, "data": data, "loop": loop | {"batch_size": 4}}
    held = replace(ALIGNED["held"], estimator="reinforce", kl_weight=0.1)
    adapters = make_config(objective=held, lora=LoRAConfig(rank=4), **settings | {"loop": settings["loop"] | saving})
    return {
        "ar": make_config(loop=loop),
        "rear": make_config(objective=rear, loop=loop | saving),
        "tokenizer": make_config(
            recipe="tokenizer-tiny", tokenizer=None, model=tokenizer.config, objective=reconstruction,
            data=DataConfig(images=str(picture_folder), flip=True), loop=loop | {"activation_checkpointing": 2},
        ),
        **{name: make_config(objective=objective, **settings) for name, objective in ALIGNED.items()},
        **({"adapters": adapters} if find_spec("peft") else {}),
    }  # fmt: skip


def steadily(config, out):
    """`train` with that epsilon; a run called a half stops in the middle, and goes on at the next call."""
    begun = (out / "config.json").exists()
    stop_at = config.loop.steps // 2 if "half" in out.name and not begun else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "build_optimizer", build_steady)
        return runs.train(config, out, quiet=True, resume=begun, stop_at=stop_at)


def build_steady(*args):
    optimizer = build_optimizer(*args)
    for group in optimizer.param_groups:
        group["eps"] = EPSILON
    return optimizer


def sharded(config, strategy="fsdp", **settings):
    return replace(config, parallel=ParallelConfig(strategy=strategy, **settings))


def last(run, steps=STEPS):
    """The last checkpoint of so many steps, in shards or not."""
    path = list_resume(run / "checkpoints")[-1]
    assert path.name.startswith(f"step_{steps:08d}")
    return load_resume(path)


def apart(ours, theirs):
    """The distance of two models' weights, as a share of their size."""
    assert ours.keys() == theirs.keys()
    squares = [
        (float((ours[k] - theirs[k]).double().square().sum()), float(theirs[k].double().square().sum())) for k in ours
    ]
    return (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5


def curve(run, key):
    return torch.tensor([line[key] for line in read_metrics(run / "metrics.jsonl") if key in line])


def shortened(config, steps):
    """That saves and validates twice, as the others do."""
    return replace(config, loop=replace(config.loop, steps=steps, save_every=steps // 2, validate_every=steps // 2))


@pytest.mark.parametrize(
    ("names", "steps"),
    [(QUICK, STEPS // 2), pytest.param(set(EVERY) - QUICK, STEPS, marks=pytest.mark.slow)],
    ids=["some", "others"],
)
def test_two_processes_equal_one_for_every_objective(names, steps, configs, tmp_path):
    """Losses and weights after so many steps, within 1e-5 of their size."""
    chosen = {name: shortened(configs[name], steps) for name in configs if name in names}
    run_on_two(
        steadily, {f"{n}-{way}": sharded(c, way) for n, c in chosen.items() for way in ("ddp", "fsdp")}, tmp_path
    )
    for name, config in chosen.items():
        alone = steadily(config, tmp_path / f"{name}-alone")
        theirs = last(alone, steps)
        for way in ("ddp", "fsdp"):
            run = tmp_path / f"{name}-{way}"
            ours = last(run, steps)
            assert apart(ours["model"], theirs["model"]) < 1e-5, (name, way)
            if theirs["average"]:
                assert apart(ours["average"], theirs["average"]) < 1e-5, (name, way)
            assert (
                apart(
                    map_tensors(run / "model" / "model.safetensors"), map_tensors(alone / "model" / "model.safetensors")
                )
                < 1e-5
            )
            found, expected = curve(run, "train/loss"), curve(alone, "train/loss")
            # A policy's loss is a mean of advantages, of size 1, that cancel.
            size = max(1.0, float(expected.abs().max())) if config.objective.kind == "policy" else expected.abs().max()
            assert float((found - expected).abs().max() / size) < 1e-5, (name, way)


@pytest.mark.slow
def test_weights_in_bf16_and_blocks_ahead_change_no_number_of_a_run_in_bf16(configs, tmp_path):
    """On two processes; gradients that are summed in bf16 change them by its rounding."""
    ways = {
        "plain": {},
        "low": {"param_dtype": "bf16", "prefetch_forward": 1, "prefetch_backward": 2},
        "whole": {"param_dtype": "bf16", "reshard_after_forward": False},
        "summed": {"param_dtype": "bf16", "reduce_dtype": "bf16"},
    }
    chosen = {name: configs[name] for name in configs if name in QUICK}
    chosen = {n: replace(c, loop=replace(c.loop, steps=4, precision="bf16")) for n, c in chosen.items()}
    run_on_two(
        runs.train,
        {f"{n}-{way}": sharded(c, **more) for n, c in chosen.items() for way, more in ways.items()},
        tmp_path,
    )
    for name, config in chosen.items():
        alone = runs.train(config, tmp_path / f"{name}-alone", quiet=True)
        found = {way: last(tmp_path / f"{name}-{way}", 4)["model"] for way in ways}
        distance = {way: apart(found[way], found["plain"]) for way in ways}
        assert distance["low"] < 1e-6 and distance["whole"] < 1e-6, (name, distance)
        assert 0 < distance["summed"] < 1e-2, (name, distance)
        losses = [curve(run, "train/loss")[0] for run in (tmp_path / f"{name}-plain", alone)]
        assert torch.isclose(*losses, rtol=1e-2, atol=1e-2), (name, losses)


@pytest.mark.slow
def test_four_processes_in_two_copies_equal_one(configs, tmp_path):
    """Each copy in two shards."""
    chosen = {name: configs[name] for name in ("rear", "tokenizer", "grpo")}
    in_copies = {name: sharded(config, "hybrid", shard_size=2) for name, config in chosen.items()}
    run_on_two(steadily, in_copies, tmp_path, count=4)
    for name, config in chosen.items():
        alone = steadily(config, tmp_path / f"{name}-alone")
        assert apart(last(tmp_path / name)["model"], last(alone)["model"]) < 1e-5, name
        found, expected = curve(tmp_path / name, "train/loss"), curve(alone, "train/loss")
        assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max())), name


def compiled(config, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "compile_for_training", partial(compile_for_training, backend="aot_eager"))
        return steadily(config, out)


@pytest.mark.slow
def test_shards_are_compiled(configs, tmp_path):
    """Two processes, recomputed blocks, micro-batches: what one gives as it is written; in bf16 what two do."""
    rear = configs["rear"]
    low = replace(sharded(rear, param_dtype="bf16"), loop=replace(rear.loop, precision="bf16"))
    ways = {"fsdp": sharded(rear), "low": low}
    run_on_two(compiled, {way: replace(c, loop=replace(c.loop, compile=True)) for way, c in ways.items()}, tmp_path)
    run_on_two(steadily, {"low-written": low}, tmp_path)
    steadily(rear, tmp_path / "fsdp-written")
    for way, bound in (("fsdp", 1e-5), ("low", 1e-2)):
        assert apart(last(tmp_path / way)["model"], last(tmp_path / f"{way}-written")["model"]) < bound, way


def test_runs_go_on_in_other_processes(configs, tmp_path):
    """Four steps in shards, four in one process, and the reverse, give the eight of one; sessions.json says which."""
    rear, grpo = (shortened(configs[name], 8) for name in ("rear", "grpo"))
    steadily(grpo, tmp_path / "single-half")
    halves = {"shards-half": sharded(rear), "hybrid-half": sharded(rear, "hybrid", shard_size=1)}
    run_on_two(steadily, halves | {"single-half": sharded(grpo)}, tmp_path)
    for name in halves:
        steadily(rear, tmp_path / name)
    alone = {name: last(steadily(c, tmp_path / name), 8) for name, c in (("rear", rear), ("grpo", grpo))}
    for name, model, ways in (
        ("shards-half", "rear", ["fsdp", "single"]), ("hybrid-half", "rear", ["hybrid", "single"]),
        ("single-half", "grpo", ["single", "fsdp"]),
    ):  # fmt: skip
        run = tmp_path / name
        for part in ("model", "average") if model == "rear" else ("model",):
            assert apart(last(run, 8)[part], alone[model][part]) < 1e-5, name
        assert [session["parallel"] for session in read_json(run / "sessions.json")["sessions"]] == ways


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("reshard", [True, False])
def test_weights_are_let_go_of_after_the_forward_pass_as_configured(reshard, group_of_one, tiny_generator):
    trainee = Trainee(tiny_generator().train())
    expected = trainee(TOKENS, CLASSES).logits
    kept = {key: value.clone() for key, value in trainee.state_dict().items()}
    config = ParallelConfig(strategy="fsdp", reshard_after_forward=reshard)
    shard(trainee, trainee.parts(), config, ALONE)
    assert torch.allclose(trainee(TOKENS, CLASSES).logits, expected, atol=1e-5)
    assert isinstance(trainee.generator.blocks[0].attn.qkv.weight, DTensor) == reshard
    assert (
        size_of(trainee.state_dict().values(), torch.device("cpu")) >= size_of(kept.values(), torch.device("cpu")) > 0
    )
    with whole(trainee) as found, torch.inference_mode():
        assert not is_sharded(found) and not any(isinstance(value, DTensor) for value in found.parameters())
        assert all(torch.equal(value, kept[key]) for key, value in found.state_dict().items())
        assert torch.allclose(found(TOKENS, CLASSES).logits, expected, atol=1e-5)


def test_shards_exchange_gradients_in_the_last_micro_batch_alone(group_of_one, tiny_generator):
    trainee = Trainee(tiny_generator().train())
    shard(trainee, trainee.parts(), ParallelConfig(strategy="fsdp"), ALONE)
    for wanted in (False, False, True):
        with exchange_of_gradients(trainee, wanted):
            trainee(TOKENS, CLASSES).logits.square().mean().backward()
        assert {one.grad is not None for one in trainee.parameters()} == {wanted}


@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [0, 1])
def test_shards_calculate_in_bf16_what_the_whole_does(param_dtype, recompute, group_of_one, tiny_generator):
    """Autocast alone decides what is multiplied in bf16: weights that are gathered so are those that it would cast."""
    trainee = Trainee(tiny_generator().train())
    for weight in trainee.parameters():  # blocks that do something, norms that are no numbers of bf16
        torch.nn.init.normal_(weight, 0.1, 0.1)
    trainee.generator.recompute_every = recompute

    def passed():
        """Two micro-batches; the exchange of gradients is of both."""
        torch.clear_autocast_cache()
        with torch.autocast("cpu", torch.bfloat16):
            for wanted in (False, True):
                with exchange_of_gradients(trainee, wanted):
                    logits = trainee(TOKENS, CLASSES).logits
                    logits.float().square().mean().backward()
        return logits, [full(one.grad) for one in trainee.parameters()]

    expected, gradients = passed()
    trainee.zero_grad()
    config = ParallelConfig(strategy="fsdp", param_dtype=param_dtype, prefetch_forward=1, prefetch_backward=2)
    shard(trainee, trainee.parts(), config, ALONE)
    found, theirs = passed()
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert all(torch.equal(ours, other) for ours, other in zip(theirs, gradients, strict=True))
    trainee.generator.blocks[0].unshard()
    assert trainee.generator.blocks[0].attn.qkv.weight.dtype == {"fp32": torch.float32}.get(param_dtype, torch.bfloat16)
    assert {one.dtype for one in trainee.state_dict().values()} == {torch.float32}


def test_settings_that_only_shards_read(make_config, tmp_path, monkeypatch):
    of_shards = {"reshard_after_forward": False, "param_dtype": "bf16", "reduce_dtype": "bf16", "prefetch_forward": 1}
    alone = [{"shard_size": 2}, {"prefetch_backward": 1}, *({key: value} for key, value in of_shards.items())]
    for settings in [*alone, {"strategy": "fsdp", "shard_size": 2}]:
        with pytest.raises(UserError, match=r"parallel\..* is read only with"):
            ParallelConfig(**settings)
    three = ParallelConfig(strategy="hybrid", shard_size=3)
    with pytest.raises(
        UserError, match=r"parallel\.shard_size: 3 does not divide the 8 processes; choices: 1, 2, 4, 8"
    ):
        three.group(8)
    with pytest.raises(UserError, match=r"parallel\.shard_size: 0 \(the 4 of a machine\) does not divide the 6"):
        ParallelConfig(strategy="hybrid").group(6, 4)
    with pytest.raises(UserError, match=r"parallel\.param_dtype: 'bf16' is read only with loop\.precision bf16"):
        runs.train(
            replace(make_config(), parallel=ParallelConfig(strategy="fsdp", param_dtype="bf16")), tmp_path / "run"
        )
    assert three.group(9) == 3 and three.group(1) == ParallelConfig().group(8) == 1
    with monkeypatch.context() as patch, pytest.raises(UserError, match="shard_size: 3 does not divide the 2"):
        patch.setattr(runs.distributed, "joined", lambda _: nullcontext(World(0, 2, torch.device("cpu"))))
        patch.setattr("consonar.training.config.from_main", lambda value, _: value)
        runs.train(replace(make_config(), parallel=three), tmp_path / "run")
    assert ParallelConfig(strategy="fsdp").used(ALONE) == ParallelConfig().used(ALONE) == "single"
