"""What a run is of, before anything of it is there: shapes of folders that exist, else of the released models."""

from dataclasses import replace

import torch

from consonar.data.store_format import read_metadata
from consonar.errors import UserError, no_folder
from consonar.files.readers import home_expanded
from consonar.generators import GENERATORS
from consonar.generators.alitok import ALITOK_PRESETS
from consonar.generators.base import GeneratorConfig
from consonar.generators.janus import JANUS_PRESETS
from consonar.generators.llamagen import LLAMAGEN_PRESETS
from consonar.generators.rear import REAR_PRESETS
from consonar.hub import PREFIX
from consonar.model_folders import SHIPPED, read_settings, shipped_or_folder
from consonar.planning.update import Shapes
from consonar.tokenizers import TOKENIZERS, alitok, resized, titok, vit, vq, vqgan
from consonar.tokenizers.base import CodebookTokenizer, TokenizerConfig
from consonar.training.config import TrainConfig
from consonar.types import Grid

LLAMAGEN_VQ = vq.VQConfig(
    image_size=256, vocab_size=16384, base_channels=128, channel_multipliers=(1, 1, 2, 2, 4), num_res_blocks=2,
    latent_channels=256,
)  # fmt: skip
TOKENIZERS_BY_NAME: dict[str, TokenizerConfig] = {
    "llamagen-vq16-c2i": LLAMAGEN_VQ,
    "llamagen-vq8-c2i": replace(LLAMAGEN_VQ, channel_multipliers=(1, 2, 2, 4)),
    "maskgit-vq": vqgan.MaskGITConfig(),
    "vqgan-plus-12bit": vqgan.VQGANPlusConfig(),
    "titok-b64": titok.TiTokConfig(num_tokens=64, encoder=vit.BASE, decoder=vit.BASE),
    "alitok": alitok.AliTokConfig(),
    "llamagen-vq16-t2i": LLAMAGEN_VQ,
    "janus-pro-vq": replace(LLAMAGEN_VQ, image_size=384),
}
"""Shapes of released tokenizers by the names of `hub`, at 256 px; Janus' at 384."""
GENERATORS_BY_NAME: dict[str, tuple[GeneratorConfig, str]] = {
    **{f"rear-{size.lower()}": (REAR_PRESETS[size].sized(1024, 256, 1000), "maskgit-vq") for size in "SBL"},
    **{
        f"llamagen-c2i-{size.lower()}-384": (
            LLAMAGEN_PRESETS[size].sized(16384, 576, 1000, Grid(24, 24)),
            "llamagen-vq16-c2i",
        )
        for size in ("B", "L", "XL", "XXL", "3B")
    },
    **{
        f"alitok-{size.lower()}": (ALITOK_PRESETS[size].sized(4096, 273, 1000, Grid(16, 16, 17)), "alitok")
        for size in ALITOK_PRESETS
    },
    "llamagen-t2i-xl-256": (
        replace(LLAMAGEN_PRESETS["XL"], condition="text").sized(16384, 256, 0, Grid(16, 16)),
        "llamagen-vq16-t2i",
    ),
    "janus-pro-1b": (JANUS_PRESETS["1B"].sized(16384, 576, 0), "janus-pro-vq"),
}
"""Shapes of released generators by the names of `hub`, and their tokenizers."""
FOLDERS = {
    "models/maskgit-vqgan": "maskgit-vq", "models/vqgan-plus-12bit": "vqgan-plus-12bit",
    "models/titok-b64": "titok-b64", "models/alitok": "alitok",
}  # fmt: skip
"""The released tokenizers in the folders that recipes name."""
STARTS = {
    "vapi-llamagen-xxl": "llamagen-c2i-xxl-384", "vapi-llamagen-xl": "llamagen-c2i-xl-384",
    **dict.fromkeys(("vapi-llamagen-t2i", "ce-llamagen-t2i"), "llamagen-t2i-xl-256"),
    **dict.fromkeys(("vapi-janus-1b", "ce-janus-1b"), "janus-pro-1b"),
}  # fmt: skip
"""The released generators that recipes of published rows start from."""
CLASSES = 1000
"""ImageNet's, where nothing says how many."""


def shapes_of(config: TrainConfig, num_classes: int | None) -> tuple[TrainConfig, Shapes, list[str]]:
    """The configuration with its model, the shapes, and what was assumed. `UserError` for what has no known shape."""
    if config.run == "tokenizer":
        assert isinstance(config.model, TokenizerConfig)  # its configuration is not valid without
        return config, Shapes(config.model), []
    assumed: list[str] = []
    model, own = config.model, None
    if init := config.init or STARTS.get(config.recipe):
        stored, own = start_shape(init, assumed)
        model = stored if model is None or config.run == "post-training" else model
    if not isinstance(model, GeneratorConfig) or (init is None and config.run == "post-training"):
        raise UserError(f"init: {config.recipe!r} starts from a trained generator; name it, e.g. --init openmoji")
    check_condition(config, model)
    if (name := config.tokenizer or own) is None:
        raise UserError(f"tokenizer: {init} does not say which tokenizer it goes with; add --tokenizer")
    shape = tokenizer_shape(name, model.num_tokens, assumed)
    tokenizer = tokenizer_of(shape)
    classes = vars(model).get("num_classes") or num_classes or classes_of_store(config.data.tokens)
    if classes is None and model.has_classes:
        assumed.append(f"{CLASSES} classes (--num-classes says another number)")
    model = model.sized(tokenizer.vocab_size, tokenizer.num_tokens, classes or CLASSES, grid=tokenizer.grid)
    heads = config.objective.head_specs(model.num_layers, tokenizer.code_dim)
    return replace(config, model=model, init=init), Shapes(shape, model, heads), assumed


def check_condition(config: TrainConfig, model: GeneratorConfig) -> None:
    """Raises `UserError` where the recipe has captions and the generator takes classes, or the other way round."""
    usual = STARTS.get(config.recipe)
    if usual and model.has_classes != GENERATORS_BY_NAME[usual][0].has_classes:
        takes, has = ("classes", "captions") if model.has_classes else ("captions", "classes")
        raise UserError(f"init: {config.init!r} takes {takes}, and {config.recipe} has {has}; e.g. --init hf:{usual}")


def tokenizer_of(shape: TokenizerConfig) -> CodebookTokenizer:
    """The tokenizer of this shape, on the meta device."""
    with torch.device("meta"):
        return TOKENIZERS[shape.kind].model(shape, name="tokenizer")


def is_here(name: str, what: str) -> bool:
    return name in SHIPPED[what] or home_expanded(name).is_dir()


def start_shape(name: str, assumed: list[str]) -> tuple[GeneratorConfig, str | None]:
    """The shape of the generator to start from, and its tokenizer."""
    if is_here(name, "generator"):
        _, origin, shape, _ = read_settings(shipped_or_folder("generator", name), "generator", GENERATORS)
        return shape, origin.tokenizer
    known = name.removeprefix(PREFIX)
    if known not in GENERATORS_BY_NAME:
        raise no_folder(
            "init", name, [*SHIPPED["generator"], "a run folder", *(f"{PREFIX}{n}" for n in GENERATORS_BY_NAME)]
        )
    assumed.append(f"the start model is the released {known}")
    shape, tokenizer = GENERATORS_BY_NAME[known]
    return shape, f"{PREFIX}{tokenizer}"


def tokenizer_shape(name: str, num_tokens: int, assumed: list[str]) -> TokenizerConfig:
    """The shape of a tokenizer, for images of so many tokens where it takes any (0: its own)."""
    if is_here(name, "tokenizer"):
        _, _, shape, _ = read_settings(shipped_or_folder("tokenizer", name), "tokenizer", TOKENIZERS)
    else:
        known = FOLDERS.get(name, name.removeprefix(PREFIX).partition("@")[0])
        if known not in TOKENIZERS_BY_NAME:
            raise no_folder(
                "tokenizer", name, [*SHIPPED["tokenizer"], "a folder", *(f"{PREFIX}{n}" for n in TOKENIZERS_BY_NAME)]
            )
        shape = TOKENIZERS_BY_NAME[known]
        if name in FOLDERS:
            assumed.append(f"{name} is the released {known}")
    if num_tokens:
        shape = resized(shape, num_tokens)
    assert isinstance(shape, TokenizerConfig)  # those of `TOKENIZERS` are
    return shape


def classes_of_store(tokens: str | None) -> int | None:
    """How many classes a token store has; None where there is none yet."""
    folder = home_expanded(tokens) if tokens else None
    return read_metadata(folder).num_classes if folder and folder.is_dir() else None
