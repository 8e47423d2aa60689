"""The command `sample`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from consonar import memory
from consonar.cli import counting, say
from consonar.cli.parsing import check_name
from consonar.cli.prompts import prompts_for, read_prompts
from consonar.components import load_generator, load_own_tokenizer, load_tokenizer, read_origin
from consonar.distributed import joined
from consonar.errors import UserError, check_choice, unknown
from consonar.files.shared_work import parts_of
from consonar.origin import same_text
from consonar.precision import pick_precision
from consonar.sampling.exports import PER_PROMPT, BenchmarkPrompts, read_benchmark, write_export
from consonar.sampling.job import Job, balanced_labels, check_count, check_new, run_job
from consonar.sampling.sample import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    generator: tyro.conf.Positional[str]
    """Run folder, model folder, or a shipped generator (openmoji)."""
    out: Path
    """samples.png (one grid), samples.npz (ADM layout), or a folder."""
    sampler: Annotated[SamplerConfig, tyro.conf.arg(name="")] = field(default_factory=SamplerConfig)
    classes: str | None = None
    """Class ids or names, e.g. 0,3,3,7 or "Food & Drink" (default: all classes in turn)."""
    prompt: str | None = None
    """What to show, in words, for a generator of captions."""
    prompts: Path | None = None
    """File of prompts: .txt, one a line, .jsonl with an entry "prompt" each, or .json, a list of either."""
    num_samples: int | None = None
    """How many images (default: one per class or prompt given). Those given repeat in turn; without any classes all
    are drawn equally often, and of more classes than images those at equal steps."""
    per_prompt: int | None = None
    """In the place of --num-samples: images of each prompt, which follow each other."""
    format: str | None = None
    """geneval, geneval2 or dpg: write the folder that the scorer of this benchmark reads, from its own file of
    --prompts (docs/evaluation.md)."""
    text_encoder: str | None = None
    """What reads prompts (default: what the generator was trained with): minilm, a folder, OWNER/NAME."""
    tokenizer: str | None = None
    """Name or folder (default: the one it was trained with)."""
    image_size: int | None = None
    """Pixels that pictures are reduced to, bicubic, such as 256 of 384 for ADM's reference (default: as decoded)."""
    seed: int = 0
    """Seed of the first image; image i has seed + i."""
    batch_size: int = 64
    """Images drawn together; by rounding it can change a token now and then (docs/sampling.md)."""
    precision: str = "auto"
    """auto (bf16 on a GPU that has it, else fp32), fp32, tf32 or bf16; docs/gpu.md."""
    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile the decoder, which takes about a minute: for many thousand images."""
    device: str = "auto"
    """auto, cpu or cuda."""


def command(options: Options) -> None:
    check_name(options.out)
    if not parts_of(options.out).exists():  # else a job that was ended while it tidied goes on to do so
        check_new(options.out)
    asked = benchmark_prompts(options)
    texts = asked_in_words(options) if asked is None else asked.texts
    with joined(options.device, "--device") as world:
        precision = pick_precision(options.precision, world.device, "--precision", "sampling")
        model = load_generator(options.generator)
        own = load_own_tokenizer(options.generator) if options.tokenizer is None else None
        codec = own or load_tokenizer(str(options.tokenizer), num_tokens=model.num_tokens)
        origin = read_origin(options.generator)
        if texts:
            prompts = prompts_for(model, options.generator, texts, options.text_encoder, world.device)
            labels = numbers_of_prompts(options, len(texts))
        else:
            prompts = None
            labels = class_list(options.classes, options.num_samples, model.num_classes, origin.class_names or ())
        job = Job(
            model, codec, labels, seed=options.seed, sampler=options.sampler, source=options.generator, origin=origin,
            precision=precision, device=world.device, compile=options.compile, prompts=prompts,
            image_size=options.image_size,
        )  # fmt: skip
        smaller = f"lower --batch-size ({options.batch_size})"
        with counting("sample", world.is_main) as count, memory.explained(smaller, world.device):
            progress = partial(count, total=len(labels))
            run_job(
                job, options.out, batch_size=options.batch_size, progress=progress, world=world,
                arrange=None if asked is None else partial(write_export, asked, len(labels) // len(texts)),
            )  # fmt: skip
        if world.is_main:
            say(f"{len(labels)} images: {options.out}")


def asked_in_words(options: Options) -> Mapping[str, str]:
    """The prompts that are given, by where they stand; none where classes are drawn. `UserError` for options that
    nothing reads then."""
    if options.prompt is None and options.prompts is None:
        for key, value in (("--text-encoder", options.text_encoder), ("--per-prompt", options.per_prompt)):
            if value is not None:
                raise UserError(f"{key}: {value!r} is read only with --prompt or --prompts")
        return {}
    if options.classes is not None:
        raise UserError("--classes: given together with a prompt; a generator takes one or the other")
    return read_prompts(options.prompt, options.prompts)


def benchmark_prompts(options: Options) -> BenchmarkPrompts | None:
    """Those of `--format`; None without it. `UserError` for what its scorer could not read."""
    form, file = options.format, options.prompts
    if form is None:
        return None
    check_choice("--format", form, PER_PROMPT)
    if file is None or options.prompt is not None or options.classes is not None:
        raise UserError(f"--format: {form} takes its prompts from --prompts FILE alone")
    if options.out.suffix.lower() in (".png", ".npz"):
        raise UserError(f"--out: {options.out} is no folder, as --format {form} needs")
    if options.num_samples is not None:
        raise UserError(f"--num-samples: {options.num_samples}; with --format say --per-prompt")
    most = PER_PROMPT[form][1]
    count = PER_PROMPT[form][0] if options.per_prompt is None else options.per_prompt
    if not 1 <= count <= most or (form == "dpg" and count not in (1, 4)):
        raise UserError(f"--per-prompt: {count}; {form} reads {'1 or 4' if form == 'dpg' else f'1 to {most}'}")
    return read_benchmark(form, file)


def numbers_of_prompts(options: Options, count: int) -> Tensor:
    """The number of the prompt of every image, of `count` prompts."""
    each = PER_PROMPT[options.format][0] if options.format and options.per_prompt is None else options.per_prompt
    if each is None:
        return repeated(torch.arange(count), options.num_samples)
    if options.num_samples is not None:
        raise UserError("--per-prompt: given together with --num-samples; give one of them")
    if each < 1:
        raise UserError(f"--per-prompt: {each} is not 1 or more")
    check_count(each * count, f"--per-prompt: {each} of each of {count:,} prompts")
    return torch.arange(count).repeat_interleave(each)


def repeated(labels: Tensor, num_samples: int | None) -> Tensor:
    """The labels in turn until there are so many; None: each once."""
    if num_samples is None:
        return labels
    check_count(num_samples, "--num-samples")
    return labels[torch.arange(num_samples) % len(labels)]


def class_list(classes: str | None, num_samples: int | None, num_classes: int, names: Sequence[str] = ()) -> Tensor:
    """Class of every image, (n,) int64, from ids or `names` such as `0,3,Objects` and a count.

    Names count in any case where no class has them in that case. A number that is an id and the name of another class
    is the id, which is said. `UserError` for a word that is neither the id nor the name of a class.
    """
    if num_samples is not None:
        check_count(num_samples, "--num-samples")
    if classes is None or num_classes == 0:  # a class of a model without is refused where conditions are checked
        count = num_classes or 1
        return torch.arange(count) if num_samples is None else balanced_labels(num_samples, count)
    exact = {same_text(name): i for i, name in enumerate(names)}
    ids = exact | {str(i): i for i in range(num_classes)}
    count_of = Counter(map(str.casefold, exact))
    folded = {name.casefold(): i for name, i in exact.items() if count_of[name.casefold()] == 1}
    given = same_text(classes.strip())
    is_name = given in ids or given.casefold() in folded  # which may have commas
    chosen = []
    for word in [given] if is_name else [word.strip() for word in given.split(",")]:
        label = ids.get(word, folded.get(word.casefold()))
        if label is None:
            raise unknown("--classes", word, [f"0..{num_classes - 1}", *names[:20]])
        if exact.get(word, label) != label:
            say(f"--classes: {word} is the id of {names[label]!r} here; the class {word!r} has the id {exact[word]}")
        chosen.append(label)
    labels = torch.tensor(chosen, dtype=torch.int64)
    return repeated(labels, num_samples)
