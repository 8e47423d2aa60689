"""reAR and RAR against the authors' implementations (tests/goldens: rear, rear_noalign, rar), and released shapes."""

import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from fill import GOLDENS, compare, fill, load, make_tokens, value_for

from consonar.generators.rear import REAR_PRESETS, ReARConfig, ReARGenerator
from consonar.sampling.guidance import power_cosine_scale
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.training.losses import codebook_alignment_loss, next_token_accuracy, next_token_loss
from consonar.training.trainee import HeadSpec, Trainee, alignment_head

# Our head names and the official modules.
OFFICIAL_HEADS = {"current": "encode_align_mlp.", "next": "decode_align_mlp."}

COVERED = {
    "rear": {
        "labels", "condition", "none_condition", "logits", "logits_uncond", "encode_z", "decode_z", "perturb_mask",
        "features", "fixed_perturb_mask", "loss_mask_none", "loss_mask_fixed", "loss_encode_only", "loss_decode_only",
        "cfg_schedule_g10_p2.75", "cfg_schedule_g4_p1",
        *(f"gen_g{g}_p{p}{end}" for g in (0, 4, 10) for p in ("1", "2.75") for end in ("", "__min_margin")),
    },
    "rear_noalign": {"logits"},
    "rar": {
        "condition", "logits",
        *(f"gen_g{g}_p{p}{end}" for g in (0, 4, 16) for p in ("1", "2.75") for end in ("", "__min_margin")),
    },
}  # fmt: skip
# RAR's randomised orders are a training method of its own; reAR trains and samples in raster order alone.
NOT_COVERED = {"rar": {"orders", "logits_orders", "labels_orders"}, "rear": set(), "rear_noalign": set()}


@lru_cache
def filled(name: str) -> Trainee:
    """The golden's model with its weights; the official key of a head is that of its official module."""
    settings = load(name)[1]["config"]["model"]
    vocab_size, shape = settings["vq_model"]["codebook_size"], settings["generator"]
    config = ReARConfig(
        width=shape["hidden_size"], num_layers=shape["num_hidden_layers"], num_heads=shape["num_attention_heads"],
        mlp_ratio=shape["intermediate_size"] / shape["hidden_size"], dropout=shape["dropout"],
        vocab_size=vocab_size, num_tokens=shape["image_seq_len"], num_classes=shape["condition_num_classes"],
    )  # fmt: skip
    specs = []
    if shape.get("transition_alignment"):
        layers = {"current": shape["encode_align_layer_idx"], "next": shape["decode_align_layer_idx"]}
        specs = [HeadSpec(n, layers[n], n, shape["z_dim"], 3, shape["projection_dim"]) for n in ("current", "next")]
    trainee = Trainee(ReARGenerator(config), tuple(specs)).eval()
    fill(trainee.generator)
    for head, prefix in OFFICIAL_HEADS.items():
        if head in trainee.heads:
            fill(trainee.heads[head], prefix=prefix)
    return trainee


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    num_classes = filled(name).generator.num_classes
    return make_tokens((3, 16), 64), torch.tensor([3, 0, num_classes - 1])


@torch.inference_mode()
def full_logits(name: str, condition: torch.Tensor) -> torch.Tensor:
    """Logits of every position but cls, the unused last one included: (3, N + 1, V)."""
    generator = filled(name).generator
    hidden, _ = generator.hidden_states(inputs(name)[0], condition)
    logits = generator.lm_head(hidden[:, 1:])
    assert torch.equal(generator(inputs(name)[0], condition)[0], logits[:, :-1])
    return logits


def test_fill_rule():
    for key, values in json.loads((GOLDENS / "fill_vectors.json").read_text()).items():
        name, shape, codebook = key.split("|")
        ours = value_for(name, tuple(map(int, shape.split("x"))), codebook.endswith("True"))
        np.testing.assert_allclose(ours.ravel(), values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", COVERED)
def test_every_golden_array_is_accounted_for(name):
    arrays = set(load(name)[1]["arrays"])
    assert COVERED[name] | NOT_COVERED[name] == arrays
    assert not COVERED[name] & NOT_COVERED[name]


@pytest.mark.parametrize("name", COVERED)
def test_logits(name):
    compare(name, "logits", full_logits(name, inputs(name)[1]))


def test_unconditional_logits():
    condition = filled("rear").generator.null_condition(inputs("rear")[1])
    compare("rear", "logits_uncond", full_logits("rear", condition))


def test_embedding_rows_of_conditions():
    """Classes stand behind codes and mask in the one table, the null class behind them."""
    for name in ("rear", "rar"):
        generator, labels = filled(name).generator, inputs(name)[1]
        compare(name, "condition", labels + generator.vocab_size + 1)
    compare("rear", "labels", inputs("rear")[1])
    generator = filled("rear").generator
    compare("rear", "none_condition", generator.null_condition(inputs("rear")[1]) + generator.vocab_size + 1)


@torch.inference_mode()
def head_outputs() -> dict[str, torch.Tensor]:
    """Heads on the full sequence, (3, N + 2, C)."""
    trainee = filled("rear")
    _, taps = trainee.generator(*inputs("rear"), tap_layers=tuple(spec.layer for spec in trainee.specs))
    return {spec.name: trainee.heads[spec.name](taps[spec.layer]) for spec in trainee.specs}


def test_heads():
    outputs = head_outputs()
    compare("rear", "encode_z", outputs["current"])
    compare("rear", "decode_z", outputs["next"])
    taps = filled("rear")(*inputs("rear")).taps
    torch.testing.assert_close(taps["current"], outputs["current"][:, 2:])  # where token i is read
    torch.testing.assert_close(taps["next"], outputs["next"][:, 1:-1])  # where token i is predicted


def released_alignment(predicted, features, keep=None):
    """The released -cos, from our 1 - cos: the constant is the share of positions that count."""
    share = 1.0 if keep is None else keep.float().mean()
    return codebook_alignment_loss(predicted, features, keep) - share


def test_losses():
    arrays, _ = load("rear")
    tokens, condition = inputs("rear")
    features = torch.from_numpy(arrays["features"])
    unmasked, masked = (torch.from_numpy(arrays[k]).bool() for k in ("perturb_mask", "fixed_perturb_mask"))
    assert not unmasked.any() and masked.any()
    prediction = filled("rear")(tokens, condition)
    cross_entropy = next_token_loss(prediction.logits, tokens)
    accuracy = next_token_accuracy(prediction.logits, tokens)
    for key, corrupted in (("loss_mask_none", unmasked), ("loss_mask_fixed", masked)):
        alignment = released_alignment(prediction.taps["current"], features, ~corrupted)
        alignment = alignment + released_alignment(prediction.taps["next"], features)
        compare("rear", key, torch.stack([cross_entropy + alignment, cross_entropy, alignment, accuracy]))
    # With one projection missing the released code counts the other one twice, once as the encode term (masked here).
    # Ours has one term per head: this is the sum of a masked and an unmasked one, [loss, cross-entropy, alignment].
    for key, name in (("loss_encode_only", "current"), ("loss_decode_only", "next")):
        predicted = prediction.taps[name]
        alignment = released_alignment(predicted, features, ~masked) + released_alignment(predicted, features)
        compare("rear", key, torch.stack([cross_entropy + alignment, cross_entropy, alignment]))


GENERATIONS = [
    (name, guidance, power) for name, scales in (("rear", (0, 4, 10)), ("rar", (0, 4, 16)))
    for guidance in scales for power in ("1", "2.75")
]  # fmt: skip


@pytest.mark.parametrize(("name", "guidance", "power"), GENERATIONS)
def test_greedy_generation(name, guidance, power):
    """The released sampler recomputes the prefix; ours reads the cache. Guidance 0 means off there, 1 here."""
    key = f"gen_g{guidance}_p{power}"
    margin = float(load(name)[0][f"{key}__min_margin"])
    assert margin > 1e-4, "the golden itself would be ambiguous"
    config = SamplerConfig(
        temperature=0, guidance_scale=float(guidance or 1), guidance_schedule="power_cosine",
        guidance_power=float(power),
    )  # fmt: skip
    tokens, _ = sample_tokens(filled(name).generator, inputs(name)[1], range(3), config)
    compare(name, key, tokens)


@pytest.mark.parametrize(("scale", "power"), [(10, 2.75), (4, 1)])
def test_guidance_schedule(scale, power):
    ours = [power_cosine_scale(scale, power, position, 16) for position in range(16)]
    np.testing.assert_allclose(ours, load("rear")[0][f"cfg_schedule_g{scale}_p{power}"], rtol=0, atol=1e-12)


SHAPES = {
    "rear_s": REAR_PRESETS["S"], "rear_b": REAR_PRESETS["B"], "rear_l": REAR_PRESETS["L"],
    "rar_b": ReARConfig(width=768, num_layers=24), "rar_l": ReARConfig(width=1024, num_layers=24),
    "rar_xl": ReARConfig(width=1280, num_layers=32),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_released_shapes(name):
    """Exactly the released keys and shapes, so that released weights load without renaming."""
    released = json.loads((GOLDENS / "manifests" / f"{name}.json").read_text())["state_dict"]
    with torch.device("meta"):
        generator = ReARGenerator(SHAPES[name].sized(1024, 256, 1000))
        heads = {}
        if name.startswith("rear"):
            code_dim = released["encode_align_mlp.4.weight"][0]
            spec = HeadSpec("current", 0, "current", code_dim, 3, released["encode_align_mlp.0.weight"][0])
            heads = {prefix: alignment_head(generator.width, spec) for prefix in OFFICIAL_HEADS.values()}
    ours = {key: list(value.shape) for key, value in generator.state_dict().items()}
    for prefix, head in heads.items():
        ours |= {prefix + key: list(value.shape) for key, value in head.state_dict().items()}
    assert ours == released
