"""Whether a run fits on its GPUs and how long it takes, from one update without memory (`update`) and a few products.

Seconds of a step = the sum over types of FLOPs / (peak of the type x utilisation), + the tokens of free rollouts one by
one: for each the longer of its products at that rate and of its memory, read once at the bandwidth (under autocast 8
bytes a weight, which is cast anew for each token). Exchange between GPUs, reading of data, validation, pictures and
checkpoints are not in it: utilisation is the share of the peak that is left.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Annotated

import torch

from consonar.memory import GIB
from consonar.options import Count, OneOf, Options, Positive, Range
from consonar.parallel import ParallelConfig
from consonar.planning.ledger import AGAIN, BACKWARD, CASTS, FORWARD, GRADIENTS, LOSSES, UNTRAINED
from consonar.planning.shapes import shapes_of, tokenizer_of
from consonar.planning.update import LOGITS, REFERENCE, Shapes, Update, decoding, update
from consonar.training.config import TrainConfig
from consonar.training.objectives.alignment import AlignmentConfig

OWN = (FORWARD, BACKWARD, AGAIN, UNTRAINED, REFERENCE, LOGITS)
"""What is multiplied in the precision of the run; the rest is float32, but where a network bears bf16."""
CONTEXT, FRAGMENTS = 1.5 * GIB, 0.04
"""Assumed to be taken beside tensors: by CUDA and its libraries, and as a share of the memory by fragments."""


@dataclass(frozen=True)
class Gpu:
    """Of its data sheet: peaks of dense products in TFLOP/s, bandwidth in GB/s, memory in GiB."""

    bf16: float
    fp32: float
    bandwidth: float
    memory: float


GPUS = {
    "a100": Gpu(312, 19.5, 2039, 80),
    "a800": Gpu(312, 19.5, 2039, 80),
    "h100": Gpu(989, 67, 3350, 80),
    "h200": Gpu(989, 67, 4800, 141),
    "l40s": Gpu(362, 91.6, 864, 48),
}


@dataclass(frozen=True, kw_only=True)
class Machine(Options):
    """What a run is planned for."""

    gpus: Count = 1
    """GPUs of one node."""
    nodes: Count = 1
    """Nodes."""
    gpu: Annotated[str, OneOf(tuple(GPUS))] = "h100"
    """Which kind: what its data sheet says of peaks, bandwidth and memory."""
    gpu_memory: Positive | None = None
    """GiB of one GPU; None: of its kind."""
    peak_tflops: Positive | None = None
    """Peak of dense bf16 products; None: of its kind."""
    peak_tflops_fp32: Positive | None = None
    """Peak of float32 products, in which tokenizer and most rewards are; None: of its kind."""
    utilisation: Annotated[float, Range(0, 1, "(]")] = 0.4
    """Share of the peaks that the run reaches."""

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def memory(self) -> float:
        """Bytes of one GPU that tensors may take."""
        whole = (self.gpu_memory or GPUS[self.gpu].memory) * GIB
        return max(0, whole * (1 - FRAGMENTS) - CONTEXT)

    def rate(self, kind: str) -> float:
        """FLOPs a second in fp32, tf32 or bf16."""
        low = (self.peak_tflops or GPUS[self.gpu].bf16) * 1e12 * self.utilisation
        full = (self.peak_tflops_fp32 or GPUS[self.gpu].fp32) * 1e12 * self.utilisation
        return {"bf16": low, "tf32": low / 2, "fp32": full}[kind]


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    config: TrainConfig
    machine: Machine
    shapes: Shapes
    update: Update
    assumed: list[str]

    @property
    def precision(self) -> str:
        chosen = self.config.loop.precision
        return "bf16" if chosen == "auto" else chosen

    @property
    def static(self) -> dict[str, float]:
        """Bytes of one process that stay, by part."""
        trained, weights, shards = sum(self.update.trained), self.update.weights, self.shards
        return {
            "weights": weights[FORWARD] / shards,
            REFERENCE: weights[REFERENCE] / shards,
            "optimizer": 2 * trained / shards,
            "gradient buckets": trained if self.machine.processes > 1 and shards == 1 else 0,
            "moving average": self.update.state / shards if self.config.loop.ema_decay else 0,
            "gathered weights and gradients": self.gathered,
            **{name: size for name, size in weights.items() if name not in (FORWARD, REFERENCE)},
            "key-value cache": self.update.cache,
            "weights with adapters in them": self.update.adapted if self.update.rollout_rows else 0,
        }

    @property
    def shards(self) -> int:
        """Processes that share a copy of weights, gradients and optimizer."""
        return self.config.parallel.group(self.machine.processes, self.machine.gpus)

    @property
    def gathered(self) -> float:
        """Bytes of weights that are whole at once: what is in no block, in float32, and a block with those that are
        gathered meanwhile, or all that are not let go of; the gradients of two; of the start model the same, but its
        blocks go before those; and for free rollouts a copy of the model."""
        if self.shards == 1:
            return 0
        parallel, weights, blocks = self.config.parallel, self.update.weights, sorted(self.update.blocks)
        whole, prior, goes = weights[FORWARD], weights[REFERENCE], parallel.reshard_after_forward
        rest, ahead = whole - sum(blocks), max(1, parallel.prefetch_forward, parallel.prefetch_backward)
        size = 0.5 if parallel.param_dtype == "bf16" else 1
        kept = rest + size * sum(blocks[-1 - ahead :] if goes else blocks)
        of_prior = prior and prior - sum(blocks) + (0 if goes else size * sum(blocks))
        # Of several micro-batches all gradients are whole until they are exchanged, see `memory`.
        share = sum(self.update.trained) / whole if self.config.loop.accumulation == 1 else 0
        return kept + of_prior + share * (rest + sum(blocks[-2:])) + (whole if self.update.rollout_rows else 0)

    @cached_property
    def memory(self) -> dict[str, tuple[float, float]]:
        """(most, at the peak) bytes of one process by part. Of several micro-batches gradients stand from the first,
        and whole: they are exchanged, and cut into shards, in the last."""
        parts = {name: (size, size) for name, size in self.static.items() if size}
        several, update, cut = self.config.loop.accumulation > 1, self.update, self.shards > 1
        halves = 2 if cut and self.config.parallel.reduce_dtype == "bf16" else 1
        gradients = sum(update.trained) // (halves if several else self.shards)
        # What autocast finds cast: weights of blocks.
        cast = sum(update.blocks) // 2 if cut and self.config.parallel.param_dtype == "bf16" else 0
        peak, most = (Counter({**now, CASTS: max(0, now[CASTS] - cast)}) for now in (update.peak, update.most))
        peak[GRADIENTS] = gradients if several else peak[GRADIENTS] // self.shards
        if gradients > peak.total():  # when the optimizer steps there is nothing else
            peak = Counter({GRADIENTS: gradients})
        parts["gradients"] = (gradients, peak[GRADIENTS])
        for label, size in most.items():
            if label != GRADIENTS:
                name = WORK.get(label, f"work of {label}")
                before = parts.get(name, (0, 0))
                parts[name] = (before[0] + size, before[1] + peak[label])
        return parts

    @property
    def peak(self) -> float:
        """Bytes of tensors of one process when they are most."""
        return sum(at_peak for _, at_peak in self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.memory

    @cached_property
    def flops(self) -> dict[tuple[str, str], float]:
        """Of a step of one process, by what they are for and what they are multiplied in."""
        found: Counter[tuple[str, str]] = Counter()
        for (label, kind), count in self.update.flops.items():
            low = "tf32" if self.precision == "tf32" and label in OWN else "fp32"
            found[label, "bf16" if kind == torch.bfloat16 else low] += count
        if self.update.rollout_rows:
            per_row = (found[FORWARD, self.precision] + found[LOGITS, self.precision]) / (self.rows * self.group)
            found["rollouts", self.precision] = round(per_row * self.update.rollout_rows)
        return {key: count for key, count in found.items() if count}

    @property
    def rows(self) -> int:
        """Images of a step that one process reads."""
        return self.config.loop.batch_size // self.machine.processes

    @property
    def group(self) -> int:
        return int(vars(self.config.objective).get("group_size", 1))

    @property
    def seconds(self) -> float:
        """Of a step; see the module."""
        rate = self.machine.rate
        total = sum(count / rate(kind) for (label, kind), count in self.flops.items() if label != "rollouts")
        if self.update.rollout_rows:
            bytes_a_weight = 8 if self.precision == "bf16" else 4
            read = self.update.weights[FORWARD] / 4 * bytes_a_weight + self.update.cache / 2
            tokens = self.tokens // self.config.loop.batch_size
            products = self.flops["rollouts", self.precision] / rate(self.precision) / tokens
            total += tokens * max(products, read / (GPUS[self.machine.gpu].bandwidth * 1e9))
        return total

    @property
    def tokens(self) -> int:
        """Of the images of a step, all processes together."""
        tokenizer, generator = self.shapes.tokenizer, self.shapes.generator
        return self.config.loop.batch_size * (generator.num_tokens if generator else tokenizer_of(tokenizer).num_tokens)

    @property
    def hours(self) -> float:
        return self.config.loop.steps * self.seconds / 3600


WORK = {
    FORWARD: "activations", BACKWARD: "backward pass", AGAIN: "backward pass", UNTRAINED: "passes without gradient",
    LOGITS: "logits", CASTS: CASTS, LOSSES: "losses and the rest",
}  # fmt: skip
"""What the memory that a pass makes is called."""


Made = dict[str, Update]
"""Updates that were made, by what they depend on."""


def plan(config: TrainConfig, machine: Machine, num_classes: int | None = None, made: Made | None = None) -> Plan:
    """`made` are those of other plans, which is added to. Raises `UserError` for a batch or a group of processes that
    does not divide, as `train` does, and for models whose shapes are not known."""
    processes, loop = machine.processes, config.loop
    rows, low = loop.batch_of_process(processes), loop.precision in ("auto", "bf16")
    config.parallel.check("bf16" if low else loop.precision, processes, machine.gpus)
    config, shapes, assumed = shapes_of(config, num_classes)
    if loop.compile:
        assumed.append("loop.compile changes nothing (fused kernels take less memory and time: not modelled)")
    made = {} if made is None else made

    def planned(given: TrainConfig) -> Plan:
        key = repr((replace(given, parallel=ParallelConfig()), processes))
        if key not in made:
            made[key] = update(given, shapes, rows, low=low, cuda=True)
        return Plan(given, machine, shapes, made[key], assumed)

    objective = config.objective
    if not (isinstance(objective, AlignmentConfig) and objective.chunk == 0):
        return planned(config)
    # What is decoded at once is what a quarter of the memory holds that is free then: after a pass that decodes one.
    first = planned(replace(config, objective=replace(objective, chunk=1)))
    fitting = int(max(0, machine.memory - first.peak) // 4 // decoding(shapes))
    chunk = 1 << max(0, fitting.bit_length() - 1)
    return planned(replace(config, objective=replace(objective, chunk=min(chunk, rows_decoded(first)))))


def rows_decoded(found: Plan) -> int:
    """Images that are decoded in one micro-batch."""
    return max(1, found.rows * found.group // found.config.loop.accumulation)


def changes(config: TrainConfig, machine: Machine) -> Iterator[dict[str, TrainConfig]]:
    """What to change for less memory, in this order: first what costs nothing, then a forward pass, then exchange.

    Each with more and more micro-batches, down to one image at a time.
    """
    loop, most = config.loop, config.loop.batch_size // machine.processes
    doubled = [loop.accumulation << power for power in range(1, most.bit_length())]
    ways = [way for way in doubled if way < most and most % way == 0] + [most] * (most > loop.accumulation)
    recomputing = [loop]
    if loop.activation_checkpointing != 1:
        recomputing.append(replace(loop, activation_checkpointing=1))
    shared = [config.parallel]
    if machine.processes > 1 and not config.parallel.shards:
        shared.append(replace(config.parallel, strategy="fsdp"))
    for parallel, kept in product(shared, recomputing):
        found = {}
        for more in [loop.accumulation, *ways]:
            words = ["--parallel.strategy fsdp"] * (parallel != config.parallel)
            words += ["--loop.activation-checkpointing 1"] * (kept != loop)
            words += [f"--loop.accumulation {more}"] * (more != loop.accumulation)
            if words:
                found[" ".join(words)] = replace(config, parallel=parallel, loop=replace(kept, accumulation=more))
        if found:
            yield found


def remedies(found: Plan, num_classes: int | None = None) -> Iterator[tuple[str, Plan]]:
    """The changes in turn with their plans, up to the first that fits; where one image at a time is too much, that
    alone."""
    made: Made = {}
    for ways in changes(found.config, found.machine):
        words, least = list(ways.items())[-1]
        other = plan(least, found.machine, num_classes, made)
        if not other.fits:
            yield words, other
            continue
        for words, changed in ways.items():
            other = plan(changed, found.machine, num_classes, made)
            yield words, other
            if other.fits:
                return
