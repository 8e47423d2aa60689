"""Every option of every configuration, changed alone: what comes out changes too, or the option is refused as unread.

Where it is refused alone, `NEEDS` has what the refusal asks for, and then the option must change what comes out.
"""

import copy
import dataclasses
import typing
from dataclasses import replace
from typing import Any

import pytest
import torch
from configurations import CONFIGS

from consonar.distributed import World
from consonar.errors import UserError
from consonar.generators import GENERATORS
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.janus import JanusConfig, pad_prompts
from consonar.generators.llamagen import LlamaGenConfig
from consonar.generators.rear import ReARConfig
from consonar.options import Options
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import generator as seeded
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.alitok import AliTokConfig
from consonar.tokenizers.titok import TiTokConfig
from consonar.tokenizers.vit import TransformerConfig
from consonar.tokenizers.vq import VQConfig
from consonar.tokenizers.vqgan import MaskGITConfig, VQGANPlusConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives import kinds, method_of_config
from consonar.training.objectives.alignment import AlignmentTrainee, GuardConfig
from consonar.training.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from consonar.training.objectives.controls import CrossEntropyConfig, StraightThroughConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import Reconstruction, ReconstructionConfig, TokenizerTrainee
from consonar.training.trainee import Trainee
from consonar.types import EncodedBatch, Grid, TextCondition

WORLD = World(0, 1, torch.device("cpu"))
CONV = {"image_size": 16, "base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "num_groups": 4}
SIDE = TransformerConfig(width=32, num_layers=1, num_heads=4, patch_size=4)
VIT = {"image_size": 16, "vocab_size": 32, "code_dim": 4, "encoder": SIDE, "decoder": SIDE}
SIZES = {"vocab_size": 32, "num_tokens": 16, "num_classes": 3}
ROTARY = {"width": 32, "num_layers": 2, "num_heads": 4, "multiple_of": 8, **SIZES}
JANUS = {
    "width": 32, "num_layers": 2, "num_heads": 4, "mlp_width": 48, "text_vocab_size": 20, "pad_token": 1,
    "max_prompt_tokens": 6, "code_dim": 4, "vocab_size": 32, "num_tokens": 16,
}  # fmt: skip
REWARDS = {"mse": 1.0, "l1": 0.5}

BASES: dict[type, Any] = {
    SamplerConfig: SamplerConfig(),
    AutoregressiveConfig: AutoregressiveConfig(),
    NoiseConfig: NoiseConfig(),
    GuardConfig: GuardConfig(),
    PolicyConfig: PolicyConfig(rewards=REWARDS, group_size=3),
    CrossEntropyConfig: CrossEntropyConfig(rewards=REWARDS),
    StraightThroughConfig: StraightThroughConfig(rewards=REWARDS, perceptual_weight=0.0),
    ReconstructionConfig: ReconstructionConfig(perceptual_weight=0.0, revive_after=1),
    ReARConfig: ReARConfig(width=32, num_layers=2, num_heads=4, dropout=0.0, **SIZES),
    LlamaGenConfig: LlamaGenConfig(**ROTARY),
    AliTokARConfig: AliTokARConfig(**ROTARY),
    JanusConfig: JanusConfig(**JANUS),
    VQConfig: VQConfig(vocab_size=32, code_dim=4, latent_channels=8, **CONV),
    MaskGITConfig: MaskGITConfig(vocab_size=24, code_dim=4, **CONV),
    VQGANPlusConfig: VQGANPlusConfig(vocab_size=32, code_dim=5, **CONV),
    TiTokConfig: TiTokConfig(num_tokens=5, pixel_decoder=None, **VIT),
    AliTokConfig: AliTokConfig(num_prefix_tokens=3, num_buffer_tokens=2, **VIT),
    TransformerConfig: SIDE,
}
HEADS = {"embedding_weight": 0.5, "head_width": 16}
HEAD_OPTIONS = ("heads", "encode_layer", "decode_layer", "head_depth", "head_width")
CAPTIONS = {"num_condition_tokens": 4, "caption_dim": 6}
FREE = {"rollout": "free", "ce_weight": 0.0}
# What an option needs to be read, where the base has it not.
NEEDS: dict[tuple[type, str], dict[str, Any]] = {
    (SamplerConfig, "guidance_schedule"): {"guidance_scale": 2.0},
    (SamplerConfig, "guidance_power"): {"guidance_scale": 2.0, "guidance_schedule": "power_cosine"},
    (SamplerConfig, "guidance_interval"): {"guidance_scale": 2.0, "guidance_schedule": "interval"},
    **{
        (AutoregressiveConfig, name): HEADS
        for name in ("heads", "encode_layer", "decode_layer", "head_depth", "head_width")
    },
    (AutoregressiveConfig, "mask_noised"): {**HEADS, "noise": NoiseConfig(schedule="constant")},
    **{(NoiseConfig, name): {"schedule": "truncated_linear"} for name in ("max_rate", "anneal_end", "corruption")},
    (NoiseConfig, "num_neighbours"): {"schedule": "constant", "corruption": "nearest"},
    **{
        (kind, name): {"context_noise": 0.5}
        for kind in kinds("post-training").values()
        for name in ("noise_schedule", "corruption")
    },
    (PolicyConfig, "entropy_weight"): {"entropy": "position"},
    **{(kind, "lpips_weights"): {"rewards": {"lpips": 1.0}} for kind in kinds("post-training").values()},
    (PolicyConfig, "guidance_scale"): FREE,
    (PolicyConfig, "rollout"): {"ce_weight": 0.0},
    (PolicyConfig, "clip_range"): {"inner_epochs": 2},
    (PolicyConfig, "clip_range_high"): {"inner_epochs": 2},
    (PolicyConfig, "kl"): {"kl_weight": 0.5},
    (PolicyConfig, "smooth_credit"): {"credit": "token"},
    (PolicyConfig, "baseline_decay"): {"estimator": "reinforce"},
    (CrossEntropyConfig, "tau"): {"target": "soft"},
    (StraightThroughConfig, "perceptual"): {"perceptual_weight": 0.5},
    (ReconstructionConfig, "perceptual"): {"perceptual_weight": 0.5},
    (ReconstructionConfig, "perceptual_weights"): {"perceptual_weight": 0.5, "perceptual": "lpips"},
    (ReconstructionConfig, "discriminator_start"): {"discriminator_weight": 0.5},
    **{(kind, "ffn_width"): {"multiple_of": 256} for kind in (LlamaGenConfig, AliTokARConfig)},
    **{
        (kind, name): {"condition": "text", "num_classes": 0}
        | {key: value for key, value in CAPTIONS.items() if key != name}
        for kind in (LlamaGenConfig, ReARConfig)
        for name in CAPTIONS
    },
    (ReARConfig, "pooled"): {"condition": "text", "num_classes": 0, **CAPTIONS},
    **{(kind, "condition"): {"num_classes": 0} for kind in (LlamaGenConfig, ReARConfig)},
    **{
        (kind, "discriminator"): {"rewards": {"patch-discriminator": 1.0}, "discriminator": "nowhere"}
        for kind in kinds("post-training").values()
    },
    **{
        (kind, name): {"rewards": {name: 1.0}, name: "nowhere"}
        for kind in kinds("post-training").values()
        for name in ("clip", "hpsv2")
    },
}
# What the option is changed to, where the type does not say it.
VALUES: dict[str, Any] = {
    "rewards": {"mse": 2.0}, "class_dropout": 0.5, "guard": GuardConfig(max_entropy=0.5),
    "noise": NoiseConfig(schedule="constant"),
    "lpips_weights": "elsewhere.pth", "perceptual_weights": "elsewhere.pth", "discriminator": "elsewhere",
    "clip": "elsewhere", "hpsv2": "elsewhere",
    "min_entropy": 2.0, "max_entropy": 0.5, "max_kl": 0.5, "guidance_interval": 1, "clip_range_high": 0.01,
    "clip_range": 0.01, "advantage_clamp": 0.1, "grid": Grid(4, 4), "channel_multipliers": (1, 1),
    "num_decoder_blocks": 2, "top_k": 3, "top_p": 0.3, "revive_until": 0.1, "revive_after": 0,
    "encoder": replace(SIDE, width=64), "decoder": replace(SIDE, width=64), "discriminator_start": 3,
    "chunk": 5, "decode_layer": 0,
    "pixel_decoder": MaskGITConfig(vocab_size=16, code_dim=4, image_size=16, base_channels=8, num_groups=4,
                                   channel_multipliers=(1, 1, 2)),
}  # fmt: skip


def candidates(kind: type, name: str, value: Any) -> list[Any]:
    """Other values of a field that may be valid."""
    hint = typing.get_type_hints(kind)[name]
    if name in VALUES:
        return [VALUES[name]]
    if typing.get_origin(hint) is typing.Literal:
        return [choice for choice in typing.get_args(hint) if choice != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, float):
        return [value / 2 if value else 0.5]
    return [2 * value, value + 1, value // 2] if value else [1, 2]


def options() -> list[tuple[type, str]]:
    return [(kind, item.name) for kind in BASES for item in dataclasses.fields(kind) if item.name != "kind"]


@pytest.mark.parametrize(("kind", "name"), options(), ids=lambda part: getattr(part, "__name__", part))
def test_an_option_changes_what_comes_out_or_is_refused(kind, name, observe):
    base, needs = BASES[kind], NEEDS.get((kind, name), {})
    alone = outcomes(kind, name, base, observe)
    assert alone, "it is neither refused alone nor does it change what comes out"
    if needs:
        assert outcomes(kind, name, replace(base, **needs), observe) == {"changed"}, "with what it needs"
    elif alone == {"refused"}:
        pytest.fail("refused alone: say in NEEDS what it needs to be read")


def outcomes(kind: type, name: str, base: Any, observe) -> set[str]:
    """`changed` where a value of the option changes what comes out, or else `refused` where none is taken."""
    before, found = observe(base), set()
    for value in candidates(kind, name, getattr(base, name)):
        try:
            config = replace(base, **{name: value})
        except UserError as error:
            assert "\n" not in str(error)
            found.add("refused")
            continue
        if observe(config) != before:
            return {"changed"}
    return found


def test_every_kind_of_configuration_is_walked():
    """Those of runs are in `training/test_every_run_option.py`."""
    ours = {kind.__name__ for kind in BASES}
    assert {kind.__name__ for kind in CONFIGS} - ours == {"TrainConfig", "DataConfig", "LoopConfig", "OptimConfig"}
    bases = {
        "ModelConfig", "GeneratorConfig", "RotaryConfig", "TokenizerConfig", "ConvConfig", "ViTConfig",
        "ObjectiveConfig", "AlignmentConfig",
    }  # fmt: skip
    of_commands = {"SweepFile", "DiagnosisSettings", "Machine", "ParallelConfig", "LoRAConfig"}  # tested elsewhere
    assert {kind.__name__ for kind in below(Options)} - bases - of_commands <= {kind.__name__ for kind in CONFIGS}


def below(kind: type) -> list[type]:
    """The classes of the package that inherit `kind`."""
    own = [child for child in kind.__subclasses__() if child.__module__.startswith("consonar.")]
    return own + [grandchild for child in own for grandchild in below(child)]


@pytest.fixture
def observe(tiny_generator, tokenizer):
    """What comes out of a configuration, as text; the one line where it is refused later than when it is made."""

    def observed(config: Any) -> str:
        torch.manual_seed(0)
        try:
            return repr(list(look(config)))
        except UserError as error:
            return str(error)

    def look(config: Any):
        if isinstance(config, SamplerConfig):
            tokens, entropy = sample_tokens(tiny_generator(), torch.tensor([0, 2]), [0, 1], config)
            yield tokens.tolist(), entropy.tolist()
        elif isinstance(config, NoiseConfig):
            yield from look(AutoregressiveConfig(noise=config))
        elif isinstance(config, GuardConfig):
            yield from look(replace(BASES[PolicyConfig], guard=config))
        elif isinstance(config, AutoregressiveConfig):
            trainee = Trainee(tiny_generator(), config.head_specs(2, tokenizer.code_dim))
            yield from updates(Autoregressive(config, tokenizer, total_steps=10, seed=0), trainee, batch(), (0, 3, 8))
        elif isinstance(config, ReconstructionConfig):
            model = VQConfig(image_size=32, vocab_size=32, code_dim=4, latent_channels=8, base_channels=8, num_groups=4)
            trainee = TokenizerTrainee(
                TOKENIZERS["vq"][1](model, name="x"), discriminator=config.discriminator_weight > 0
            )
            objective = Reconstruction(config, total_steps=4, seed=0, world=WORLD)
            yield from updates(objective, trainee, batch(32), range(4))
        elif type(config) in kinds("post-training").values():
            yield from aligned(config)
        elif isinstance(config, TransformerConfig):
            yield from look(replace(BASES[AliTokConfig], encoder=config, decoder=config))
        else:
            yield from module_of(config)

    def batch(side: int = 16) -> EncodedBatch:
        rng = seeded(0, "every option")
        images = torch.rand(8, 3, side, side, generator=rng) * 2 - 1
        tokens = torch.randint(32, (8, 16), generator=rng)
        return EncodedBatch(images, torch.arange(8) % 3, tokens=tokens)

    def aligned(config: Any):
        codec, calls = copy.deepcopy(tokenizer), []
        decode = codec.decode
        codec.decode = lambda tokens: calls.append(len(tokens)) or decode(tokens)
        prior = tiny_generator(seed=1)
        objective = method_of_config(config).objective(
            config, codec, prior, total_steps=10, seed=0, world=WORLD, probe=lambda: batch().images
        )
        heads = AutoregressiveConfig(**HEADS).head_specs(2, tokenizer.code_dim) if config.keeps_heads else ()
        trainee = AlignmentTrainee(tiny_generator(), heads)
        yield from updates(objective, trainee, batch(), (0, 5, 7))
        yield objective.validate(AlignmentTrainee(tiny_generator()), iter([batch()])), calls
        yield objective.breach({"entropy": 1.0, "kl": 1.0}), config.needs_prior()

    return observed


def updates(objective: Any, trainee: Any, batch: EncodedBatch, steps: Any):
    """The loss, its terms and the weights of some large steps of gradient descent."""
    for step in steps:
        prepared = objective.prepare(trainee, batch, step)
        for _ in range(objective.config.updates):
            loss, terms = objective.loss(trainee, prepared, step)
            loss.backward()
            with torch.no_grad():
                for parameter in trainee.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.5 * parameter.grad
                        parameter.grad = None
            weights = sum(float(parameter.abs().sum()) for parameter in trainee.parameters())
            yield float(loss), {key: float(value) for key, value in terms.items()}, weights


def module_of(config: Any):
    """Shapes of the weights, and what goes through them; for a generator in training and in evaluation."""
    if config.kind in TOKENIZERS:
        module = TOKENIZERS[config.kind][1](config, name="x").eval()
        images = torch.rand(2, 3, config.image_size, config.image_size, generator=seeded(0, "pictures")) * 2 - 1
        tokens = module.encode(images)
        yield (
            module.num_tokens,
            float(module.decode(tokens).double().sum()),
            float(module.vectors(images).double().sum()),
        )
    else:
        module, rng = GENERATORS[config.kind][1](config), seeded(0, "weights")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
        if config.kind == "janus":
            condition = pad_prompts([[2, 5, 6, 3], [2, 7, 3]], config.pad_token)
        elif module.num_classes:
            condition = torch.tensor([0, 1])
        else:
            features = torch.randn(2, *config.caption_shape, generator=rng)
            condition = TextCondition(features, torch.ones(features.shape[:2], dtype=torch.bool))
        tokens = torch.randint(min(32, config.vocab_size), (2, config.num_tokens), generator=rng)
        for mode in (False, True):
            for given in (condition, module.null_condition(condition)):
                yield float(module.train(mode)(tokens, given)[0].double().abs().sum())
    yield {key: tuple(value.shape) for key, value in module.state_dict().items()}
