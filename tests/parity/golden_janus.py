"""Janus' generation parts and its VQ tokenizer against the authors', with the official keys."""

import golden_vq
import torch
from fill import value_for
from golden import Golden
from torch import Tensor

from consonar.convert.layouts import janus
from consonar.generators.janus import JanusConfig, JanusGenerator

CLASSES = ("vision_head, MlpProjector", "Janus janus.models.vq_model.VQModel")
AUTHORS_GENERATOR = janus.OFFICIALS[0]


def matches(meta: dict) -> bool:
    return (
        meta["config"].get("cls", "").startswith(("vision_head, MlpProjector", "Janus janus.models.vq_model.VQModel"))
    )


def filled(golden: Golden) -> JanusGenerator:
    """The golden's generation parts with their weights, around the smallest language model."""
    sizes = golden.meta["config"]
    config = JanusConfig(
        width=sizes["n_embed"], num_layers=1, num_heads=1, mlp_width=1, text_vocab_size=1, pad_token=0,
        code_dim=sizes["input_dim"], head_width=sizes["image_token_embed"], vocab_size=sizes["image_token_size"],
        num_tokens=golden.shape("prepare_gen_img_embeds")[1],
    )  # fmt: skip
    generator = JanusGenerator(config).eval()
    official = AUTHORS_GENERATOR.to_official(generator.state_dict(), {}, config)
    codebooks = golden.meta["codebook_keys"]
    weights = {
        key: torch.from_numpy(value_for(key, tuple(value.shape), key in codebooks)).float()
        for key, value in official.items()
    }
    generator.load_state_dict(AUTHORS_GENERATOR.to_ours(weights, config)[0])
    return generator


def run(golden: Golden) -> None:
    if "VQModel" in golden.meta["config"]["cls"]:
        return golden_vq.run(golden)
    generator = filled(golden)
    tokens = golden.make_tokens(golden.shape("prepare_gen_img_embeds")[:2], generator.vocab_size)
    with torch.inference_mode():
        golden.compare("gen_head", generator.generation_head(golden.tensor("hidden")))
        embeddings = generator.generation_aligner(generator.generation_embeddings(tokens))
        golden.compare("prepare_gen_img_embeds", embeddings)
    golden.skip("hidden", "an input")
    if "toy_tf_logits_official" in golden.arrays:
        compare_toy(golden, generator, embeddings.clone())
    return None


def compare_toy(golden: Golden, generator: JanusGenerator, embeddings: Tensor) -> None:
    """VA-pi's trainer on a toy language model: the mean of everything read, prompt and image tokens alike.

    The toy's table of prompt embeddings is in no file, so their sum, one vector per row, is solved for. It has to
    explain the logits of every slot: it does where slot i has read token i, as the released trainer has it, and not
    where slot i has read the tokens before i, as ours.
    """
    golden.skip("toy_prompt", "an input, through a table of embeddings that is not in the golden")
    target = golden.tensor("toy_tf_logits_official")
    tolerance = golden.meta["tolerance"]["tol"] * max(1.0, float(target.abs().max()))
    prompt_length = golden.shape("toy_prompt")[1]
    misaligned = explain(generator, embeddings, target, prompt_length, own_token=True)
    golden.compare("toy_tf_logits_official", misaligned)
    aligned = explain(generator, embeddings, target, prompt_length, own_token=False)
    error = float((aligned - target).abs().max())
    assert error > 100 * tolerance, f"{golden.name}: the slots of the released trainer look aligned (error {error:.3g})"


def explain(
    generator: JanusGenerator, embeddings: Tensor, target: Tensor, prompt_length: int, *, own_token: bool
) -> Tensor:
    """Logits (B, n, V) of running means over an unknown prompt and the image embeddings (B, n, D), nearest `target`."""
    count = embeddings.shape[1]
    read = embeddings.double().cumsum(1)
    if not own_token:
        read = torch.cat([torch.zeros_like(read[:, :1]), read[:, :-1]], 1)
    places = torch.arange(count) + prompt_length + own_token  # how many vectors slot i has read
    head = generator.generation_head.double()
    prompt = torch.zeros(len(read), read.shape[2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [prompt], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def logits() -> Tensor:
        return head((prompt[:, None] + read) / places[:, None])

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (logits() - target).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return logits().detach()
