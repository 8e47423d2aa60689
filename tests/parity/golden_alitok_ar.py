"""AliTok's generator against the authors' implementation: positions, logits, greedy sampling with its guidance."""

import re
from dataclasses import replace

import torch
from fill import fill
from golden import Golden
from golden_llamagen_gpt import class_ids, run_positions

from consonar.cpu.kernels import tune
from consonar.generators.alitok import AliTokARConfig, AliTokARGenerator
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.types import Grid

# The released model has these positions whatever its settings say.
GRID = Grid(16, 16, prefix=17)


def matches(meta: dict) -> bool:
    return meta["config"].get("cls") == "alitok modeling.ar.ARModel"


def filled(golden: Golden) -> AliTokARGenerator:
    model = golden.meta["config"]["cfg"]["model"]
    shape = model["generator"]
    config = AliTokARConfig(
        width=shape["hidden_size"], num_layers=shape["num_hidden_layers"], num_heads=shape["num_attention_heads"],
        vocab_size=model["vq_model"]["codebook_size"], num_tokens=GRID.num_tokens, grid=GRID,
        num_classes=shape["condition_num_classes"],
    )  # fmt: skip
    return fill(tune(AliTokARGenerator(config))).eval()


@torch.inference_mode()
def run(golden: Golden) -> None:
    generator = filled(golden)
    inputs = golden.meta["inputs"]
    labels = torch.tensor(class_ids(inputs["labels"], NC=generator.num_classes))
    found = re.search(r"make_tokens\(\((\d+),\s*(\d+)\)", inputs["tokens"])
    assert found, f"{golden.name}: input tokens is {inputs['tokens']!r}"
    tokens = golden.make_tokens((int(found[1]), int(found[2])), generator.vocab_size)
    run_positions(golden, generator)
    hidden, _ = generator.hidden_states(tokens, labels)
    whole = generator.output(hidden)  # with the last position, from which nothing is predicted
    torch.testing.assert_close(generator(tokens, labels)[0], whole[:, :-1], rtol=1e-4, atol=1e-4)
    golden.compare("logits_head", whole[:, : golden.shape("logits_head")[1]])
    golden.compare("logits_tail", whole[:, -golden.shape("logits_tail")[1] :])
    golden.compare("logits_stats", torch.stack([whole.mean(), whole.std(), whole.abs().max()]))
    for key in golden.arrays:
        scales = re.fullmatch(r"gen_g([\d.]+)_p([\d.]+)", key)
        if scales:
            golden.compare(key, greedy(golden, key, generator, labels, float(scales[1]), float(scales[2])))


def greedy(
    golden: Golden, key: str, generator: AliTokARGenerator, labels: torch.Tensor, guidance: float, power: float
) -> torch.Tensor:
    """Guidance 0 means off there, 1 here. The json's shorter sequence is also what its schedule counts to."""
    config = SamplerConfig(temperature=0)
    if guidance not in (0, 1):
        config = replace(config, guidance_scale=guidance, guidance_schedule="power_cosine", guidance_power=power)
    batch, length = golden.shape(key)
    assert length == golden.meta["config"].get("generate_image_seq_len", length)
    tokens, _ = sample_tokens(generator, labels, range(batch), config, num_tokens=length)
    return tokens
