"""The recipes of published rows: their shapes and settings against the released ones, and every one of them trains."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import NUM_CLASSES, TINY_VQ
from manifests import manifest, released_shapes

from consonar import cli
from consonar.components import load_generator, load_tokenizer, save_generator
from consonar.convert import build, recognise
from consonar.errors import UserError
from consonar.generators import build_generator
from consonar.generators.llamagen import LLAMAGEN_PRESETS, LlamaGenConfig, LlamaGenGenerator
from consonar.origin import Origin
from consonar.recipes import RECIPES, find_recipe
from consonar.training.config import DataConfig, TrainConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics
from consonar.training.trainee import Trainee
from consonar.types import Grid

TOKENIZERS = {
    "models/maskgit-vqgan": "maskgit_vqgan_f16_256",
    "models/vqgan-plus-12bit": "vqplus",
    "models/titok-b64": "tokenizer_titok_b64",
    "models/alitok": "alitok_tokenizer",
}
# Recipe to (released list of keys of its generator, if any, and millions of parameters as stated in the docstring).
ON_TOKENS = {
    "rear-s": ("rear_s", 218.4),
    "rear-b": ("rear_b", 260.9),
    "rear-l": ("rear_l", 461.7),
    "ar-l": ("rear_l", 461.7),
    "rear-l-vqgan-plus": ("rear_vqplus", 468.0),
    "rear-b-titok": (None, 265.2),
    "ar-b-titok": (None, 265.2),
    "rear-b-alitok": ("alitok_ar_b", 177.0),
    "ar-b-alitok": ("alitok_ar_b", 177.0),
}
POST_TRAINING = ("vapi-llamagen-xl", "vapi-llamagen-xxl")
# Recipe to (learning rate, images of a GPU, updates, share of captions dropped) of the released scripts.
IN_WORDS = {"vapi-llamagen-t2i": (1e-6, 16, 200, 0.1), "vapi-janus-1b": (1e-7, 8, 100, 0.0)}
PUBLISHED = (*ON_TOKENS, *POST_TRAINING, *IN_WORDS)
PLAIN_OF = {"ar-l": "rear-l", "ar-b-titok": "rear-b-titok", "ar-b-alitok": "rear-b-alitok"}


def trainee_of(config: TrainConfig) -> Trainee:
    """What the recipe trains with its own tokenizer and 1000 classes, without memory."""
    shapes = released_shapes(TOKENIZERS[config.tokenizer])
    official = recognise(shapes, config.tokenizer)
    tokenizer = build(official.component, official.config(shapes))
    shape = config.model.sized(tokenizer.vocab_size, tokenizer.num_tokens, 1000, grid=tokenizer.grid)
    with torch.device("meta"):
        model = build_generator(shape)
        return Trainee(model, config.objective.head_specs(model.num_layers, tokenizer.code_dim))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_lists_of_this_file_are_complete():
    assert {*PUBLISHED, *(name.replace("vapi", "ce") for name in IN_WORDS)} == {
        name for name in RECIPES if not re.search("openmoji|cifar10|scenes", name)
    }


@pytest.mark.parametrize("name", ON_TOKENS)
def test_the_generator_is_the_released_one(name):
    released, millions = ON_TOKENS[name]
    generator = trainee_of(find_recipe(name)).generator
    assert round(count(generator) / 1e6, 1) == millions
    if released is not None:
        expected = {key: shape for key, shape in released_shapes(released).items() if "align_mlp" not in key}
        assert {key: tuple(value.shape) for key, value in generator.state_dict().items()} == expected


@pytest.mark.parametrize("name", ["rear-s", "rear-b", "rear-l"])
def test_with_its_heads_it_has_as_many_parameters_as_the_released_file(name):
    listed = manifest(name.replace("-", "_"))
    trainee = trainee_of(find_recipe(name))
    assert count(trainee) == listed["total_parameters"]
    for ours, theirs in (("current", "encode"), ("next", "decode")):
        shapes = {key: list(value.shape) for key, value in trainee.heads[ours].state_dict().items()}
        prefix = f"{theirs}_align_mlp."
        assert shapes == {k[len(prefix) :]: v for k, v in listed["state_dict"].items() if k.startswith(prefix)}


@pytest.mark.parametrize("name", ["rear-s", "rear-b", "rear-l", "rear-l-vqgan-plus"])
def test_settings_are_those_of_the_released_configuration(name):
    config, listed = find_recipe(name), manifest(ON_TOKENS[name][0])["config"]["generator"]
    model, objective = config.model, config.objective
    assert (model.width, model.num_layers, model.num_heads) == (
        listed["hidden_size"], listed["num_hidden_layers"], listed["num_attention_heads"]
    )  # fmt: skip
    assert model.mlp_ratio * model.width == listed["intermediate_size"]
    assert model.dropout == listed["dropout"] == listed["attn_drop"]
    assert objective.class_dropout == listed["class_label_dropout"]
    assert objective.embedding_weight == listed["transition_alignment_weight"]
    assert (objective.noise.schedule, objective.noise.corruption) == ("truncated_linear", "uniform")
    assert objective.noise.anneal_end * config.loop.steps == listed["randomness_anneal_end"]
    layers = [spec.layer for spec in objective.head_specs(model.num_layers, 256)]
    assert layers == [listed["encode_align_layer_idx"], listed["decode_align_layer_idx"]]
    # The part of the released file that the list of keys does not carry; 1e-4 is that of VQGAN+ alone.
    optim = config.optim
    assert optim.lr == (1e-4 if name == "rear-l-vqgan-plus" else 4e-4)
    assert (optim.min_lr, optim.warmup_steps, optim.beta1, optim.beta2) == (1e-5, 62_500, 0.9, 0.96)
    assert (optim.weight_decay, optim.max_grad_norm) == (0.03, 1.0)
    assert (config.loop.steps, config.loop.batch_size, config.loop.precision) == (250_000, 2048, "bf16")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_batch_divides_over_eight_processes(name):
    """What one GPU reads at once, as in the released configurations (VA-pi: images, of 8 sequences each)."""
    loop = find_recipe(name).loop
    images, rest = divmod(loop.batch_size, 8 * loop.accumulation)
    assert rest == 0
    expected = {"rear-s": 256, **dict.fromkeys(POST_TRAINING, 16), **{key: row[1] for key, row in IN_WORDS.items()}}
    assert images == expected.get(name, 128)


@pytest.mark.parametrize("name", PLAIN_OF)
def test_a_plain_row_differs_from_its_counterpart_in_the_objective_alone(name):
    plain, regularised = find_recipe(name), find_recipe(PLAIN_OF[name])
    assert plain.objective.embedding_weight == 0 and plain.objective.noise.schedule == "none"
    assert plain.objective.class_dropout == regularised.objective.class_dropout
    assert replace(plain, recipe="", objective=regularised.objective) == replace(regularised, recipe="")


@pytest.mark.parametrize(("size", "released"), [("XL", "llamagen_gpt-xl_c2i_384"), ("XXL", "llamagen_gpt-xxl_c2i_384")])
def test_the_sizes_that_vapi_starts_from_have_the_published_parameters(size, released):
    with torch.device("meta"):
        generator = LlamaGenGenerator(LLAMAGEN_PRESETS[size].sized(16384, 576, 1000, grid=Grid(24, 24)))
    assert count(generator) == manifest(released)["total_parameters"]


@pytest.mark.parametrize("name", [*POST_TRAINING, *IN_WORDS, "rear-l", "ar-b-alitok"])
def test_a_run_that_is_killed_loses_a_small_part_of_itself(name):
    loop = find_recipe(name).loop
    assert 0 < loop.save_every <= loop.steps / 5


def test_vapi_has_the_published_settings_and_no_second_model():
    for name in POST_TRAINING:
        config = find_recipe(name)
        objective, optim = config.objective, config.optim
        assert objective.rewards == {"mse": 1.0, "lpips": 1.0} and objective.group_size == 8
        assert (objective.ce_weight, objective.kl_weight, objective.context_noise) == (0.1, 0.0, 0.0)
        assert (objective.clip_range, objective.clip_high, objective.advantage_clamp) == (0.2, 0.2, 5.0)
        assert (optim.lr, optim.min_lr, optim.warmup_steps) == (1e-6, 1e-6, 0)
        assert (optim.beta1, optim.beta2, optim.weight_decay, optim.max_grad_norm) == (0.9, 0.999, 1e-4, 1.0)
        assert config.loop.steps * config.loop.batch_size == 12_800  # 1 % of ImageNet
        assert not objective.guard.measure_kl and config.model is None


@pytest.mark.parametrize("name", IN_WORDS)
def test_vapi_for_captions_has_the_published_settings_and_its_control_differs_in_the_loss_alone(name):
    config, control = find_recipe(name), find_recipe(name.replace("vapi", "ce"))
    objective, (rate, _, steps, dropped) = config.objective, IN_WORDS[name]
    assert (objective.context_noise, objective.kl_weight, objective.ce_weight) == (0.5, 0.01, 0.1)
    assert objective.rewards == {"mse": 1.0, "lpips": 1.0} and objective.group_size == 8
    assert (objective.class_dropout, objective.advantage_clamp, objective.clip_range) == (dropped, 5.0, 0.2)
    assert (config.optim.lr, config.optim.min_lr, config.loop.steps) == (rate, rate, steps)
    shared = ("context_noise", "class_dropout", "rewards")
    assert all(getattr(control.objective, key) == getattr(objective, key) for key in shared)
    assert replace(control, recipe=name, objective=objective) == config


def test_vapi_without_a_start_model_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="init: 'vapi-llamagen-xxl' starts from a trained generator"):
        train(find_recipe("vapi-llamagen-xxl"), tmp_path / "run", quiet=True)


def test_a_missing_tokenizer_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = find_recipe("rear-s")
    with pytest.raises(UserError, match="models/maskgit-vqgan"):
        train(replace(config, loop=replace(config.loop, device="cpu")), tmp_path / "run", quiet=True)


def test_recipes_are_listed_in_a_line_each(capsys):
    cli.main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    for name, function in RECIPES.items():
        (line,) = (line for line in lines if line.split(" ")[0] == name)
        assert line.endswith(function.__doc__.splitlines()[0]) and len(line) <= 128
        assert len(line.split(maxsplit=1)[1]) > 20


def tiny(config: TrainConfig, **data: object) -> TrainConfig:
    """The recipe at width 32, 2 layers, 4 heads, 2 steps of 8 images on the CPU, with its other settings."""
    changes: dict = data
    if config.model is not None:
        changes["model"] = replace(config.model, width=32, num_layers=2, num_heads=4)
        changes["objective"] = replace(config.objective, head_width=32 if config.objective.embedding_weight else 2048)
    else:
        changes["objective"] = replace(config.objective, rewards={"mse": 1.0})
    loop = replace(config.loop, steps=2, batch_size=8, log_every=1, precision="fp32", device="cpu")
    return replace(config, loop=loop, **changes)


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.parametrize("name", ON_TOKENS)
def test_it_trains_on_tokens_at_tiny_size(name, stores, tokenizer_folder, tmp_path):
    recipe = find_recipe(name)
    config = tiny(recipe, tokenizer=str(tokenizer_folder), data=DataConfig(tokens=str(stores[0])))
    run = train(config, tmp_path / "run", quiet=True)
    values = losses(run)
    assert len(values) == 2 and all(math.isfinite(value) for value in values)
    # Nearly uniform at the start, and the two heads add 1 - cos each, about 1 for random codes.
    start = math.log(TINY_VQ.vocab_size) + (0 if name in PLAIN_OF else 2)
    assert abs(values[0] - start) < 0.8
    generator = load_generator(run)
    assert generator.config.kind == recipe.model.kind
    assert not any(key.startswith("heads.") for key in generator.state_dict())


@pytest.mark.parametrize("name", POST_TRAINING)
def test_it_post_trains_a_tiny_llamagen(name, picture_folder, tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder)
    shape = LlamaGenConfig(width=32, num_layers=2, num_heads=4, multiple_of=32)
    start = LlamaGenGenerator(shape.sized(tokenizer.vocab_size, tokenizer.num_tokens, NUM_CLASSES, grid=tokenizer.grid))
    start.reset_parameters(torch.Generator().manual_seed(0))
    save_generator(start, tmp_path / "start", Origin())
    config = tiny(
        find_recipe(name),
        init=str(tmp_path / "start"),
        tokenizer=str(tokenizer_folder),
        data=DataConfig(images=str(picture_folder)),
    )
    run = train(config, tmp_path / "run", quiet=True)
    values = losses(run)
    assert len(values) == 2 and all(math.isfinite(value) for value in values)
    before, after = load_generator(tmp_path / "start"), load_generator(run)
    assert after.config == before.config
    moved = (after.output.weight - before.output.weight).abs().max()
    assert 0 < moved < 1e-5  # two steps of AdamW at a learning rate of 1e-6
