"""A run is one `TrainConfig`: frozen dataclasses, a sentence per field, checked when made.

Files (YAML or JSON of the same shape) are read strictly: unknown keys and wrong types are refused with the key's path.
A file may name a recipe with `base:` and give only what differs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from consonar.config_io import from_dict, merge, to_dict
from consonar.data.bad_images import check_policy
from consonar.distributed import DEVICES, PRECISIONS
from consonar.errors import UserError, reading, unknown
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.janus import JanusConfig
from consonar.generators.llamagen import LlamaGenConfig
from consonar.generators.rear import ReARConfig
from consonar.options import check_options
from consonar.outside import check_extent
from consonar.perceptual import SMALLEST_INPUT
from consonar.seeding import check_seed
from consonar.tokenizers.vq import VQConfig
from consonar.training.alignment import AlignmentConfig
from consonar.training.baselines import CrossEntropyConfig, StraightThroughConfig
from consonar.training.objectives import ConsistencyConfig
from consonar.training.optim import OptimConfig
from consonar.training.policy_objective import PolicyConfig
from consonar.training.vq_objective import ReconstructionConfig

GeneratorConfig = ReARConfig | LlamaGenConfig | AliTokARConfig | JanusConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on: a token store for generators, an image source for tokenizers and for post-training."""

    tokens: str | None = None
    """Folder of the token store (made by `consonar tokenize`)."""
    views: str | None = None
    """The views that it must hold (`tokenize --views`); None: any."""
    validation_tokens: str | None = None
    """Folder of the token store used for validation; None: `TOKENS-validation` where there is one; "": none."""
    images: str | None = None
    """Image source, for tokenizers and post-training: openmoji, a folder, imagefolder:PATH, hf:owner/name."""
    validation_items: int = 0
    """Held-out items measured at every validation, drawn by seed evenly over all of them; 0: all."""
    classes: str | None = None
    """Text file that names class 0, 1, ... of the images, one a line; None: by their names (post-training)."""
    validation_split: str | None = None
    """Images to validate on: the name of a split, or a share of the training images held out by seed, such as 5%; None:
    the split validation where there is one, else for tokenizers 5%."""
    bad_images: str = "stop"
    """What is done about images that cannot be read: stop, or skip (leave them out and list them in bad-images.txt)."""
    bad_images_limit: float = 0.01
    """Share of images that may be left out before the run stops after all; one image may always be."""
    label_default: str | None = None
    """What images without a label become: the id or name of a class, or drop; None: refused (post-training)."""
    flip: bool = False
    """Mirror half of the images (image sources; token stores hold their views)."""

    def __post_init__(self) -> None:
        check_options(self, "data.")
        check_policy(self.bad_images, self.bad_images_limit, "data.bad_images", "data.bad_images_limit")
        split = self.validation_split or ""
        share = re.fullmatch(r"(\d+\.?\d*)%", split)
        if self.validation_split == "" or ("%" in split and not (share and 0 < float(share[1]) < 100)):
            raise UserError(f"data.validation_split: {split!r} is neither the name of a split nor a share such as 5%")
        if self.validation_items < 0:
            raise UserError(f"data.validation_items: {self.validation_items} is negative; 0 means all")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how often, on what."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 64
    """Images per optimiser step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches per step; divides the batch of one process."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 0
    """Steps between validations; 0: at the end only."""
    sample_every: int = 0
    """Steps between sample grids; 0: at the end only."""
    save_every: int = 500
    """Steps between resume checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Resume checkpoints kept."""
    fd_samples: int = 0
    """Images drawn at every validation for the Fréchet distance to the validation images (post-training); the model
    with the lowest one is kept in best/. 0: none."""
    ema_decay: float = 0.0
    """Decay of the moving average of weights that is validated and exported; 0: none."""
    precision: str = "auto"
    """auto (bf16 where the hardware has it), fp32 or bf16; parameters stay float32."""
    device: str = "auto"
    """auto, cpu or cuda."""
    compile: bool = False
    """Compile the generator's blocks."""
    trackers: tuple[str, ...] = ()
    """Copies of the metrics: tensorboard, wandb, trackio."""

    def __post_init__(self) -> None:
        check_options(self, "loop.")
        for key in ("steps", "batch_size", "accumulation", "log_every", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise UserError(f"loop.{key}: {getattr(self, key)} is not positive")
        for key in ("validate_every", "sample_every", "save_every", "fd_samples"):
            if getattr(self, key) < 0:
                raise UserError(f"loop.{key}: {getattr(self, key)} is negative")
        if self.fd_samples == 1:
            raise UserError("loop.fd_samples: a distance needs 2 samples or more, or 0 for none")
        for key, choices in (("device", DEVICES), ("precision", PRECISIONS)):
            if getattr(self, key) not in choices:
                raise unknown(f"loop.{key}", getattr(self, key), choices)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"loop.ema_decay: {self.ema_decay} is not in [0, 1)")
        if self.batch_size % self.accumulation:
            raise UserError(f"loop.accumulation: {self.accumulation} does not divide loop.batch_size {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, complete."""

    recipe: str
    """What the run is called in logs and reports."""
    init: str | None = None
    """Run or model folder of the generator to start from; None: from random weights."""
    tokenizer: str | None = None
    """Name or folder of the frozen tokenizer (generators only); None: that of `init`."""
    model: GeneratorConfig | VQConfig | None = field(default_factory=ReARConfig)
    """What is trained; None: the architecture of `init`."""
    objective: ConsistencyConfig | PolicyConfig | CrossEntropyConfig | StraightThroughConfig | ReconstructionConfig = (
        field(default_factory=ConsistencyConfig)
    )
    """What is minimised."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """The loop."""
    seed: int = 0
    """Every random number of the run derives from it."""

    def __post_init__(self) -> None:
        check_options(self, "")
        trains_generator = not isinstance(self.model, VQConfig)
        if trains_generator == isinstance(self.objective, ReconstructionConfig):
            fitting = "consistency, policy, cross_entropy, straight_through" if trains_generator else "reconstruction"
            kind = self.model.kind if self.model else "that of init"
            raise UserError(
                f"objective.kind: {self.objective.kind!r} does not train model.kind {kind!r}; choices: {fitting}"
            )
        if trains_generator and not self.aligns and not (self.tokenizer or self.init):
            raise UserError("tokenizer: a generator needs the name or folder of its tokenizer")
        if isinstance(self.objective, ReconstructionConfig) and isinstance(self.model, VQConfig):
            smallest = SMALLEST_INPUT[self.objective.perceptual]
            if self.objective.perceptual_weight > 0 and self.model.image_size < smallest:
                raise UserError(
                    f"objective.perceptual_weight: {self.objective.perceptual} reads images of {smallest} px or more, "
                    f"model.image_size is {self.model.image_size}; set it to 0"
                )
        check_seed(self.seed, "seed")

    @property
    def aligns(self) -> bool:
        """Whether this post-trains a generator with its tokenizer's decoder in view."""
        return isinstance(self.objective, AlignmentConfig)

    @property
    def reads_images(self) -> bool:
        """Whether the data are images and not tokens."""
        return self.aligns or isinstance(self.objective, ReconstructionConfig)


class ConfigLoader(yaml.SafeLoader):
    """Also reads 1e-4, which YAML 1.1 takes for text and JSON for a number; refuses a key that a table has twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key.value in [before.value for before in keys[:index]]:
                message = f"{key.value} is given twice in one table; keep one"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
        return super().construct_mapping(node, deep)


ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+"), list("-+0123456789"))


def read_config(path: Path) -> TrainConfig:
    """A YAML or JSON file of a `TrainConfig`, or of the changes to the recipe named under `base`."""
    from consonar.recipes import RECIPES, find_recipe

    with reading(path, "valid YAML"):
        values = yaml.load(path.read_text(encoding="utf-8"), ConfigLoader)
        check_extent(values)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a table of keys, got {type(values).__name__}")
    if "base" in values:
        base = values.pop("base")
        if not isinstance(base, str):
            raise UserError(f"{path}: base: expected the name of a recipe, got {base!r}")
        if base not in RECIPES:
            raise unknown(f"{path}: base: recipe", base, RECIPES)
        values = merge(to_dict(find_recipe(base)), {"recipe": path.stem, **values})
    return from_dict(values, str(path), TrainConfig)
