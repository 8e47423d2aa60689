"""A plan in words and as JSON."""

from collections.abc import Iterable, Iterator

from consonar.json_types import Json
from consonar.memory import GIB
from consonar.planning.plan import CONTEXT, FRAGMENTS, GPUS, Plan
from consonar.training.objectives import method_of_config


def record(plan: Plan) -> Json:
    """All numbers, in bytes, FLOPs, seconds."""
    return {
        "recipe": plan.config.recipe, "gpus": plan.machine.processes, "gpu": plan.machine.gpu,
        "utilisation": plan.machine.utilisation, "precision": plan.precision, "assumed": plan.assumed,
        "trained_parameters": sum(plan.update.trained) // 4,
        "memory": {part: {"most": most, "at_peak": peak} for part, (most, peak) in plan.memory.items()},
        "peak": plan.peak, "for_tensors": plan.machine.memory, "fits": plan.fits, "chunk": plan.update.chunk,
        "flops_per_step_and_gpu": {f"{label}, {kind}": count for (label, kind), count in plan.flops.items()},
        "seconds_per_step": plan.seconds, "tokens_per_second": plan.tokens / plan.seconds, "hours": plan.hours,
    }  # fmt: skip


def lines(plan: Plan, remedies: Iterable[tuple[str, Plan]]) -> Iterator[str]:
    """The plan on one page; `remedies` are asked for where it does not fit."""
    config, machine, loop = plan.config, plan.machine, plan.config.loop
    method, rows = method_of_config(config.objective).name, plan.rows // loop.accumulation
    yield f"{config.recipe}: {method}, {loop.steps:,} steps of {loop.batch_size:,} images in {plan.precision}"
    memory = machine.gpu_memory or GPUS[machine.gpu].memory
    shared = f", in {plan.shards} shards" if plan.shards > 1 else ""
    yield (
        f"on {machine.processes} x {machine.gpu} of {memory:g} GiB: {rows:,} images at a time x {loop.accumulation} "
        f"micro-batches on each{shared}"
    )
    for assumption in plan.assumed:
        yield f"assumed: {assumption}"
    trained = sum(plan.update.trained)
    frozen = plan.update.weights.total() - trained
    yield f"\nparameters: {trained / 4e6:,.1f} million trained, {frozen / 4e6:,.1f} million frozen"
    yield f"\n{'memory of one GPU, GiB':52}{'most':>10}{'at the peak':>14}"
    for part, (most, peak) in plan.memory.items():
        if most >= GIB / 200:
            note = f" ({plan.update.chunk} images at once)" if part.startswith("work of tokenizer: d") else ""
            yield f"  {part + note:50}{most / GIB:10.2f}{peak / GIB:14.2f}"
    yield f"  {'all tensors':60}{plan.peak / GIB:14.2f}"
    yield f"  {f'for tensors, less {CONTEXT / GIB:g} GiB and {FRAGMENTS:.0%} (assumed)':60}{machine.memory / GIB:14.2f}"
    yield f"\n{'FLOPs of a step of one GPU, TFLOP':52}"
    for (label, kind), count in sorted(plan.flops.items()):
        yield f"  {f'{label}, {kind}':50}{count / 1e12:10.2f}"
    rates = ", ".join(f"{kind} {machine.rate(kind) / 1e12:.1f}" for kind in sorted({kind for _, kind in plan.flops}))
    yield f"\ntime at {machine.utilisation:.0%} of the peaks (TFLOP/s reached: {rates}), exchange and reading left out"
    yield f"  {plan.seconds:.3g} s a step, {plan.tokens / plan.seconds:,.0f} tokens a second, {span(plan.hours)} in all"
    if plan.fits:
        yield "\nIt fits."
        return
    yield "\nIt does not fit. What to change, in this order:"
    fits = False
    for words, other in remedies:
        fits = other.fits
        verdict = "fits" if fits else "too much"
        yield f"  {words:60}{other.peak / GIB:8.2f} GiB, {span(other.hours)}: {verdict}"
    if not fits:
        yield (
            "None of these is enough: take more GPUs with a smaller loop.batch_size for each, a smaller\n"
            "model, or GPUs of more memory"
        )


def span(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
