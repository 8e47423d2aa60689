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

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from consonar.convert.layouts import llamagen_vq as vq
from consonar.convert.layouts.official import Official, Shapes, State, num_indices
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
        for theirs, ours in self.generator.items():
            if key.startswith(theirs):
                return ours + key.removeprefix(theirs)
        return key

    def theirs(self, key: str) -> str:
        for theirs, ours in self.generator.items():
            if key.startswith(ours):
                return theirs + key.removeprefix(ours)
        return key

    def is_unused(self, key: str) -> bool:
        return key.startswith((*self.unused, self.tokenizer)) or key.endswith("rotary_emb.inv_freq")


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
    parts = {
        "generator": {key: value for key, value in state.items() if not key.startswith(prefixes)},
        "tokenizer": {key: value for key, value in state.items() if key.startswith(prefixes)},
    }
    return {name: part for name, part in parts.items() if part}


def generator_config(shapes: Mapping[str, tuple[int, ...]]) -> JanusConfig:
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
    markers = {layout.theirs(f"generation_{part}.weight") for part in ("embeddings", "aligner.fc1", "head.vision_head")}

    def to_ours(official: State, _: Any) -> tuple[State, State]:
        unused = {key: value for key, value in official.items() if layout.is_unused(key)}
        return {layout.ours(key): value for key, value in official.items() if key not in unused}, unused

    return Official(
        name=f"{layout.name} generator",
        component="generator",
        recognises=lambda shapes: shapes.keys() >= markers,
        config=lambda shapes: generator_config({layout.ours(key): shape for key, shape in shapes.items()}),
        to_ours=to_ours,
        to_official=lambda ours, unused, _: {**{layout.theirs(key): value for key, value in ours.items()}, **unused},
    )


def tokenizer_record(layout: Layout) -> Official:
    """The record of LlamaGen's tokenizer, under this layout's prefix and names."""

    def to_llamagen(key: str) -> str:
        key = key.removeprefix(layout.tokenizer)
        for theirs, llamagen in layout.blocks.items():
            key = key.replace(theirs, llamagen)
        return key

    def to_theirs(key: str) -> str:
        for theirs, llamagen in layout.blocks.items():
            key = key.replace(llamagen, theirs)
        return layout.tokenizer + key

    def renamed(shapes: Shapes) -> Shapes:
        return {to_llamagen(key): shape for key, shape in shapes.items()}

    def config(shapes: Shapes) -> VQConfig:
        return replace(vq.config_from_shapes(renamed(shapes)), image_size=IMAGE_SIZE)

    def to_ours(official: State, config: VQConfig) -> tuple[State, State]:
        return vq.OFFICIAL.to_ours({to_llamagen(key): value for key, value in official.items()}, config)

    def to_official(ours: State, unused: State, config: VQConfig) -> State:
        state = vq.OFFICIAL.to_official(ours, unused, config)
        return {to_theirs(key): value for key, value in state.items()}

    return Official(
        name=f"{layout.name} VQ tokenizer",
        component="tokenizer",
        recognises=lambda shapes: (
            all(key.startswith(layout.tokenizer) for key in shapes) and vq.OFFICIAL.recognises(renamed(shapes))
        ),
        config=config,
        to_ours=to_ours,
        to_official=to_official,
    )


OFFICIALS = (*map(generator_record, LAYOUTS), *map(tokenizer_record, LAYOUTS))
