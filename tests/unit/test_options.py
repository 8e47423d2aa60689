"""Numbers and choices that no configuration takes, wherever they come from."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from configurations import CONFIGS, floats_in

from consonar.cli import main
from consonar.components import load_generator, save_generator
from consonar.config_io import to_dict
from consonar.errors import UserError
from consonar.files.weights import load_weights, save_tensors
from consonar.generators.llamagen import LlamaGenConfig
from consonar.options import OneOf, Range, rules
from consonar.origin import Origin
from consonar.recipes import find_recipe, read_config
from consonar.sampling.sample import SamplerConfig, sample, sample_tokens
from consonar.training.config import DataConfig, LoopConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.controls import CrossEntropyConfig, StraightThroughConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.optim import OptimConfig
from consonar.training.run import train

FLOATS = [(kind, name) for kind in CONFIGS for name in floats_in(kind)]


@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=[f"{kind.__name__}.{name}" for kind, name in FLOATS])
def test_no_float_option_takes_a_number_that_cannot_be_calculated_with(kind, name):
    base = CONFIGS[kind]
    for value in (float("nan"), float("inf"), -float("inf"), 1e38, 1e300):
        given = {"rewards": {"mse": value}, "weights": (value, 1.0)}.get(name, value)
        with pytest.raises(UserError, match=rf"{name}(\.mse|\.0)?: .*(finite|at most|not in|0 or more)") as caught:
            dataclasses.replace(base, **{name: given})
        assert "\n" not in str(caught.value)


def test_every_number_has_a_range():
    """Also where a subclass gives a field another default, and with it a type anew."""
    for kind in CONFIGS:
        ranged = {name for name, rule in rules(kind) if isinstance(rule, Range)}
        hints = {item.name: str(typing.get_type_hints(kind)[item.name]) for item in dataclasses.fields(kind)}
        numeric = {name for name, hint in hints.items() if re.search(r"\b(int|float)\b", hint)}
        assert numeric and ranged == numeric, kind.__name__


def test_a_field_that_is_declared_anew_keeps_its_rules():
    for kind in CONFIGS:
        for base in filter(dataclasses.is_dataclass, kind.__mro__[1:]):
            kept = [(name, rule) for name, rule in rules(base) if not isinstance(rule, OneOf)]  # `kind` has one more
            assert set(kept) <= set(rules(kind)), f"{kind.__name__} of {base.__name__}"


def test_what_is_no_number_is_refused():
    for value in ("3", None, torch.nn):
        with pytest.raises(UserError, match=r"loop\.steps: input should be a valid integer, got "):
            LoopConfig(steps=value)
    with pytest.raises(UserError, match=r"loop\.steps: -3 is not positive"):
        LoopConfig(steps=np.int64(-3))
    with pytest.raises(UserError, match=r"optim\.lr: nan is not a finite number"):
        OptimConfig(lr=np.float32("nan"))
    assert LoopConfig(steps=np.int64(3)).steps == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoopConfig(steps=1.5), r"loop\.steps: input should be a valid integer.*, got 1\.5"),
        (lambda: LoopConfig(batch_size=4.0), r"loop\.batch_size: input should be a valid integer, got 4\.0"),
        (lambda: LoopConfig(steps=(3,)), r"loop\.steps: input should be a valid integer, got \(3,\)"),
        (lambda: LoopConfig(compile="no"), r"loop\.compile: input should be a valid boolean, got 'no'"),
        (lambda: LoopConfig(trackers="wandb"), r"loop\.trackers: input should be a valid tuple, got 'wandb'"),
        (lambda: DataConfig(flip="no"), r"data\.flip: input should be a valid boolean, got 'no'"),
        (lambda: DataConfig(tokens=b"x"), r"data\.tokens: input should be a valid string, got b'x'"),
        (lambda: SamplerConfig(top_k=True), r"top_k: input should be a valid integer, got True"),
        (lambda: SamplerConfig(temperature=[1]), r"temperature: input should be a valid number, got \(1,\)"),
        (lambda: SamplerConfig(temperature=True), r"temperature: input should be a valid number, got True"),
        (lambda: PolicyConfig(rewards={"mse": "1"}), r"objective\.rewards\.mse: input should be a valid number, got"),
        (lambda: PolicyConfig(rewards={"mse": 1}, guard={}), r"objective\.guard: expected a GuardConfig, got \{\}"),
        (lambda: train(find_recipe("ar-openmoji"), "x", stop_at=1.5), r"--stop-at: 1\.5 is not a step"),
    ],
)  # fmt: skip
def test_python_gives_values_of_the_types_that_files_do(make, words):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_only_python_has_becomes_what_a_file_holds(tmp_path):
    data = DataConfig(tokens=tmp_path, images=Path("openmoji"))  # not the name: a folder that is called so
    loop = LoopConfig(steps=np.int64(3), ema_decay=np.float32(0.5), trackers=["wandb"])
    assert (data.tokens, data.images, loop.trackers) == (str(tmp_path), "./openmoji", ("wandb",))
    assert json.dumps([to_dict(data), to_dict(loop)]) and SamplerConfig(temperature=1).temperature == 1


def test_every_configuration_refuses_an_unknown_choice():
    tried = 0
    for kind, base in CONFIGS.items():
        for name, hint in typing.get_type_hints(kind).items():
            if typing.get_origin(hint) is typing.Literal:
                with pytest.raises(UserError, match=rf"{name}: unknown 'nonsense'"):
                    dataclasses.replace(base, **{name: "nonsense"})
                tried += 1
    assert tried > 25


@pytest.mark.parametrize(
    "make",
    [
        lambda value: SamplerConfig(temperature=value),
        lambda value: PolicyConfig(rewards={"mse": 1.0}, temperature=value),
        lambda value: CrossEntropyConfig(rewards={"mse": 1.0}, target="soft", tau=value),
        lambda value: StraightThroughConfig(rewards={"mse": 1.0}, gumbel_temperature=value),
    ],
)
def test_a_temperature_that_float32_cannot_divide_by_is_refused(make):
    assert make(1e-3) and make(100.0)
    with pytest.raises(UserError, match=r"1e-40 is not in \[1e-06, 1e\+06\]"):
        make(1e-40)


def test_steps_that_turn_weights_around_are_refused():
    with pytest.raises(UserError, match=r"optim\.lr: 1e\+30 is not in \(0, 10\]"):
        OptimConfig(lr=1e30)
    with pytest.raises(UserError, match=r"optim\.weight_decay: 11\.0 times optim\.lr 0\.1 is over 1"):
        OptimConfig(lr=0.1, weight_decay=11.0)
    with pytest.raises(UserError, match=r"optim\.warmup_steps: \d+ does not fit into 64 bits"):
        OptimConfig(warmup_steps=2**63)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1.0e+400", "1e38"])
@pytest.mark.parametrize(
    "key", ["optim.lr", "optim.max_grad_norm", "loop.ema_decay", "objective.noise.max_rate", "model.mlp_ratio"]
)
def test_no_file_brings_one_in(key, value, tmp_path):
    *path, last = key.split(".")
    text = f"{{{last}: {value}}}"
    for part in reversed(path):
        text = f"{{{part}: {text}}}"
    (tmp_path / "mine.yaml").write_text(f"base: rear-openmoji\n{text[1:-1]}\n")
    with pytest.raises(UserError, match=rf"{key}: .*(finite|at most|not in)") as caught:
        read_config(tmp_path / "mine.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["inf", "nan", "1e30", "1e38", "-1"])
def test_no_option_of_the_command_line_brings_one_in(value, tmp_path, capsys):
    for args in (
        ["train", "ar-openmoji", "--out", str(tmp_path / "run"), f"--optim.lr={value}"],
        ["sample", str(tmp_path), "--out", str(tmp_path / "x.png"), f"--temperature={value}"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(args)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("consonar: ")
        assert ("lr" if args[0] == "train" else "temperature") in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_where_they_enter_and_leave(value, tiny_generator, tmp_path):
    generator = tiny_generator()
    save_generator(generator, tmp_path / "model", Origin())
    with torch.no_grad():
        generator.lm_head.bias[3] = value
    with pytest.raises(UserError, match=r"new: lm_head\.bias holds numbers that are not finite"):
        save_generator(generator, tmp_path / "new", Origin())
    assert not (tmp_path / "new").exists()
    save_tensors(tmp_path / "model" / "model.safetensors", generator.state_dict())
    with pytest.raises(UserError, match=r"model\.safetensors: lm_head\.bias holds numbers that are not finite"):
        load_generator(tmp_path / "model")
    with pytest.raises(UserError, match=r"here: lm_head\.bias holds numbers that are not finite"):
        load_weights(tiny_generator(), generator.state_dict(), "here")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_logits_that_are_not_finite_are_an_error_and_no_picture(temperature, scale, tiny_generator, tokenizer):
    """From weights that were given in memory, or that are finite and too large."""
    sampler = SamplerConfig(temperature=temperature, guidance_scale=scale)
    for value in (float("nan"), 1e38):
        generator = tiny_generator()
        with torch.no_grad():
            generator.lm_head.weight.fill_(value)
        with pytest.raises(UserError, match=r"generator: its logits are not finite"):
            sample(generator, tokenizer, [0, 1], config=sampler)
    assert sample_tokens(tiny_generator(), torch.tensor([0]), [0], sampler)[0].shape == (1, 16)


REWARDS = {"mse": 1.0}
UNREAD = {
    "power of no schedule": (lambda: SamplerConfig(guidance_scale=22.0, guidance_power=2.75), "guidance_schedule"),
    "schedule of no guidance": (lambda: SamplerConfig(guidance_schedule="linear"), "guidance_scale other than 1"),
    "interval": (lambda: SamplerConfig(guidance_scale=2.0, guidance_interval=3), "guidance_schedule 'interval'"),
    "top-k of the most likely": (lambda: SamplerConfig(temperature=0, top_k=5), "temperature over 0"),
    "noise": (lambda: NoiseConfig(max_rate=0.5), r"objective\.noise\.schedule other than 'none'"),
    "noise of no rate": (
        lambda: NoiseConfig(schedule="linear", max_rate=0, corruption="mask"), r"objective\.noise\.max_rate over 0"
    ),
    "neighbours of no rate": (
        lambda: NoiseConfig(schedule="linear", max_rate=0, num_neighbours=4), r"objective\.noise\.max_rate over 0"
    ),
    "annealing of no rate": (
        lambda: NoiseConfig(schedule="truncated_linear", max_rate=0, anneal_end=0.5), "max_rate over 0"
    ),
    "heads": (lambda: AutoregressiveConfig(head_width=7), r"objective\.embedding_weight over 0"),
    "head that is not there": (
        lambda: AutoregressiveConfig(embedding_weight=1, heads="encode", decode_layer=0), "heads 'decode' or 'both'"
    ),
    "credit": (lambda: PolicyConfig(rewards=REWARDS, estimator="gspo", credit="token"), "so not 'gspo'"),
    "clip": (lambda: PolicyConfig(rewards=REWARDS, clip_range=0.1), r"objective\.inner_epochs over 1"),
    "kl": (lambda: PolicyConfig(rewards=REWARDS, kl="exact"), r"objective\.kl_weight over 0"),
    "baseline": (lambda: PolicyConfig(rewards=REWARDS, baseline_decay=0.5), r"objective\.estimator 'reinforce'"),
    "context noise": (lambda: PolicyConfig(rewards=REWARDS, noise_schedule="linear"), "context_noise over 0"),
    "lpips": (lambda: PolicyConfig(rewards=REWARDS, lpips_weights="w.pth"), r"'lpips' in objective\.rewards"),
    "tau": (lambda: CrossEntropyConfig(rewards=REWARDS, tau=0.5), r"objective\.target 'soft'"),
    "start": (lambda: ReconstructionConfig(discriminator_start=5), r"objective\.discriminator_weight over 0"),
    "captions": (lambda: LlamaGenConfig(caption_dim=8), r"model\.condition 'text'"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_an_option_that_nothing_reads_is_refused_and_told_what_would_read_it(name):
    make, words = UNREAD[name]
    with pytest.raises(
        UserError, match=rf"is read only with .*{words}.*; remove it, or set it to its default"
    ) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_negative_last_guided_position_is_refused():
    """LlamaGen's -1 means always, which here is to leave it away."""
    with pytest.raises(UserError, match=r"guidance_interval: -1 is negative; leave it away to guide all positions"):
        SamplerConfig(guidance_scale=2.0, guidance_schedule="interval", guidance_interval=-1)
    assert SamplerConfig(guidance_scale=2.0, guidance_schedule="interval").scale(60, 64) == 2.0
