"""LlamaGen's transformer against the authors' implementation: positions, logits, losses, filters, greedy sampling."""

import ast
import re
from dataclasses import replace

import torch
from fill import fill
from golden import Golden

from consonar.attention import attention_mask, rotate
from consonar.cpu.kernels import tune
from consonar.generators.llamagen import LlamaGenConfig, LlamaGenGenerator
from consonar.generators.rotary import RotaryGenerator
from consonar.sampling.sample import SamplerConfig, filter_logits, sample_tokens
from consonar.training.losses import next_token_loss
from consonar.types import Condition, Grid, TextCondition


def matches(meta: dict) -> bool:
    return meta["config"].get("cls") == "LlamaGen autoregressive.models.gpt.Transformer"


def filled(golden: Golden) -> LlamaGenGenerator:
    """The golden's model with its weights. The null caption is filled with as many rows as there are condition tokens,
    which are the first rows of the released 120."""
    arguments = golden.meta["config"]["ModelArgs"]
    width, is_text = arguments["dim"], arguments["model_type"] == "t2i"
    side = round(arguments["block_size"] ** 0.5)
    multiplier = arguments.get("ffn_dim_multiplier")
    multiple_of = arguments.get("multiple_of", 256)
    hidden = 0 if multiplier is None else -(int(multiplier * int(8 * width / 3)) // -multiple_of) * multiple_of
    config = LlamaGenConfig(
        width=width, num_layers=arguments["n_layer"], num_heads=arguments["n_head"],
        num_kv_heads=arguments.get("n_kv_head") or 0, multiple_of=multiple_of, ffn_width=hidden,
        norm_eps=arguments.get("norm_eps", 1e-5), rope_base=float(arguments.get("rope_base", 10000)),
        vocab_size=arguments["vocab_size"], num_tokens=side * side, grid=Grid(side, side),
        condition="text" if is_text else "class", num_condition_tokens=arguments["cls_token_num"],
        caption_dim=arguments.get("caption_dim", 2048) if is_text else 2048,
        num_classes=0 if is_text else arguments["num_classes"],
    )  # fmt: skip
    return fill(tune(LlamaGenGenerator(config))).eval()


def conditions_of(golden: Golden, generator: LlamaGenGenerator) -> tuple[Condition, Condition]:
    """Without and with the padding of captions hidden; class ids have none."""
    if generator.config.condition == "text":
        captions, kept = golden.tensor("caption"), golden.tensor("emb_masks").bool()
        return TextCondition(captions, torch.ones_like(kept)), TextCondition(captions, kept)
    labels = torch.tensor(class_ids(golden.meta["inputs"]["cond"], num_classes=generator.num_classes))
    return labels, labels


def class_ids(text: str, **names: int) -> list[int]:
    """The ids that the json gives as a list, with names for the number of classes: `[3,0,num_classes-1]`."""
    found = re.search(r"\[([^\]]*)\]", text)
    assert found, f"no list of class ids in {text!r}"
    ids = []
    for word in found[1].split(","):
        terms = re.fullmatch(r"\s*(\w+)\s*(?:([+-])\s*(\d+))?\s*", word)
        assert terms, f"class id {word!r} in {text!r}"
        first = names[terms[1]] if terms[1] in names else int(terms[1])
        ids.append(first + int(f"{terms[2]}{terms[3]}") if terms[3] else first)
    return ids


@torch.inference_mode()
def run(golden: Golden) -> None:
    generator = filled(golden)
    plain, masked = conditions_of(golden, generator)
    found = re.search(r"make_tokens\(\((\d+),", golden.meta["inputs"]["idx"])
    assert found, f"{golden.name}: input idx is {golden.meta['inputs']['idx']!r}"
    tokens = golden.make_tokens((int(found[1]), generator.num_tokens), generator.vocab_size)
    run_positions(golden, generator)
    run_logits(golden, generator, tokens, plain, masked)
    for key in golden.arrays:
        if key.startswith("gen_") and "__" not in key:
            golden.compare(key, greedy(golden, key, generator, plain, masked))
        if key.startswith("filter_probs_"):
            settings = ast.literal_eval(re.search(r"\{[^}]*\}", golden.meta["arrays"][key]["desc"])[0])
            logits = golden.tensor("filter_logits")[:, -1] / settings["temperature"]
            golden.compare(key, filter_logits(logits, settings["top_k"], settings["top_p"]).softmax(-1))
    for key in {"caption", "emb_masks", "rope_in", "filter_logits"} & golden.arrays.keys():
        golden.skip(key, "an input")


def run_positions(golden: Golden, generator: RotaryGenerator) -> None:
    table = generator.rotary_table(torch.device("cpu"))
    if "freqs_cis" in golden.arrays:
        golden.compare("freqs_cis", table)
    if "rope_in" in golden.arrays:
        vectors = golden.tensor("rope_in").transpose(1, 2)  # (B, H, P + N, E)
        golden.compare("rope_out", rotate(vectors, table).transpose(1, 2))


def run_logits(
    golden: Golden, generator: LlamaGenGenerator, tokens: torch.Tensor, plain: Condition, masked: Condition
) -> None:
    hidden, _ = generator.hidden_states(tokens, plain)
    whole, last = generator.output(hidden), generator.prefix_length - 1 + generator.num_tokens
    logits, _ = generator(tokens, plain)
    torch.testing.assert_close(logits, whole[:, generator.prefix_length - 1 : last], rtol=1e-4, atol=1e-4)
    trained, _ = generator(tokens, masked)
    unconditional, _ = generator(tokens, generator.null_condition(plain))
    found = {"logits_eval_full": whole, "logits_train": trained, "logits_eval_uncond": unconditional}
    if "train_mask" in golden.arrays:
        length = hidden.shape[1]
        mask = attention_mask(length, masked.mask, None, tokens.device)
        found["train_mask"] = mask.to(torch.uint8)
    found["loss_train"] = next_token_loss(trained, tokens)
    if "loss_train_valid" in golden.arrays:
        # The released weighting of images whose caption could be read, which is a matter of the data here.
        text = golden.meta["arrays"]["loss_train_valid"]["desc"]
        valid = torch.tensor(ast.literal_eval(re.search(r"\[.*?\]", text)[0])).bool()
        found["loss_train_valid"] = next_token_loss(trained[valid], tokens[valid])
    for key in found.keys() & golden.arrays.keys():
        golden.compare(key, found[key])


def greedy(golden: Golden, key: str, generator: LlamaGenGenerator, plain: Condition, masked: Condition) -> torch.Tensor:
    """`generate(cond, n, name=value, ...)` of the json through our cache and sampler, on the released settings."""
    text = golden.meta["arrays"][key]["desc"]
    settings = {name: float(value) for name, value in re.findall(r"(\w+)=(-?[\d.]+)", text)}
    scale, interval = settings.get("cfg_scale", 1.0), int(settings.get("cfg_interval", -1))
    # The released temperature does not move the most likely token; its scale guides above 1 alone.
    config = SamplerConfig(temperature=0)
    if scale > 1:
        config = replace(config, guidance_scale=scale)
        if interval != -1:
            config = replace(config, guidance_schedule="interval", guidance_interval=interval + 1)
    condition = masked if "emb_masks" in text else plain
    batch, length = golden.shape(key)
    tokens, _ = sample_tokens(generator, condition, range(batch), config, num_tokens=length)
    return tokens
