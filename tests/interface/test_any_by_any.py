"""Any tokenizer under any generator: tiny models train three steps of reAR, two updates of VA-pi, and sample."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import NUM_CLASSES, TINY_VQ, Pictures, picture

from consonar.components import load_generator, load_tokenizer, save_tokenizer
from consonar.cpu.kernels import tune
from consonar.data.tokenizing import write_token_store
from consonar.distributed import World
from consonar.generators import GENERATORS
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.janus import JanusConfig, pad_prompts
from consonar.generators.llamagen import LlamaGenConfig
from consonar.generators.rear import ReARConfig
from consonar.sampling.sample import SamplerConfig, sample
from consonar.seeding import generator as seeded
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.alitok import AliTokConfig
from consonar.tokenizers.titok import TiTokConfig
from consonar.tokenizers.vit import TransformerConfig
from consonar.tokenizers.vqgan import MaskGITConfig, VQGANPlusConfig
from consonar.training.config import DataConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.alignment import AlignmentTrainee
from consonar.training.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from consonar.training.objectives.policy import PolicyConfig, TeacherForcedPolicy
from consonar.training.run import train
from consonar.training.tracking import read_metrics
from consonar.training.trainee import Trainee
from consonar.types import EncodedBatch, TextCondition

CONV = {
    "image_size": 16, "base_channels": 8, "channel_multipliers": (1, 1, 2), "num_res_blocks": 1, "num_groups": 4,
}  # fmt: skip
SIDE = TransformerConfig(width=32, num_layers=1, num_heads=4, patch_size=4)
VIT = {"image_size": 16, "vocab_size": 32, "code_dim": 4, "encoder": SIDE, "decoder": SIDE}
TOKENIZER_CONFIGS = {
    "vq": TINY_VQ,
    "maskgit-vq": MaskGITConfig(vocab_size=24, code_dim=4, **CONV),
    "vqgan-plus": VQGANPlusConfig(vocab_size=24, code_dim=6, **CONV),
    "lookup-free": VQGANPlusConfig(vocab_size=2**5, code_dim=5, quantizer="lookup-free", **CONV),
    "titok": TiTokConfig(num_tokens=6, pixel_decoder=MaskGITConfig(vocab_size=16, code_dim=4, **CONV), **VIT),
    "titok, own pixels": TiTokConfig(num_tokens=5, pixel_decoder=None, **VIT),
    "alitok": AliTokConfig(num_prefix_tokens=3, num_buffer_tokens=2, **VIT),
}
ROTARY = {"width": 32, "num_layers": 2, "num_heads": 4, "multiple_of": 8}
BY_CLASS = {
    "rear": ReARConfig(width=32, num_layers=2, num_heads=4, dropout=0.0),
    "llamagen": LlamaGenConfig(**ROTARY),
    "alitok-ar": AliTokARConfig(**ROTARY),
}
BY_TEXT = {
    "rear": replace(BY_CLASS["rear"], condition="text", num_condition_tokens=4, caption_dim=6),
    "llamagen": LlamaGenConfig(**ROTARY, condition="text", num_condition_tokens=4, caption_dim=6),
    "janus": JanusConfig(
        width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=48, text_vocab_size=20, pad_token=1,
        max_prompt_tokens=9, head_width=24,
    ),
}  # fmt: skip
REAR = AutoregressiveConfig(embedding_weight=1.0, head_width=16, noise=NoiseConfig(schedule="linear", max_rate=0.5))
VAPI = PolicyConfig(rewards={"mse": 1.0, "l1": 0.5}, group_size=2, context_noise=0.2)


def test_all_kinds_are_in_the_matrix():
    assert {config.kind for config in TOKENIZER_CONFIGS.values()} == set(TOKENIZERS)
    assert {config.kind for config in (*BY_CLASS.values(), *BY_TEXT.values())} == set(GENERATORS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """By tokenizer: its folder and a token store; and a folder of the same pictures in classes."""
    root = tmp_path_factory.mktemp("matrix")
    for index in range(12):
        folder = root / "images" / "abc"[index % NUM_CLASSES]
        folder.mkdir(parents=True, exist_ok=True)
        picture(index).save(folder / f"{index:03d}.png")
    made = {}
    for name, config in TOKENIZER_CONFIGS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokenizer = TOKENIZERS[config.kind][1](config, name=name.replace(", ", "-"))
        folder = root / name.replace(", ", "-")
        save_tokenizer(tokenizer, folder)
        write_token_store(root / f"{folder.name}-tokens", Pictures(12), load_tokenizer(folder))
        made[name] = folder, root / f"{folder.name}-tokens"
    return made, root / "images"


@pytest.mark.parametrize("generator", BY_CLASS)
@pytest.mark.parametrize("tokenizer", TOKENIZER_CONFIGS)
def test_class_conditional(tokenizer, generator, data, make_config, tmp_path):
    stores, images = data
    folder, store = stores[tokenizer]
    rear = make_config(
        tokenizer=str(folder), model=BY_CLASS[generator], objective=REAR, data=DataConfig(tokens=str(store)),
        loop={"steps": 3, "batch_size": 4},
    )  # fmt: skip
    trained = train(rear, tmp_path / "rear", quiet=True)
    assert {"train/align_current", "train/align_next"} < set(read_metrics(trained / "metrics.jsonl")[0])
    vapi = make_config(
        init=str(trained), tokenizer=None, model=None, objective=VAPI, data=DataConfig(images=str(images)),
        loop={"steps": 2, "batch_size": 4},
    )  # fmt: skip
    aligned = train(vapi, tmp_path / "vapi", quiet=True)
    rewards = [line["train/reward"] for line in read_metrics(aligned / "metrics.jsonl") if "train/reward" in line]
    assert rewards and all(map(math.isfinite, rewards))
    model, codec = load_generator(aligned), load_tokenizer(folder)
    samples = sample(model, codec, [0, 2], config=SamplerConfig(guidance_scale=1.5))
    assert samples.images.shape == (2, 3, 16, 16) and samples.tokens.shape == (2, codec.num_tokens)


def captions(generator, count: int):
    if generator.config.kind == "janus":
        return pad_prompts([[2, 5 + i, 6, 3][: 3 + i % 2] + [3] * (i % 2) for i in range(count)], 1)
    mask = torch.arange(4) >= torch.arange(count)[:, None] % 3
    return TextCondition(torch.randn(count, 4, 6, generator=seeded(0, "captions")), mask)


@pytest.mark.parametrize("generator", BY_TEXT)
@pytest.mark.parametrize("tokenizer", TOKENIZER_CONFIGS)
def test_text_conditional(tokenizer, generator, data):
    """The same objectives on batches of captions; `train` itself reads classes."""
    codec = load_tokenizer(data[0][tokenizer][0])
    config = BY_TEXT[generator]
    if generator == "janus":
        config = replace(config, code_dim=codec.code_dim)
    model = tune(GENERATORS[config.kind].model(config.sized(codec.vocab_size, codec.num_tokens, 0, codec.grid)))
    model.reset_parameters(seeded(0, "matrix"))
    images = torch.rand(4, 3, 16, 16, generator=seeded(1, "matrix")) * 2 - 1
    batch = EncodedBatch(images, captions(model, 4), tokens=codec.encode(images))
    world = World(0, 1, torch.device("cpu"))
    trainee = Trainee(model, REAR.head_specs(2, codec.code_dim))
    updates(Autoregressive(REAR, codec, total_steps=3, seed=0), trainee, batch, steps=3)
    policy = TeacherForcedPolicy(VAPI, codec, None, total_steps=2, seed=0, world=world)
    updates(policy, AlignmentTrainee(model), batch, steps=2)
    samples = sample(model.eval(), codec, captions(model, 2), config=SamplerConfig(guidance_scale=1.5))
    assert samples.images.shape == (2, 3, 16, 16) and samples.tokens.shape == (2, codec.num_tokens)


def updates(objective, trainee, batch, *, steps: int) -> None:
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in trainee.generator.parameters()]
    for step in range(steps):
        prepared = objective.prepare(trainee, batch, step)
        for _ in range(objective.config.updates):
            loss, _ = objective.loss(trainee, prepared, step)
            assert loss.isfinite()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, trainee.generator.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
