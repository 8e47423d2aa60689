"""The command `diagnose`: one page about what a generator and its tokenizer get wrong together, and its numbers."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from consonar import memory
from consonar.cli import counting, say
from consonar.cli.parsing import check_name
from consonar.diagnostics.diagnose import diagnose
from consonar.diagnostics.subject import DiagnosisSettings
from consonar.distributed import pick_device
from consonar.report.diagnosis import check_outputs, write_diagnosis
from consonar.sampling.sample import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    model: tyro.conf.Positional[str]
    """A generator: run folder, model folder, or a shipped one (openmoji); or a tokenizer, of which only the parts
    receptive, codebook and forgiveness are measured."""
    data: str
    """Pictures, as for tokenize: openmoji, a folder, hf:owner/name; held-out ones are measured, training ones beside
    them."""
    out: Path
    """The page to write, .html; all numbers go into a .json of that name beside it."""
    parts: str = ""
    """Which diagnostics, e.g. exposure,embedding (default: all): exposure, embedding, layers, noise, gap, positions,
    receptive, codebook, forgiveness, attribution."""
    num_images: int = 64
    """Held-out pictures; the cost goes with it, intervals with its root."""
    sampler: Annotated[SamplerConfig, tyro.conf.arg(name="")] = field(default_factory=SamplerConfig)
    tokenizer: str | None = None
    """Name or folder of the generator's tokenizer (default: the one it was trained with)."""
    perceptual: str = "efficientnet-lite0"
    """efficientnet-lite0 (offline) or lpips, the article's (its VGG weights are a file that you bring)."""
    feature_network: str = "efficientnet-lite0"
    """Of Fréchet distances, as for evaluate."""
    validation_split: str | None = None
    """Which are held out: the name of a split, or a share of the training images such as 5% (0%: all are measured;
    default: the split validation, else test, else 5%)."""
    label_default: str | None = None
    """The class of pictures without a label, id or name; drop leaves them out."""
    seed: int = 0
    """Of the pictures chosen, all draws and all intervals."""
    batch_size: int = 64
    """Pictures per call of a network."""
    precision: str = "fp32"
    """What the networks multiply in: fp32, tf32 or bf16; docs/gpu.md."""
    device: str = "auto"
    """auto, cpu or cuda."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace a page and numbers that are there."""


def command(options: Options) -> None:
    check_name(options.out)
    check_outputs(options.out, overwrite=options.overwrite)
    device = pick_device(options.device, "--device")
    settings = DiagnosisSettings(
        num_images=options.num_images, batch_size=options.batch_size, seed=options.seed, sampler=options.sampler,
        perceptual=options.perceptual, feature_network=options.feature_network, device=str(device),
        precision=options.precision,
    )  # fmt: skip
    parts = [word.strip() for word in options.parts.split(",")] if options.parts else []
    smaller = f"lower --batch-size ({options.batch_size})"
    with counting("diagnose") as count, memory.explained(smaller, torch.device(device)):
        numbers = itertools.count()
        found = diagnose(
            options.model, options.data, settings, parts=parts, tokenizer=options.tokenizer,
            validation_split=options.validation_split, label_default=options.label_default,
            progress=lambda part: count(next(numbers)),
        )  # fmt: skip
    if "left out" in found.provenance:
        say(str(found.provenance["left out"]))
    if "captions" in found.provenance:
        say("; ".join(f"{name} {about}" for name, about in found.provenance["captions"].items()))
    pictures = found.provenance["pictures"].items()
    if small := [f"{part['enlarged']:,} of {part['count']:,} {name}" for name, part in pictures if part["enlarged"]]:
        say(f"smaller than the tokenizer's pictures, and enlarged: {', '.join(small)}")
    for name, finding in found.findings.items():
        say(f"{name}: {finding.summary}")
    for name, reason in found.unavailable.items():
        say(f"{name}: not measured ({reason})")
    say(f"diagnosis: {write_diagnosis(found, options.out, overwrite=options.overwrite)}")
