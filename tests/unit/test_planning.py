"""A plan against what small runs take: products counted while they run, and memory by PyTorch's own record of it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import ChainMap
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from consonar import cli, records
from consonar.distributed import ALONE
from consonar.generators import build_generator
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.janus import JanusConfig
from consonar.generators.llamagen import LlamaGenConfig
from consonar.generators.rear import ReARConfig
from consonar.hub import PUBLISHED
from consonar.networks import PERCEPTUAL_DISTANCES
from consonar.parallel import ParallelConfig
from consonar.planning.ledger import FORWARD, GRADIENTS, Ledger
from consonar.planning.page import lines
from consonar.planning.plan import Machine, Plan, changes, plan, remedies
from consonar.planning.shapes import GENERATORS_BY_NAME, TOKENIZERS_BY_NAME, shapes_of, tokenizer_of
from consonar.planning.update import REFERENCE, Shapes, condition_of, update
from consonar.recipes import RECIPES, find_recipe
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.vq import VQConfig
from consonar.training.config import LoopConfig, TrainConfig
from consonar.training.lora import LoRAConfig, StartModel, adapt
from consonar.training.objectives import method_of_config
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.controls import CrossEntropyConfig, StraightThroughConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig, TokenizerTrainee
from consonar.training.trainee import Trainee
from consonar.types import Grid, ImageBatch, TokenBatch

VQ = VQConfig(image_size=64, base_channels=16, channel_multipliers=(1, 2, 4), num_groups=8, vocab_size=256)
SIZES = {"vocab_size": 256, "num_tokens": 256, "num_classes": 10}
GENERATORS = {
    "rear": ReARConfig(width=64, num_layers=3, num_heads=2, dropout=0.0, **SIZES),
    "llamagen": LlamaGenConfig(width=64, num_layers=3, num_heads=2, grid=Grid(16, 16), **SIZES),
    "alitok-ar": AliTokARConfig(width=64, num_layers=3, num_heads=2, attention_dropout=0.0, grid=Grid(16, 16), **SIZES),
}
CAPTIONS = LlamaGenConfig(
    condition="text", caption_dim=48, num_condition_tokens=20, width=64, num_layers=3, num_heads=2, grid=Grid(16, 16),
    vocab_size=256, num_tokens=256,
)  # fmt: skip
PROMPTS = JanusConfig(
    width=64, num_layers=3, num_heads=2, mlp_width=128, text_vocab_size=80, pad_token=1, max_prompt_tokens=20,
    vocab_size=256, num_tokens=256,
)  # fmt: skip
AR = AutoregressiveConfig(embedding_weight=1.0, head_width=64)
VAPI = PolicyConfig(rewards={"mse": 1.0}, group_size=4, chunk=16, kl_weight=0.01)
FREE = replace(VAPI, rollout="free", ce_weight=0.0)
STE = StraightThroughConfig(rewards={"mse": 1.0}, perceptual_weight=0.0, chunk=16)
GAN = ReconstructionConfig(perceptual_weight=0.0, discriminator_weight=0.1)
CE = CrossEntropyConfig(rewards={"mse": 1.0}, chunk=16, context_noise=0.5, corruption="drawn")
CASES = {
    **{f"{kind}, reAR": (shape, AR, {}) for kind, shape in GENERATORS.items()},
    "recomputed": (GENERATORS["rear"], AR, {"activation_checkpointing": 1}),
    "two micro-batches": (GENERATORS["llamagen"], AR, {"accumulation": 2}),
    "bf16": (GENERATORS["llamagen"], AR, {"precision": "bf16"}),
    "VA-pi": (GENERATORS["llamagen"], VAPI, {}),
    "captions": (CAPTIONS, AR, {}),
    "prompts": (PROMPTS, VAPI, {}),
    "straight-through": (GENERATORS["rear"], STE, {}),
    "self-rollout": (GENERATORS["rear"], CE, {}),
    "tokenizer": (None, GAN, {}),
    "tokenizer, recomputed": (None, GAN, {"activation_checkpointing": 1}),
}
BATCH = 8
if find_spec("peft"):
    CASES["adapters, reAR"] = (GENERATORS["rear"], AR, {"lora": LoRAConfig(rank=8)})
    CASES["adapters, VA-pi"] = (GENERATORS["llamagen"], VAPI, {"lora": LoRAConfig(rank=8, targets=("wqkv", "w2"))})


def configured(case: str) -> tuple[TrainConfig, Shapes]:
    shape, objective, loop = CASES[case]
    loop = dict(loop)
    lora = loop.pop("lora", LoRAConfig())
    config = TrainConfig(
        recipe=case, model=shape or VQ, objective=objective, tokenizer="x" if shape else None,
        init="x" if method_of_config(objective).run == "post-training" or lora.rank else None, lora=lora,
        loop=LoopConfig(batch_size=BATCH, **{"precision": "fp32", **loop}),
    )  # fmt: skip
    return config, Shapes(VQ, shape, objective.head_specs(3, VQ.code_dim))


def measured(config: TrainConfig, shapes: Shapes) -> tuple[int, float]:
    """(FLOPs, most bytes beside what was there before) of an update of the same run with numbers and memory."""
    tokenizer = TOKENIZERS["vq"].model(VQ, name="x")
    batch = ImageBatch(torch.zeros(BATCH, 3, 64, 64), condition_of(shapes.generator, BATCH))
    if config.run == "tokenizer":
        every = config.loop.activation_checkpointing
        trainee, known, given = TokenizerTrainee(tokenizer, discriminator=True, recompute_every=every), (), {}
    else:
        tokenizer.requires_grad_(False)
        generator = build_generator(shapes.generator)
        generator.recompute_every = config.loop.activation_checkpointing
        adapt(generator, config.lora, seed=0)
        if config.run == "generator":
            batch = TokenBatch(torch.zeros(BATCH, 256, dtype=torch.int64), batch.condition)
            trainee, known, given = Trainee(generator, shapes.heads), (tokenizer,), {}
        else:
            trainee = AlignmentTrainee(generator)
            prior = StartModel(trainee) if config.lora.rank else build_generator(shapes.generator).requires_grad_(False)
            known, given = (tokenizer, prior), {"autocast_dtype": None}
    objective = method_of_config(config.objective).objective(
        config.objective, *known, total_steps=10, seed=0, world=ALONE, **given
    )
    trainee.train()
    low = config.loop.precision == "bf16"

    def step() -> None:
        prepared = objective.prepare(trainee, batch, 0)
        for part in records.split(prepared, config.loop.accumulation):
            with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
                loss, _ = objective.loss(trainee, part, 0)
            loss.backward()

    step()
    trainee.zero_grad()
    # In plain products, which PyTorch counts; its fused kernel of a CPU it does not.
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        step()
    trainee.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    now = most = 0
    for event in sorted(
        (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        now += event.nbytes()
        most = max(most, now)
    return counted.get_total_flops(), most


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "tokenizer, recomputed")) for case in CASES]
)
def test_products_and_memory_are_those_of_the_run(case: str, monkeypatch) -> None:
    monkeypatch.setenv("CONSONAR_KERNELS", "pytorch")
    config, shapes = configured(case)
    found = update(config, shapes, BATCH, low=config.loop.precision == "bf16", cuda=False)
    flops, most = measured(config, shapes)
    if config.loop.accumulation > 1:  # gradients stand from the first micro-batch on
        found.peak[GRADIENTS] = sum(found.trained)
    assert found.flops.total() == pytest.approx(flops, rel=0.07)
    assert found.peak.total() == pytest.approx(most, rel=0.03)


@pytest.mark.parametrize("case", ["llamagen, reAR", "VA-pi"])
def test_weights_gradients_and_optimizer_are_counted_to_the_byte(case: str) -> None:
    config, shapes = configured(case)
    found = Plan(config, Machine(), shapes, update(config, shapes, BATCH, low=False, cuda=True), [])
    trainee_type = Trainee if config.run == "generator" else AlignmentTrainee
    trainee = trainee_type(build_generator(shapes.generator), shapes.heads)
    parameters = sum(weight.nbytes for weight in trainee.parameters())
    assert sum(found.update.trained) == parameters and found.static["optimizer"] == 2 * parameters
    assert found.static["weights"] == parameters + sum(buffer.nbytes for buffer in trainee.buffers())
    assert found.memory["gradients"][0] == parameters and found.static["gradient buckets"] == 0
    assert replace(found, machine=Machine(gpus=2)).static["gradient buckets"] == parameters
    frozen = sum(weight.nbytes for weight in TOKENIZERS["vq"].model(VQ, name="x").parameters())
    assert sum(found.update.weights[name] for name in ("tokenizer: encoder", "tokenizer: decoder")) == frozen


def test_a_run_goes_on_with_numbers_after_a_plan_was_made() -> None:
    """Tables and networks that are kept for later calls are not those of the plan, which have no memory."""
    config = find_recipe("vapi-openmoji")
    plan(replace(config, init="openmoji"), Machine())
    generator = build_generator(GENERATORS["llamagen"])
    logits, _ = generator(torch.zeros(1, 256, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert float(logits.sum()) == 0.0  # a new one's output is 0
    distance = PERCEPTUAL_DISTANCES["efficientnet-lite0"].load(None)
    assert float(distance(torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64))) > 0


@pytest.mark.parametrize("name", [*TOKENIZERS_BY_NAME, *GENERATORS_BY_NAME])
def test_shapes_of_released_models_have_their_parameters(name: str) -> None:
    published = PUBLISHED[name]
    with torch.device("meta"):
        if name in TOKENIZERS_BY_NAME:
            model = tokenizer_of(TOKENIZERS_BY_NAME[name])
        else:
            model = build_generator(GENERATORS_BY_NAME[name][0])
    assert sum(weight.numel() for weight in model.parameters()) == published.parameters
    assert (model.num_tokens, model.vocab_size) == (published.num_tokens, published.vocab_size)


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if not name.endswith(("openmoji", "cifar10", "scenes", "tune"))]
)
def test_every_published_recipe_has_a_shape_before_anything_is_there(name: str) -> None:
    config, shapes, assumed = shapes_of(find_recipe(name), None)
    assert shapes.generator is None or assumed or config.tokenizer in ("openmoji-64-f4",)


def test_changes_save_memory_in_turn_and_the_first_that_fits_ends_them() -> None:
    config, _ = configured("llamagen, reAR")
    config = replace(
        config, tokenizer="openmoji-64-f4", model=replace(config.model, vocab_size=0, num_tokens=0, grid=None)
    )
    found = plan(config, Machine(), 10)
    assert found.fits
    narrow = replace(found, machine=Machine(gpu_memory=1.5 / 0.96 + found.peak / 2**30 * 0.7))
    assert not narrow.fits
    ways = list(remedies(narrow, 10))
    assert [way.fits for _, way in ways] == [False] * (len(ways) - 1) + [True]
    assert ways[0][0] == "--loop.accumulation 2" and ways[0][1].peak < narrow.peak
    recomputed = ChainMap(*changes(config, Machine()))["--loop.activation-checkpointing 1"]
    other = plan(recomputed, Machine(), 10)
    assert other.peak < found.peak and sum(other.flops.values()) > 1.2 * sum(found.flops.values())
    nothing = replace(found, machine=Machine(gpu_memory=1))
    page = "\n".join(lines(nothing, [("--loop.accumulation 2", nothing)]))
    assert "(assumed)" in page and "-0." not in page and page.endswith("GPUs of more memory")


def test_the_hours_follow_from_the_formula() -> None:
    config, shapes = configured("bf16")
    config = replace(config, loop=replace(config.loop, steps=7200))
    found = Plan(config, Machine(utilisation=0.5), shapes, update(config, shapes, BATCH, low=True, cuda=True), [])
    low = sum(count for (_, kind), count in found.flops.items() if kind == "bf16")
    full = sum(found.flops.values()) - low
    assert found.hours == pytest.approx(2 * (low / (989e12 * 0.5) + full / (67e12 * 0.5)))
    slower = replace(found, machine=Machine(peak_tflops=100, peak_tflops_fp32=10, utilisation=0.5))
    assert slower.seconds == pytest.approx(low / 50e12 + full / 5e12)


def test_free_rollouts_wait_for_the_memory_of_weights_and_cache() -> None:
    config = find_recipe("free-openmoji")
    found = plan(replace(config, init="openmoji", loop=replace(config.loop, precision="bf16")), Machine())
    shape = found.shapes.generator
    rows = config.loop.batch_size * config.objective.group_size
    cache = shape.num_layers * 2 * rows * shape.width * (2 + shape.num_tokens) * 2
    assert (found.update.rollout_rows, found.update.cache) == (rows, cache)
    still = replace(found, machine=Machine(peak_tflops=1e5, peak_tflops_fp32=1e5, utilisation=1.0))
    read = 2 * found.update.weights[FORWARD] + cache / 2
    assert still.seconds == pytest.approx(shape.num_tokens * read / 3350e9, rel=0.05)


def test_the_command_prints_a_page_and_writes_all_numbers(tmp_path, capsys) -> None:
    file = tmp_path / "plan.json"
    words = ["plan", "rear-l", "--gpus", "8", "--gpu-memory", "24", "--loop.accumulation", "16", "--json", str(file)]
    cli.main([*words, "--loop.compile"])
    page = capsys.readouterr().out
    assert "assumed: loop.compile changes nothing" in page
    assert all(len(line) <= 100 for line in page.splitlines())
    assert "475.3 million trained" in page and "It fits." in page and "models/maskgit-vqgan is the released" in page
    numbers = json.loads(file.read_text())
    assert numbers["fits"] and numbers["peak"] == sum(part["at_peak"] for part in numbers["memory"].values())
    cli.main(["plan", "ar-openmoji", "--json", str(file), "--overwrite"])
    assert json.loads(file.read_text())["recipe"] == "ar-openmoji"
    file.write_text("{}")
    for more, said in (
        ([], "already exists; choose another name, or add --overwrite"),
        (["--overwrite"], "holds no plan"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*words, *more])
        error = capsys.readouterr().err
        assert error.startswith(f"consonar: --json: {file}") and said in error and file.read_text() == "{}"
    with pytest.raises(SystemExit) as ended:
        cli.main([*words[:6], "--loop.accumulation", "8"])
    assert ended.value.code == 1
    assert "It does not fit. What to change, in this order:\n  --loop.accumulation 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rear-l", "--gpus", "3"], r"loop\.batch_size: 2048 is not a multiple of 3 processes x 2 micro-batches"),
        (
            ["rear-l", "--gpus", "8", "--parallel.strategy", "hybrid", "--parallel.shard-size", "3"],
            r"parallel\.shard_size: 3 does not divide the 8 processes; choices: 1, 2, 4, 8",
        ),
        (
            ["rear-l", "--loop.precision", "tf32", "--parallel.strategy", "fsdp", "--parallel.param-dtype", "bf16"],
            r"parallel\.param_dtype: 'bf16' is read only with loop\.precision bf16, and this run is in tf32",
        ),
        (["rear-l", "--gpu", "z9"], r"gpu: unknown 'z9'.*a100, a800, h100"),
        (["rear-l", "--utilisation", "0"], r"utilisation: 0\.0 is not in \(0, 1\]"),
        (["rear-l", "--tokenizer", "nowhere"], r"tokenizer: .*'nowhere'.*hf:maskgit-vq"),
        (["vapi-openmoji"], r"init: 'vapi-openmoji' starts from a trained generator; name it"),
        (["vapi-openmoji", "--init", "hf:no"], r"init: .*'hf:no'.*hf:rear-s"),
        (["vapi-openmoji", "--init", "./nowhere"], r"init: no folder \./nowhere; choices: openmoji, a run folder"),
        (["vapi-llamagen-t2i", "--init", "hf:rear-s"], r"init: 'hf:rear-s' takes classes, and \S+ has captions"),
        (["vapi-llamagen-xl", "--init", "hf:janus-pro-1b"], r"init: 'hf:janus-pro-1b' takes captions, .* has classes"),
        (["rear-l", "--num-classes", "0"], r"--num-classes: 0 is not positive"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, said, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *words])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1
    assert re.search(said, lines[0]), lines[0]


def test_what_another_stream_takes_is_in_memory_while_a_method_runs_again() -> None:
    owner, peaks = SimpleNamespace(judge=lambda: torch.empty(30, dtype=torch.uint8)), []
    with Ledger([], cuda=True) as ledger:
        ledger.beside(owner, "judge", "decoder")
        for _ in range(3):
            with ledger.labelled("decoder"):
                torch.empty(500, dtype=torch.uint8)
            owner.judge()
            peaks.append(ledger.peak.total())
    assert peaks == [500, 530, 530] and not ledger.alive.total()


def test_shards_divide_what_each_process_keeps() -> None:
    config, shapes = configured("llamagen, reAR")
    found = Plan(config, Machine(gpus=4, nodes=2), shapes, update(config, shapes, 1, low=False, cuda=True), [])
    fsdp = replace(found, config=replace(config, parallel=ParallelConfig(strategy="fsdp")))
    hybrid = replace(found, config=replace(config, parallel=ParallelConfig(strategy="hybrid")))
    for part in ("weights", "optimizer"):
        assert fsdp.static[part] * 8 == hybrid.static[part] * 4 == found.static[part]
    assert fsdp.memory["gradients"][0] == found.memory["gradients"][0] // 8
    block, whole = found.update.blocks[0], found.update.weights[FORWARD]
    rest = whole - 3 * block
    assert fsdp.gathered == 2 * (rest + 2 * block) and found.gathered == 0
    kept = replace(fsdp.config, parallel=ParallelConfig(strategy="fsdp", reshard_after_forward=False))
    assert replace(fsdp, config=kept).gathered == whole + rest + 2 * block
    low = replace(fsdp.config, parallel=ParallelConfig(strategy="fsdp", param_dtype="bf16", prefetch_backward=2))
    assert replace(fsdp, config=low).gathered == pytest.approx(rest + 3 * block / 2 + rest + 2 * block)
    several = replace(fsdp.config, loop=replace(config.loop, accumulation=2))
    assert replace(fsdp, config=several).memory["gradients"] == (whole, whole)
    assert "gradient buckets" in found.memory and "gradient buckets" not in fsdp.memory
    assert "--parallel.strategy fsdp" in ChainMap(*changes(config, found.machine))


def test_what_is_in_shards_beside_a_trained_generator() -> None:
    """The start model of post-training, whose blocks are whole one after another; a tokenizer's two networks."""
    made = {}
    for case in ("self-rollout", "tokenizer"):
        config, shapes = configured(case)
        config = replace(config, parallel=ParallelConfig(strategy="fsdp"))
        made[case] = Plan(config, Machine(gpus=2), shapes, update(config, shapes, 1, low=False, cuda=True), [])
    aligned, tokenizer = made["self-rollout"], made["tokenizer"]
    prior, block = aligned.update.weights[REFERENCE], aligned.update.blocks[0]
    assert aligned.static[REFERENCE] * 2 == prior
    kept = replace(aligned.config, parallel=ParallelConfig(strategy="fsdp", reshard_after_forward=False))
    assert replace(aligned, config=kept).gathered - aligned.gathered == pytest.approx(4 * block)
    whole, trained = tokenizer.update.weights[FORWARD], sum(tokenizer.update.trained)
    assert len(tokenizer.update.blocks) == 2 and tokenizer.gathered == whole + trained


def test_the_table_of_the_published_recipes_is_what_is_planned() -> None:
    """The row that takes least to make; all of them: python docs/make_scaling.py."""
    path = Path(__file__).parents[2] / "docs" / "make_scaling.py"
    spec = importlib.util.spec_from_file_location("make_scaling", path)
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    lines = table.TABLE.search(table.PAGE.read_text())[0].splitlines()
    assert table.row("rear-s", 64) in lines and len(lines) == 2 + len(table.ROWS) * len(table.GPUS)
