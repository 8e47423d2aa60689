"""Files of Janus and Janus-Pro (arXiv 2410.13848, 2501.17811), in the authors' layout and in that of transformers.

One file holds three models: a language model that generates, with its image embeddings, aligner and head; a vision
encoder for understanding, which we set aside with its aligner and the text head; and LlamaGen's VQ tokenizer, under a
prefix. `split_parts` separates the tokenizer from the rest. Our keys of the generator are those of transformers'
`JanusModel`, our keys of the tokenizer LlamaGen's. transformers' own conversion drops the tokenizer's log of code usage
(`codebook_used`), so a file in its layout has none; and its tokenizer searches for codes without normalising them,
unlike the authors' and ours.

What the shapes cannot say, as published: heads 128 wide, rotary base 10000, RMSNorm epsilon 1e-6, the padding token (in
a text vocabulary that ends before it, the last one), images of 384 pixels (576 tokens). A file of the generation parts
alone, without a language model, has the language model of the released Janus-Pro of its width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from consonar.convert.layouts.official import Official, Shapes, State, has, num_indices, set_aside
from consonar.convert.layouts.tokenizers import LLAMAGEN as LLAMAGEN_VQ
from consonar.convert.layouts.tokenizers import llamagen_config as llamagen_vq_config
from consonar.errors import UserError
from consonar.generators.janus import JANUS_PRESETS, PAD_TOKEN, JanusConfig
from consonar.tokenizers.vq import VQConfig

IMAGE_SIZE, NUM_TOKENS, HEAD_WIDTH = 384, 576, 128
Value = TypeVar("Value")


@dataclass(frozen=True)
class Layout:
    """How a file names things."""

    name: str
    generator: Mapping[str, str]
    """Prefix of its keys to ours."""
    unused: tuple[str, ...]
    """Prefixes, and of rotary tables suffixes, of what the generator does not need."""
    tokenizer: str
    """Prefix of the tokenizer's keys."""
    blocks: Mapping[str, str]
    """Parts of its keys of the tokenizer to LlamaGen's."""

    def ours(self, key: str) -> str:
        """Our name of one of its keys; a key that it does not have stays."""
        return with_prefix(self.generator, key)

    def theirs(self, key: str) -> str:
        return with_prefix({ours: theirs for theirs, ours in self.generator.items()}, key)

    def is_unused(self, key: str) -> bool:
        return key.startswith((*self.unused, self.tokenizer)) or key.endswith("rotary_emb.inv_freq")


def renamed(parts: Iterable[tuple[str, str]], key: str) -> str:
    """The key with every part of the pairs replaced by the other one."""
    for old, new in parts:
        key = key.replace(old, new)
    return key


def with_prefix(prefixes: Mapping[str, str], key: str) -> str:
    """The key with the first prefix of the table that it has replaced by its value."""
    return next((new + key.removeprefix(old) for old, new in prefixes.items() if key.startswith(old)), key)


AUTHORS = Layout(
    name="Janus",
    generator={
        "language_model.model.": "language_model.",
        "gen_embed.": "generation_embeddings.",
        "gen_aligner.layers.0.": "generation_aligner.fc1.",
        "gen_aligner.layers.2.": "generation_aligner.hidden_layers.0.",
        "gen_head.output_mlp_projector.": "generation_head.proj_out.",
        "gen_head.vision_head.": "generation_head.vision_head.",
    },
    unused=("language_model.lm_head.", "vision_model.", "aligner."),
    tokenizer="gen_vision_model.",
    blocks={},
)
TRANSFORMERS = Layout(
    name="Janus (transformers)",
    generator={
        f"model.{part}.": f"{part}."
        for part in ("language_model", "generation_embeddings", "generation_aligner", "generation_head")
    },
    unused=("lm_head.", "model.vision_model.", "model.aligner."),
    tokenizer="model.vqmodel.",
    blocks={
        "encoder.down.": "encoder.conv_blocks.",
        "decoder.up.": "decoder.conv_blocks.",
        ".block.": ".res.",
        ".mid.block_1.": ".mid.0.",
        ".mid.attn_1.": ".mid.1.",
        ".mid.block_2.": ".mid.2.",
    },
)
LAYOUTS = (AUTHORS, TRANSFORMERS)


def split_parts(state: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """The `generator` and the `tokenizer` of a whole file (tensors or shapes), under its own keys; absent ones are not.

    Every key is in one part, so that the file is the union of both.
    """
    prefixes = tuple(layout.tokenizer for layout in LAYOUTS)
    parts: dict[str, dict[str, Value]] = {}
    for key, value in state.items():
        parts.setdefault("tokenizer" if key.startswith(prefixes) else "generator", {})[key] = value
    return parts


def generator_config(shapes: Shapes) -> JanusConfig:
    """From our keys and their shapes."""
    width, code_dim = shapes["generation_aligner.fc1.weight"]
    head_width = shapes["generation_head.proj_out.weight"][0]
    image: dict[str, Any] = {
        "code_dim": code_dim,
        "head_width": 0 if head_width == width else head_width,
        "vocab_size": shapes["generation_embeddings.weight"][0],
        "num_tokens": NUM_TOKENS,
    }
    if "language_model.embed_tokens.weight" not in shapes:
        known = {preset.width: preset for preset in JANUS_PRESETS.values()}
        if width not in known:
            raise UserError(f"language_model: none in the file, and no released Janus-Pro is {width} wide")
        return replace(known[width], **image)
    if width % HEAD_WIDTH:
        raise UserError(f"language_model: {width} wide, not a multiple of the {HEAD_WIDTH} of a head of Janus")
    num_heads = width // HEAD_WIDTH
    text_vocab_size = shapes["language_model.embed_tokens.weight"][0]
    num_kv_heads = shapes["language_model.layers.0.self_attn.k_proj.weight"][0] // HEAD_WIDTH
    return JanusConfig(
        width=width,
        num_layers=num_indices(shapes, "language_model.layers."),
        num_heads=num_heads,
        num_kv_heads=0 if num_kv_heads == num_heads else num_kv_heads,
        mlp_width=shapes["language_model.layers.0.mlp.gate_proj.weight"][0],
        text_vocab_size=text_vocab_size,
        pad_token=min(PAD_TOKEN, text_vocab_size - 1),
        **image,
    )


def generator_record(layout: Layout) -> Official:
    markers = [layout.theirs(f"generation_{part}.weight") for part in ("embeddings", "aligner.fc1", "head.vision_head")]
    split = set_aside(layout.is_unused)

    def to_ours(official: State, config: JanusConfig) -> tuple[State, State]:
        ours, unused = split(official, config)
        return {layout.ours(key): value for key, value in ours.items()}, unused

    return Official(
        f"{layout.name} generator",
        "generator",
        has(*markers),
        lambda shapes: generator_config({layout.ours(key): shape for key, shape in shapes.items()}),
        to_ours,
        lambda ours, unused, _: {**{layout.theirs(key): value for key, value in ours.items()}, **unused},
    )


def tokenizer_record(layout: Layout) -> Official:
    """The record of LlamaGen's tokenizer, under this layout's prefix and names."""

    def to_llamagen(state: Mapping[str, Value]) -> dict[str, Value]:
        pairs = layout.blocks.items()
        return {renamed(pairs, key.removeprefix(layout.tokenizer)): value for key, value in state.items()}

    def to_official(ours: State, unused: State, config: VQConfig) -> State:
        pairs = [(llamagen, theirs) for theirs, llamagen in layout.blocks.items()]
        official = LLAMAGEN_VQ.to_official(ours, unused, config)
        return {layout.tokenizer + renamed(pairs, key): value for key, value in official.items()}

    return Official(
        f"{layout.name} VQ tokenizer",
        "tokenizer",
        lambda shapes: (
            all(key.startswith(layout.tokenizer) for key in shapes) and LLAMAGEN_VQ.recognises(to_llamagen(shapes))
        ),
        lambda shapes: replace(llamagen_vq_config(to_llamagen(shapes)), image_size=IMAGE_SIZE),
        lambda official, config: LLAMAGEN_VQ.to_ours(to_llamagen(official), config),
        to_official,
    )


OFFICIALS = (*map(generator_record, LAYOUTS), *map(tokenizer_record, LAYOUTS))
