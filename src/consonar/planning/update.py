"""An update of a run, made on tensors without memory (`ledger`): the run's own objective, trainee and micro-batches."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from consonar import records
from consonar.cpu.kernels import TUNED
from consonar.distributed import ALONE
from consonar.generators import build_generator, rotary
from consonar.generators.base import CausalGenerator, GeneratorConfig
from consonar.networks import PERCEPTUAL_DISTANCES
from consonar.networks.base import LayerDistance
from consonar.networks.lpips import LPIPS, VGG16Features
from consonar.planning.ledger import BACKWARD, FORWARD, AsOnCuda, Ledger, fake, size_of, tensors_of
from consonar.sampling.pictures import bytes_of_image
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.base import CodebookTokenizer, TokenizerConfig
from consonar.training.config import TrainConfig
from consonar.training.lora import StartModel, adapt, adapted, moving
from consonar.training.objectives import method_of_config
from consonar.training.objectives.alignment import CHUNK, AlignmentConfig, AlignmentTrainee
from consonar.training.objectives.free import FreePolicy, FreeRollout
from consonar.training.objectives.policy import PolicyConfig, PolicyGradient
from consonar.training.objectives.reconstruction import TokenizerTrainee
from consonar.training.trainee import HeadSpec, Trainee
from consonar.types import Condition, ImageBatch, PromptCondition, TextCondition, TokenBatch

ENCODER, DECODER, LOGITS = "tokenizer: encoder", "tokenizer: decoder", "logits"
REWARDS, REFERENCE = "reward networks", "reference policy"


@dataclass(frozen=True)
class Shapes:
    """What a run trains and reads, by configuration alone."""

    tokenizer: TokenizerConfig
    generator: GeneratorConfig | None = None
    """None: the tokenizer is trained."""
    heads: tuple[HeadSpec, ...] = ()


@dataclass(frozen=True)
class Update:
    """What one update of one process takes."""

    trained: list[int]
    """Bytes of each weight that gets a gradient."""
    state: int
    """Bytes of what a moving average is of."""
    weights: Counter[str]
    """Bytes of weights and buffers by model; `FORWARD` is the trainee."""
    blocks: list[int]
    """Bytes of each part of what is trained that is sharded on its own."""
    adapted: int
    """Bytes of weights that have adapters."""
    flops: Counter[tuple[str, torch.dtype]]
    peak: Counter[str]
    """Bytes beside weights and optimizer at the moment when they are most, by what made them ..."""
    most: Counter[str]
    """... and the most of each."""
    rollout_rows: int = 0
    """Sequences that are drawn freely at once, token by token ..."""
    cache: int = 0
    """... and bytes of their keys and values."""
    chunk: int = 0
    """Images decoded at once; 0: none are."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside, tensors that are made are fake; tables that generators keep are made anew, and again after it."""
    kept = rotary.rotary_table, rotary.inverse_frequencies
    for made in kept:
        made.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        for made in kept:
            made.cache_clear()


@contextmanager
def weightless() -> Iterator[list[nn.Module]]:
    """Inside, LPIPS is made without its file of weights; the list gets the perceptual distances that are made."""
    rows, made = dict(PERCEPTUAL_DISTANCES), list[nn.Module]()

    def noted(load: Callable[[str | None], LayerDistance], weights: str | None) -> LayerDistance:
        made.append(distance := load(weights))
        return distance

    for name, row in rows.items():
        load = (lambda _: LPIPS(VGG16Features(), "")) if name == "lpips" else row.load
        PERCEPTUAL_DISTANCES[name] = replace(row, load=partial(noted, load))
    try:
        yield made
    finally:
        PERCEPTUAL_DISTANCES.update(rows)


def plain(module: nn.Module) -> None:
    """Puts PyTorch's layers in the place of those that choose their way by what is faster on this machine."""
    usual = {ours: theirs for theirs, ours in TUNED.items()}
    for part in module.modules():
        part.__class__ = usual.get(type(part), type(part))


def trainee_of(config: TrainConfig, shapes: Shapes, tokenizer: CodebookTokenizer) -> Trainee | TokenizerTrainee:
    """What is trained."""
    if shapes.generator is None:
        return TokenizerTrainee(
            tokenizer,
            discriminator=config.objective.has_discriminator,
            recompute_every=config.loop.activation_checkpointing,
        )
    generator = built(shapes.generator)
    generator.recompute_every = config.loop.activation_checkpointing
    adapt(generator, config.lora, config.seed)
    kind = AlignmentTrainee if config.run == "post-training" else Trainee
    return kind(generator, shapes.heads)


Models = tuple[CodebookTokenizer, Trainee | TokenizerTrainee, list[nn.Module]]


def models(config: TrainConfig, shapes: Shapes) -> Models:
    """The tokenizer, what is trained, and in a list the start model where a copy of it is kept; inside of a
    `FakeTensorMode`."""
    with torch.device("meta"):
        tokenizer = TOKENIZERS[shapes.tokenizer.kind].model(shapes.tokenizer, name="tokenizer")
        trainee = trainee_of(config, shapes, tokenizer)
        prior = list[nn.Module]()
        if config.objective.needs_prior() and shapes.generator is not None and not config.lora.rank:
            prior.append(built(shapes.generator))
    for model in (tokenizer, trainee, *prior):
        plain(model)
        fake(model)
    for model in prior if shapes.generator is None else (tokenizer, *prior):
        model.requires_grad_(False).eval()
    return tokenizer, trainee.train(), prior


def built(shape: GeneratorConfig) -> Any:  # both a `Generator` and a module, which no type says
    """A generator."""
    return build_generator(shape)


def update(config: TrainConfig, shapes: Shapes, batch_size: int, *, low: bool, cuda: bool) -> Update:
    """One update of a process that reads `batch_size` images, on a GPU or a CPU; `low`: in bf16."""
    dtype, settings, chunk = torch.bfloat16 if low else None, config.objective, 0
    if isinstance(settings, AlignmentConfig):
        chunk = settings.chunk or CHUNK
        settings = replace(settings, chunk=chunk)
    if isinstance(settings, PolicyConfig):  # what is measured for it once, at the start, takes no part in an update
        settings = replace(settings, smooth_credit=False)
    given = {"autocast_dtype": dtype} if config.run == "post-training" else {}
    with without_memory(), ExitStack() as stack:
        tokenizer, trainee, prior = models(config, shapes)
        start = StartModel(trainee) if config.objective.needs_prior() else None
        known: dict[str, list[nn.Module | StartModel | None]] = {
            "generator": [tokenizer], "post-training": [tokenizer, prior[0] if prior else start], "tokenizer": [],
        }  # fmt: skip
        # Networks have memory until they are fake: PyTorch moves no fake modules to a device.
        with unset_fake_temporarily(), weightless() as networks:
            objective = method_of_config(settings).objective(
                settings, *known[config.run], total_steps=config.loop.steps, seed=config.seed, world=ALONE, **given
            )
        for network in networks:
            fake(network)
        if cuda:
            stack.enter_context(AsOnCuda())
        weights: dict[str, list[nn.Module]] = {FORWARD: [trainee], REFERENCE: prior, REWARDS: networks}
        if config.run != "tokenizer":
            weights |= parts_of(tokenizer)
        ledger = stack.enter_context(Ledger(tensors_of(*chain(*weights.values())), cuda=cuda))
        follow(ledger, objective, tokenizer, trainee, prior)
        prepared = prepare(objective, trainee, batch(config, tokenizer, shapes.generator, batch_size))
        run(config, ledger, objective, trainee, prepared, dtype)
        rows, cache = drawn_freely(settings, trainee, batch_size, dtype)
        return Update(
            trained=[weight.nbytes for weight in trained(trainee)],
            state=sum(value.nbytes for value in moving(trainee).values()),
            weights=Counter({name: size_of(*modules) for name, modules in weights.items()}),
            blocks=[size_of(part) for part in trainee.parts()],
            adapted=sum(layer.get_base_layer().weight.nbytes for layer in adapted(trainee).values()),
            flops=ledger.flops, peak=ledger.peak, most=ledger.most, rollout_rows=rows, cache=cache,
            chunk=chunk if DECODER in ledger.most else 0,
        )  # fmt: skip


def parts_of(tokenizer: CodebookTokenizer) -> dict[str, list[nn.Module]]:
    """What of a frozen tokenizer encodes, and all else of it: all where no part is called `encoder`."""
    encoder = getattr(tokenizer, "encoder", None)
    own = {id(weight) for weight in encoder.parameters()} if encoder is not None else set()
    rest = [weight for weight in tokenizer.parameters() if id(weight) not in own]
    return {ENCODER: [] if encoder is None else [encoder], DECODER: [nn.ParameterList(rest)]}


def decoding(shapes: Shapes) -> int:
    """Bytes that decoding takes for each image, as `Alignment.judge` estimates them on a GPU."""
    with without_memory(), Ledger([]):
        with torch.device("meta"):
            tokenizer = TOKENIZERS[shapes.tokenizer.kind].model(shapes.tokenizer, name="tokenizer")
        fake(tokenizer)
        return bytes_of_image(tokenizer, torch.zeros(1, tokenizer.num_tokens, dtype=torch.int64))


def follow(
    ledger: Ledger, objective: Any, tokenizer: nn.Module, trainee: Trainee | TokenizerTrainee, prior: list[nn.Module]
) -> None:
    """What the models and networks make is booked on them, and gradients of weights on such."""
    ledger.follow(trainee, "forward", FORWARD, of_trainee=True)
    if isinstance(trainee, Trainee):
        ledger.follow(trainee.generator, "run_block", FORWARD, of_trainee=True)
        ledger.follow(trainee.generator, "logits", LOGITS, of_trainee=True)
        ledger.once(tokenizer, "decode", DECODER)
        ledger.follow(tokenizer, "encode", ENCODER)
        ledger.follow(tokenizer, "decode_embeddings", DECODER)
    for model in prior:
        ledger.follow(model, "forward", REFERENCE)
    for name, method in (("rewards", "_chunk"), ("perceptual", "forward")):
        if (owner := getattr(objective, name, None)) is not None:
            ledger.once(owner, method, REWARDS)
            ledger.follow(owner, method, REWARDS)
            if name == "rewards" and ledger.cuda:
                ledger.beside(owner, method, DECODER)
    for weight in trained(trainee):
        weight.register_hook(ledger.is_gradient)


def condition_of(shape: GeneratorConfig | None, size: int) -> Condition:
    """Of so many images; captions fill all places that the generator has for them."""
    if shape is None or shape.has_classes:
        return torch.zeros(size, dtype=torch.int64)
    length, width = shape.caption_shape
    mask = torch.ones(size, length, dtype=torch.bool)
    if width:
        return TextCondition(torch.zeros(size, length, width), mask)
    return PromptCondition(torch.zeros(size, length, dtype=torch.int64), mask)


def trained(trainee: nn.Module) -> list[nn.Parameter]:
    """What gets a gradient."""
    return [weight for weight in trainee.parameters() if weight.requires_grad]


def batch(
    config: TrainConfig, tokenizer: CodebookTokenizer, shape: GeneratorConfig | None, size: int
) -> ImageBatch | TokenBatch:
    """What is read for an update."""
    condition, side = condition_of(shape, size), tokenizer.image_size
    if config.run == "generator":
        return TokenBatch(torch.zeros(size, tokenizer.num_tokens, dtype=torch.int64), condition)
    return ImageBatch(torch.zeros(size, 3, side, side), condition)


def prepare(objective: Any, trainee: Any, given: Any) -> object:  # of any kind of run
    """What the objective makes of the batch; free sequences, which are drawn token by token, are there already."""
    if not isinstance(objective, FreePolicy):
        return objective.prepare(trainee, given, 0)
    forced = super(PolicyGradient, objective).prepare(trainee, given, 0)
    tokens = forced.batch.tokens
    actions = tokens.new_zeros(len(tokens), objective.config.group_size, tokens.shape[1])
    with torch.no_grad():
        return FreeRollout(**vars(forced), drawn=objective.reward(trainee, actions, forced.batch))


def run(
    config: TrainConfig, ledger: Ledger, objective: Any, trainee: nn.Module, prepared: object, dtype: torch.dtype | None
) -> None:
    """The first micro-batch, as the loop does it up to the gradients; its products count for all of the step."""
    before = ledger.flops.copy()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss, terms = objective.loss(trainee, records.split(prepared, config.loop.accumulation)[0], 0)
    with ledger.labelled(BACKWARD):
        gradients = torch.autograd.grad(loss, trained(trainee), allow_unused=True)
    for key, count in ledger.flops.items():
        ledger.flops[key] += (count - before[key]) * (config.loop.accumulation - 1)
    del terms, gradients


def drawn_freely(settings: object, trainee: nn.Module, batch_size: int, dtype: torch.dtype | None) -> tuple[int, int]:
    """How many sequences free rollouts draw at once, those of the null condition too, and bytes of their cache."""
    if not (isinstance(settings, PolicyConfig) and settings.rollout == "free"):
        return 0, 0
    generator = trainee.get_submodule("generator")
    assert isinstance(generator, CausalGenerator)  # `built`
    rows = batch_size * settings.group_size * (1 if settings.guidance_scale == 1 else 2)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return rows, generator.new_cache(rows).data.nbytes
