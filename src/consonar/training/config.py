"""A run is one `TrainConfig`: frozen dataclasses, a sentence per field, checked when made."""

from dataclasses import dataclass, field
from typing import Annotated

from consonar.data.bad_images import POLICIES
from consonar.data.splits import share_of
from consonar.data.transforms import VIEWS
from consonar.distributed import DEVICES, World, from_main
from consonar.errors import UserError
from consonar.generators import GENERATORS
from consonar.generators.base import GeneratorConfig
from consonar.generators.rear import ReARConfig
from consonar.options import (
    Count,
    CountOrZero,
    Divides,
    OneOf,
    Options,
    Positive,
    Range,
    ReadOnlyWith,
    ShareBelowOne,
    check_left,
)
from consonar.parallel import ParallelConfig
from consonar.precision import CHOICES, pick_precision
from consonar.tokenizers import TOKENIZERS
from consonar.training.lora import LoRAConfig
from consonar.training.objectives import kinds, method_of_config
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.base import ObjectiveConfig
from consonar.training.optim import OptimConfig
from consonar.types import ModelConfig

SKIPPING = ReadOnlyWith(lambda given: given.bad_images == "skip", "{}bad_images 'skip'")
SEVERAL = ReadOnlyWith(lambda given: "," in (given.tokens or ""), "several stores in {}tokens")
VALIDATED = ReadOnlyWith(lambda given: given.validation_tokens != "", "a {}validation_tokens that is not ''")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    """What is trained on: a token store for generators, an image source for tokenizers and for post-training."""

    section = "data"

    tokens: str | None = None
    """Folder of the token store (made by `consonar tokenize`); A,B reads several."""
    weights: Annotated[tuple[Positive, ...], SEVERAL] = ()
    """Share of the items that each of several stores gives, such as 0.7 0.3; (): every item is equally likely."""
    views: Annotated[str | None, OneOf(tuple(VIEWS))] = None
    """The views that it must hold (`tokenize --views`); None: any."""
    validation_tokens: str | None = None
    """Folder of the token store used for validation, or A,B; None: `TOKENS-validation` where there is one (of each of
    several stores); "": none."""
    images: str | None = None
    """Image source, for tokenizers and post-training: openmoji, scenes, cifar10, a folder, hf: (docs/data.md)."""
    validation_items: Annotated[int, Range(0, note="0 means all"), VALIDATED] = 0
    """Held-out items measured at every validation, drawn by seed evenly over all of them; 0: all."""
    classes: str | None = None
    """Text file that names class 0, 1, ... of the images, one a line, or imagenet; None: by their names
    (post-training)."""
    validation_split: str | None = None
    """Images to validate on: the name of a split, or a share of those to train on that is held out, such as 5% (0%:
    none); None: the split validation, else test, else 5%."""
    bad_images: Annotated[str, OneOf(POLICIES)] = "stop"
    """What is done about images that cannot be read: stop, or skip (leave them out and list them in bad-images.txt)."""
    bad_images_limit: Annotated[float, Range(0, 1), SKIPPING] = 0.01
    """Share of images that may be left out before the run stops after all; one image may always be."""
    label_default: str | None = None
    """What images without a label become: the id or name of a class, or drop; None: refused (post-training)."""
    flip: bool = False
    """Mirror half of the images (image sources; token stores hold their views)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        share_of(self.validation_split, "data.validation_split")


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Options):
    """How long, how often, on what."""

    section = "loop"

    steps: Count = 1000
    """Optimiser steps."""
    batch_size: Count = 64
    """Images per optimiser step, over all processes and micro-batches."""
    accumulation: Annotated[Count, Divides("batch_size")] = 1
    """Micro-batches per step; divides the batch of one process."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: CountOrZero = 0
    """Steps between validations; 0: at the end only."""
    sample_every: CountOrZero = 0
    """Steps between sample grids; 0: at the end only."""
    save_every: CountOrZero = 500
    """Steps between resume checkpoints; 0: at the end only."""
    keep_checkpoints: Count = 2
    """Resume checkpoints kept."""
    async_save: bool = True
    """Write checkpoints beside the steps that follow. Without, these wait, and no kill loses more than an interval."""
    fd_samples: Annotated[int, Range(2, or_zero=True, note="a distance needs 2 samples")] = 0
    """Images drawn at every validation for the Fréchet distance to the validation images (post-training); the model
    with the lowest one is kept in best/. 0: none."""
    keep_best: bool = False
    """Keep the model of the best validation in best/, by cross-entropy (tokens) or PSNR (tokenizers)."""
    ema_decay: ShareBelowOne = 0.0
    """Decay of the moving average of weights that is validated and exported; 0: none."""
    precision: Annotated[str, OneOf(CHOICES)] = "auto"
    """auto (bf16 where the hardware has it), fp32, tf32 or bf16; parameters stay float32."""
    device: Annotated[str, OneOf(DEVICES)] = "auto"
    """auto, cpu or cuda."""
    compile: bool = False
    """Compile the generator's blocks, or a tokenizer's networks: one graph, of training steps."""
    activation_checkpointing: CountOrZero = 0
    """Less memory for one more forward pass: of every so many-th block training keeps the input alone and calculates
    the rest again for the gradient. 1: all blocks; 2: every second one; 0: none."""
    trackers: tuple[str, ...] = ()
    """Copies of the metrics: tensorboard, wandb, trackio."""

    def multiplied_in(self, world: World) -> str:
        """What rank 0 takes for `precision`: what is measured to be faster, another process may measure otherwise. All
        processes at once."""
        return from_main(pick_precision(self.precision, world.device, "loop.precision", "training"), world)

    def batch_of_process(self, processes: int) -> int:
        """Images of a step that each of so many processes reads; `UserError` where they are no whole number of
        micro-batches."""
        if self.batch_size % (processes * self.accumulation):
            raise UserError(
                f"loop.batch_size: {self.batch_size} is not a multiple of {processes} processes x {self.accumulation} "
                "micro-batches"
            )
        return self.batch_size // processes


def trainable_models() -> dict[str, type[ModelConfig]]:
    """The configurations of what can be trained, by what files call them."""
    tokenizers = {kind: row.config for kind, row in TOKENIZERS.items() if row.trainable}
    return {kind: row.config for kind, row in GENERATORS.items()} | tokenizers


READ_IN = {
    ("post-training", "tokenizer"): ("data.images", "data.flip", "data.validation_split", "data.bad_images"),
    ("post-training",): ("data.classes", "data.label_default", "loop.fd_samples"),
    ("generator", "post-training"): ("tokenizer", "text_encoder", "lora.rank"),
    ("generator",): ("data.tokens", "data.validation_tokens", "data.views", "data.weights", "lora.dropout"),
    ("generator", "tokenizer"): ("loop.keep_best",),
}
"""Options that only these kinds of run read."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """One training run, complete."""

    recipe: str
    """What the run is called in logs and reports."""
    init: str | None = None
    """Run or model folder to start from, of a generator or, to train one, of a tokenizer; None: from random weights."""
    tokenizer: str | None = None
    """Name or folder of the frozen tokenizer (generators only); None: that of `init`."""
    text_encoder: str | None = None
    """What reads the captions of a generator that takes some: minilm, a folder, OWNER/NAME; None: that of `init`."""
    model: ModelConfig | None = field(default_factory=ReARConfig, metadata={"kinds": trainable_models})
    """What is trained; None: the architecture of `init`."""
    objective: ObjectiveConfig = field(default_factory=AutoregressiveConfig, metadata={"kinds": kinds})
    """What is minimised."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """The loop."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters in the place of all weights."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The processes."""
    seed: CountOrZero = 0
    """Every random number of the run derives from it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for runs, keys in READ_IN.items():
            if self.run not in runs:
                words = f"objective.kind {' or '.join(map(repr, kinds(*runs)))}"
                for key in keys:
                    check_left(self, key, words)
        trains_tokenizer = self.model is not None and self.model.kind in TOKENIZERS
        if trains_tokenizer != (self.run == "tokenizer"):
            fitting = ", ".join(kinds("tokenizer") if trains_tokenizer else kinds("generator", "post-training"))
            kind = self.model.kind if self.model else "that of init"
            raise UserError(
                f"objective.kind: {self.objective.kind!r} does not train model.kind {kind!r}; choices: {fitting}"
            )
        if isinstance(self.model, GeneratorConfig) and self.model.has_classes:
            check_left(self, "text_encoder", "a generator of captions, such as with model.condition 'text'")
        self.objective.check_model(self.model)
        if self.run == "generator" and not (self.tokenizer or self.init):
            raise UserError("tokenizer: a generator needs the name or folder of its tokenizer")
        if self.lora.rank and self.run == "generator" and not self.init:
            raise UserError(
                f"lora.rank: {self.lora.rank}, but random weights are no model to adapt; name one with init, or set "
                "it to 0"
            )

    @property
    def run(self) -> str:
        """What kind of run this is: generator, post-training or tokenizer."""
        return method_of_config(self.objective).run
