"""reAR and RAR against the authors' implementations: logits, alignment heads, losses, greedy sampling, schedules.

RAR's randomised orders are a training method that this library does not have, but a permuted sequence is a sequence in
raster order of a model whose position tables are permuted: so its logits are compared too.
"""

import re
from dataclasses import replace

import numpy as np
import torch
from fill import fill
from golden import Golden
from torch.func import functional_call

from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.sampling.sample import SamplerConfig, power_cosine_scale, sample_tokens
from consonar.training.losses import codebook_alignment_loss, next_token_accuracy, next_token_loss
from consonar.training.noise import corrupt_tokens
from consonar.training.trainee import HeadSpec, Trainee

CLASSES = ("reAR modeling.rear.reAR", "1d-tokenizer modeling.rar.RAR")
# Our head names and the official modules.
OFFICIAL_HEADS = {"current": "encode_align_mlp.", "next": "decode_align_mlp."}
Z_KEYS = {"current": "encode_z", "next": "decode_z"}


def matches(meta: dict) -> bool:
    return meta["config"].get("cls") in CLASSES


def filled(golden: Golden) -> Trainee:
    """The golden's model with its weights; the official key of a head is that of its official module."""
    settings = golden.meta["config"]["model"]
    shape = settings["generator"]
    config = ReARConfig(
        width=shape["hidden_size"], num_layers=shape["num_hidden_layers"], num_heads=shape["num_attention_heads"],
        mlp_ratio=shape["intermediate_size"] / shape["hidden_size"], dropout=shape["dropout"],
        vocab_size=settings["vq_model"]["codebook_size"], num_tokens=shape["image_seq_len"],
        num_classes=shape["condition_num_classes"],
    )  # fmt: skip
    specs = []
    if shape.get("transition_alignment"):
        layers = {"current": shape["encode_align_layer_idx"], "next": shape["decode_align_layer_idx"]}
        depth, width = shape.get("z_dim", 256), shape.get("projection_dim", 2048)
        specs = [HeadSpec(name, layers[name], name, depth, 3, width) for name in OFFICIAL_HEADS]
    trainee = Trainee(ReARGenerator(config), tuple(specs)).eval()
    fill(trainee.generator)
    for head, prefix in OFFICIAL_HEADS.items():
        if head in trainee.heads:
            fill(trainee.heads[head], prefix=prefix)
    return trainee


def labels_of(golden: Golden, generator: ReARGenerator) -> torch.Tensor:
    """The class ids that the json gives as a list, with NC for the number of classes."""
    found = re.search(r"\[([^\]]*)\]", golden.meta["inputs"]["labels"])
    assert found, f"{golden.name}: no list of class ids in {golden.meta['inputs']['labels']!r}"
    ids = [re.sub(r"\bNC\b", str(generator.num_classes), word.strip()) for word in found[1].split(",")]
    return torch.tensor([sum(int(term) for term in re.findall(r"[+-]?\d+", text)) for text in ids])


@torch.inference_mode()
def full_logits(generator: ReARGenerator, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Logits of every position but cls, the unused last one included: (B, N + 1, V)."""
    hidden, _ = generator.hidden_states(tokens, condition)
    logits = generator.lm_head(hidden[:, 1:])
    torch.testing.assert_close(generator(tokens, condition)[0], logits[:, :-1], rtol=1e-4, atol=1e-4)
    return logits


def ordered_logits(
    generator: ReARGenerator, tokens: torch.Tensor, labels: torch.Tensor, orders: torch.Tensor
) -> torch.Tensor:
    """Logits of `tokens`, already in order, when token i stands at place orders[b, i]: one set of tables per image."""
    rows = []
    for b, order in enumerate(orders):
        tables = {}
        for key in ("pos_embed", "target_aware_pos_embed"):
            table = getattr(generator, key).detach().clone()
            table[:, 2 : 2 + len(order)] = table[:, 2 + order]
            tables[key] = table
        swapped = {**generator.state_dict(), **tables}

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.generator = generator

            def forward(self, row: int) -> torch.Tensor:
                return full_logits(self.generator, tokens[row : row + 1], labels[row : row + 1])

        rows.append(functional_call(Logits(), {f"generator.{k}": v for k, v in swapped.items()}, (b,)))
    return torch.cat(rows)


def run(golden: Golden) -> None:
    trainee = filled(golden)
    generator = trainee.generator
    labels = labels_of(golden, generator)
    tokens = golden.make_tokens((len(labels), generator.num_tokens), generator.vocab_size)
    keys = set(golden.meta["arrays"])
    golden.compare("logits", full_logits(generator, tokens, labels))
    # Classes stand behind codes and mask in the one table, the null class behind them.
    null = generator.null_condition(labels)
    ids = {"labels": labels, "condition": labels + generator.vocab_size + 1}
    ids["none_condition"] = null + generator.vocab_size + 1
    for key in keys & set(ids):
        golden.compare(key, ids[key])
    if "logits_uncond" in keys:
        golden.compare("logits_uncond", full_logits(generator, tokens, null))
    if "orders" in keys:
        orders = golden.tensor("orders")
        ordered = tokens.gather(1, orders)
        golden.compare("labels_orders", ordered)
        golden.compare("logits_orders", ordered_logits(generator, ordered, labels, orders))
        golden.skip("orders", "an input")
    compare_heads(golden, trainee, tokens, labels)
    if "features" in keys:
        compare_losses(golden, trainee, tokens, labels)
    compare_sampling(golden, generator, labels)


@torch.inference_mode()
def compare_heads(golden: Golden, trainee: Trainee, tokens: torch.Tensor, labels: torch.Tensor) -> None:
    """Heads on the full sequence (B, N + 2, C), and the rows of them that the losses read."""
    if "perturb_mask" in golden.meta["arrays"]:
        rates, rng = torch.zeros(len(tokens)), torch.Generator().manual_seed(0)
        context, corrupted = corrupt_tokens(tokens, rates, trainee.generator.vocab_size, rng)
        assert torch.equal(context, tokens)
        golden.compare("perturb_mask", corrupted)
    _, hidden = trainee.generator(tokens, labels, tap_layers=tuple(spec.layer for spec in trainee.specs))
    taps = trainee(tokens, labels).taps
    rows = {"current": slice(2, None), "next": slice(1, -1)}  # where token i is read, and where it is predicted
    for spec in trainee.specs:
        if Z_KEYS[spec.name] in golden.meta["arrays"]:
            output = trainee.heads[spec.name](hidden[spec.layer])
            golden.compare(Z_KEYS[spec.name], output)
            torch.testing.assert_close(taps[spec.name], output[:, rows[spec.name]], rtol=1e-4, atol=1e-4)


def released_alignment(predicted: torch.Tensor, features: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The released -cos, from our 1 - cos: the constant is the share of positions that count."""
    return codebook_alignment_loss(predicted, features, keep) - keep.float().mean()


@torch.inference_mode()
def compare_losses(golden: Golden, trainee: Trainee, tokens: torch.Tensor, labels: torch.Tensor) -> None:
    features = golden.tensor("features")
    fixed = golden.tensor("fixed_perturb_mask").bool()
    golden.skip("features", "an input")
    golden.skip("fixed_perturb_mask", "an input")
    weight = golden.meta["config"]["model"]["generator"].get("transition_alignment_weight", 1.0)
    prediction = trainee(tokens, labels)
    cross_entropy = next_token_loss(prediction.logits, tokens)
    accuracy = next_token_accuracy(prediction.logits, tokens)
    everywhere = torch.ones_like(fixed)
    for key, corrupted in (("loss_mask_none", ~everywhere), ("loss_mask_fixed", fixed)):
        encode = released_alignment(prediction.taps["current"], features, ~corrupted)
        alignment = encode + released_alignment(prediction.taps["next"], features, everywhere)
        golden.compare(key, torch.stack([cross_entropy + weight * alignment, cross_entropy, alignment, accuracy]))
    # With one projection missing the released code counts the other one twice, once as the encode term (masked here).
    # Ours has one term per head: this is the sum of a masked and an unmasked one, [loss, cross-entropy, alignment].
    for key, name in (("loss_encode_only", "current"), ("loss_decode_only", "next")):
        predicted = prediction.taps[name]
        alignment = released_alignment(predicted, features, ~fixed)
        alignment = alignment + released_alignment(predicted, features, everywhere)
        golden.compare(key, torch.stack([cross_entropy + weight * alignment, cross_entropy, alignment]))


def compare_sampling(golden: Golden, generator: ReARGenerator, labels: torch.Tensor) -> None:
    """Greedy tokens through our cache (the released reAR sampler recomputes the prefix), and the schedule alone.

    Guidance 0 means off there, 1 here.
    """
    for key in golden.meta["arrays"]:
        if found := re.fullmatch(r"cfg_schedule_g([\d.]+)_p([\d.]+)", key):
            steps = golden.shape(key)[0]
            scale, power = float(found[1]), float(found[2])
            ours = [power_cosine_scale(scale, power, position, steps) for position in range(steps)]
            golden.compare(key, np.array(ours), tol=1e-12)
        elif found := re.fullmatch(r"gen_g([\d.]+)_p([\d.]+)", key):
            if float(golden.arrays[f"{key}__min_margin"]) <= 1e-4:
                golden.skip(key, "two tokens are equally likely in the golden itself")
                continue
            config, scale = SamplerConfig(temperature=0), float(found[1])
            if scale not in (0, 1):  # 0 means off there, 1 here
                schedule = {"guidance_schedule": "power_cosine", "guidance_power": float(found[2])}
                config = replace(config, guidance_scale=scale, **schedule)
            tokens, _ = sample_tokens(generator, labels, range(len(labels)), config)
            golden.compare(key, tokens)
