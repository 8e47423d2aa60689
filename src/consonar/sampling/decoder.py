"""Decoding: the tokens of a batch one by one, by one step that a CUDA device replays as a graph.

On a CUDA device the launches of a step take longer than its work. There the step is captured once for each shape of a
batch and replayed for every token: the position is a number on the device, all that the step reads and writes has its
place in memory, and attention reads as many keys as there are up to the next multiple of `BUCKET`, masked behind the
token: one graph for each such length. Elsewhere the same step is called, and the CPU knows the position.

Letters: `B` images, `R` rows: B, or under guidance 2 B with the null conditions last, `N` tokens, `V` codes.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from consonar import records
from consonar.attention import KVCache
from consonar.cpu.kernels import ordered_weights
from consonar.errors import UserError, is_out_of_memory, one_line
from consonar.generators.base import CausalGenerator
from consonar.types import Condition, Generator

BUCKET = 64
WARM_UPS = 2
"""Steps before a capture, in which libraries choose their kernels and take their memory."""
Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Tokens (B,) int64, and the entropy (B,) of what they were drawn from <- logits (B, V), uniform numbers (B, 1)."""


def guided_logits(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """unconditional + scale (conditional - unconditional); scale 1 is the conditional model (Ho & Salimans 2022)."""
    guided = unconditional + scale * (conditional - unconditional)
    return torch.where(scale == 1, conditional, guided)  # exactly, where the sum would be off by rounding


class Batch:
    """The memory of a batch of one shape, and the step that takes all of it on by a token."""

    def __init__(self, generator: Generator, condition: Condition, scales: Sequence[float], draw: Draw):
        count, self.length, device = records.num_rows(condition), len(scales), records.first_tensor(condition).device
        self.generator, self.draw, self.guided = generator, draw, any(scale != 1 for scale in scales)
        self.rows = records.map_tensors(torch.clone, self.with_null(condition))
        num_rows = records.num_rows(self.rows)
        self.cache = generator.new_cache(num_rows)
        self.scales = records.to_device(torch.tensor(scales), device) if self.guided else None
        self.uniforms = torch.empty(count, self.length, dtype=torch.float64, device=device)
        self.tokens = torch.empty(count, self.length, dtype=torch.int64, device=device)
        self.new = torch.empty(num_rows, 1, dtype=torch.int64, device=device)  # the last token of every row
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the token that is drawn next
        self.place = torch.zeros_like(self.position)  # in the cache, of the token before
        self.entropy = torch.empty(count, device=device)
        self.finite = torch.empty((), dtype=torch.bool, device=device)
        self.replays: dict[int, Callable[[], None]] = {}
        """The graph for each number of keys."""

    def with_null(self, condition: Condition) -> Condition:
        """(R, ...) <- (B, ...)."""
        null = self.generator.null_condition
        return records.concatenate(condition, null(condition)) if self.guided else condition

    def step(self, context: Tensor) -> None:
        """Draws the next token of every row after `context` (R, n). Nothing in it asks the device for a number."""
        logits, _ = self.generator(context, self.rows, cache=self.cache)
        logits = logits[:, -1].float()
        if self.scales is not None:
            conditional, unconditional = logits.chunk(2)
            logits = guided_logits(conditional, unconditional, self.scales.index_select(0, self.position))
        self.finite &= logits.isfinite().all()  # asked after the last token
        token, entropy = self.draw(logits, self.uniforms.index_select(1, self.position))
        self.entropy += entropy / self.length
        self.tokens.index_copy_(1, self.position, token[:, None])
        self.new.view(-1, len(token)).copy_(token)
        self.position += 1

    def begin(self, condition: Condition, uniforms: Tensor) -> None:
        """Reads the condition in one pass and draws the first token; `uniforms` (B, N) in [0, 1)."""
        records.map_tensors(Tensor.copy_, self.rows, self.with_null(condition))
        self.uniforms.copy_(uniforms)
        self.position.zero_()
        self.entropy.zero_()
        self.finite.fill_(True)
        if isinstance(self.cache, KVCache):
            self.cache.restart()
        self.step(self.new[:, :0])

    def finish(self) -> None:
        """Draws the tokens after the first."""
        first = self.cache.length
        for position in range(self.length):
            if position and self.replays:
                self.expect(first + position - 1)
                self.replays[self.reach(first + position - 1)]()
            elif position:
                self.step(self.new)
        if not self.finite:
            raise UserError("generator: its logits are not finite; its weights are damaged, or its training diverged")

    def expect(self, place: int) -> None:
        """Prepares a step that reads the token at `place` of the cache, which then is the device's to know."""
        assert isinstance(self.generator, CausalGenerator) and isinstance(self.cache, KVCache)
        if self.cache.place is None:
            self.cache.place = self.place.fill_(place)
        self.generator.look_ahead(self.rows, self.cache, place)

    def reach(self, place: int) -> int:
        """How many keys that step attends to."""
        assert isinstance(self.cache, KVCache)
        return min((place // BUCKET + 1) * BUCKET, self.cache.data.shape[4])

    # Any: PyTorch has no public name for the type of a pool.
    def capture(self, pool: Any) -> None:
        """Makes `replays`, in a batch that has begun and is to begin again."""
        assert isinstance(self.cache, KVCache)
        first = self.cache.length
        stream, current = capture_stream(self.tokens.device), torch.cuda.current_stream(self.tokens.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for position in range(1, self.length):
                    if (reach := self.reach(first + position - 1)) not in self.replays:
                        self.replays[reach] = self.captured(position, first + position - 1, reach, pool, stream)
        finally:
            current.wait_stream(stream)

    def captured(
        self, position: int, place: int, reach: int, pool: Any, stream: torch.cuda.Stream
    ) -> Callable[[], None]:
        """The graph of the step that attends to `reach` keys, warmed up at a place that has so many."""
        assert isinstance(self.cache, KVCache)
        self.expect(place)
        self.cache.reach, graph = reach, torch.cuda.CUDAGraph()
        for run in range(WARM_UPS + 1):
            if run:
                self.step(self.new)
            self.place.fill_(place)
            self.position.fill_(position)
        # Work of other threads, such as a reader's or NCCL's, may go on.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.step(self.new)
        return graph.replay


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, and for them alone: libraries have memory of their own for a stream, which graphs use."""
    return torch.cuda.Stream(device)


def give_up(device: torch.device, pool: Any) -> None:
    """After a capture that failed: ends what PyTorch leaves begun where CUDA refuses the capture's end, too.

    The allocator would go on to take for this device what belongs to `pool`, and refuse `empty_cache` and every other
    capture; PyTorch before 2.13 would refuse random numbers of the device.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # the capture had not begun, or its end succeeded and did this
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    for generator in torch.cuda.default_generators[index : index + 1]:
        generator.graphsafe_set_state(generator.clone_state())  # the same numbers, in no capture


class Decoder:
    """Draws batches for one generator and one list of guidance scales (N), and keeps the graphs of their shapes.

    `graphs`: whether a CUDA device replays them. A graph reads the weights where they lie; under autocast it casts them
    anew for every token, for without gradient PyTorch keeps no copies.
    """

    def __init__(self, generator: Generator, scales: Sequence[float], draw: Draw, *, graphs: bool = True):
        self.generator, self.scales, self.draw, self.graphs = generator, scales, draw, graphs
        self.batches: dict[tuple[object, ...], Batch] = {}
        self.pool: Any = None

    @torch.inference_mode()
    def __call__(self, condition: Condition, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N), and (B,) the mean entropy of what they were drawn from; see `sample.sample_tokens`."""
        count, device = records.num_rows(condition), records.first_tensor(condition).device
        uniforms = records.to_device(uniforms, device)
        if count < (most := max((len(batch.tokens) for batch in self.batches.values()), default=0)):
            # A smaller batch has its last row repeated, and the graphs of the largest.
            rows = torch.arange(most, device=device).clamp_max_(count - 1)
            condition, uniforms = records.rows(condition, rows), uniforms[rows]
        batch = self.batch_of(condition, uniforms)
        with ordered_weights(self.generator, len(batch.new), batch.length):
            batch.begin(condition, uniforms)
            batch.finish()
        return batch.tokens[:count].clone(), batch.entropy[:count].clone()

    def batch_of(self, condition: Condition, uniforms: Tensor) -> Batch:
        """Its memory: that of the last batch of this shape where there are graphs, else new."""
        kinds: list[object] = []
        records.map_tensors(lambda tensor: kinds.append((tensor.shape, tensor.dtype)) or tensor, condition)  # type: ignore[func-returns-value]
        if (known := self.batches.get(tuple(kinds))) is not None:
            return known
        batch = Batch(self.generator, condition, self.scales, self.draw)
        if self.graphs and self.can_capture(batch):
            batch.begin(condition, uniforms)
            try:
                self.pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
                batch.capture(self.pool)
                self.batches[tuple(kinds)] = batch
            except Exception as error:  # whatever it is: the same tokens are drawn without
                self.graphs, batch.replays = False, {}
                give_up(batch.tokens.device, self.pool)
                # The end of a failed capture fails as well.
                reasons = [one for one in (error.__context__, error) if one is not None]
                if lacking := next(filter(is_out_of_memory, reasons), None):  # of which who asked knows what to change
                    raise lacking from None
                told = "; ".join(map(one_line, reasons))
                warnings.warn(f"sampling goes on without CUDA graphs, slower: {told}", stacklevel=2)
        return batch

    def can_capture(self, batch: Batch) -> bool:
        """Not a generator with a cache of its own, nor one token."""
        ours = isinstance(self.generator, CausalGenerator) and isinstance(batch.cache, KVCache)
        return ours and batch.tokens.is_cuda and batch.length > 1
