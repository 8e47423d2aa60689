"""The command `evaluate`: of samples, of a run, which is a generator that is sampled first, or of a tokenizer."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from consonar import memory
from consonar.cli import counting, say
from consonar.cli.compositional import score_of_run, score_of_samples, show_benchmark
from consonar.cli.measured import beside, is_tokenizer, keeps_results, print_metrics, say_about, say_bad, show_check
from consonar.cli.parsing import BadImageGroup, check_read, numbers_in
from consonar.components import load_generator, load_own_text_encoder
from consonar.data.bad_images import BadImages
from consonar.distributed import World, failing_together, joined
from consonar.errors import UserError, unknown
from consonar.evaluation.check import check_results
from consonar.evaluation.compositional import PromptSettings
from consonar.evaluation.evaluate import evaluate, open_target
from consonar.evaluation.inputs import load_samples
from consonar.evaluation.reconstruction import evaluate_tokenizer
from consonar.evaluation.results import RECONSTRUCTION, Measurement, check_place, write_results
from consonar.evaluation.runs import RunSettings, evaluate_run
from consonar.evaluation.sample_metrics import check_metrics
from consonar.evaluation.settings import EvaluationSettings
from consonar.model_folders import SHIPPED
from consonar.networks import load_feature_network
from consonar.precision import pick_precision
from consonar.seeding import check_seed

NETWORK = "efficientnet-lite0"
NOT_SMALLER = "no setting takes less, another --device may have more"
Settings = TypeVar("Settings", bound=EvaluationSettings)


@dataclass(frozen=True, kw_only=True)
class Options:
    samples: tyro.conf.Positional[Path | None] = None
    """Samples, or a run folder: a generator is sampled, a tokenizer (a run, the folder of a converted one, openmoji-64,
    ...) reconstructs the validation images; the results are written into the folder, where `consonar report` finds
    those of a run."""
    reference: str | None = None
    """openmoji-64, cifar10, an .npz of images or statistics, a folder, hf:owner/name."""
    data: str | None = None
    """The same by another name, of a tokenizer: the images to reconstruct (default: those it was trained on, where they
    are known; of these, however spelled, the held-out ones)."""
    validation_split: str | None = None
    """Images of the reference to compare with as validation images: the name of a split, or a share of those to train
    on, such as 5%, which `tokenize` and `train` hold out (default: the split validation, else test, else none)."""
    feature_network: str | None = None
    """efficientnet-lite0 (default, offline), inception (FID as in the ADM evaluator, torch-fidelity),
    inception-pytorch-fid, or inception:FILE, dinov2:FOLDER, clip:FOLDER; the weights of all but the first you bring
    (docs/evaluation.md)."""
    perceptual: str | None = None
    """Of a tokenizer: efficientnet-lite0 (default, of images of 32 px or more) or lpips (you bring its VGG weights)."""
    metrics: str = ""
    """Of samples and runs: what is calculated, e.g. fd,kid,precision,recall,density,coverage (default: all but
    fd-infinity and fd-per-class)."""
    out: Path | None = None
    """Where to write the results of samples, or of a tokenizer, which then go nowhere else (JSON)."""
    prompts: str | None = None
    """Instead of --reference, for generators of captions: does every picture of a scene show what its prompt says?
    scenes-validation[:COUNT] (400 held-out captions), a file of such captions, or, of samples, stored: those that they
    were drawn for (docs/text-to-image.md)."""
    format: str | None = None
    """geneval, geneval2 or dpg: SAMPLES is what the scorer of this benchmark wrote, and --prompts its own file."""
    per_prompt: int = 4
    """Of a run with --prompts: pictures of each."""
    tokenizer: str | None = None
    """Without SAMPLES: the one to measure, by name or folder. Of samples: their tokenizer, for the copy rate in tokens
    and the ceiling of --prompts (default: the one that the file names, when it is a shipped one)."""
    temperatures: str = "1"
    """Of a run: the grid, e.g. 1,0.9,0.8."""
    guidance_scales: str = ""
    """Of a run: classifier-free guidance, every temperature at each of these, e.g. 1,2,4 (default: none)."""
    match: tuple[Path, ...] = ()
    """Of a run: other runs; each adds the temperature at which this one has its teacher-forced entropy."""
    num_samples: int = 2048
    """Of a run: images drawn per temperature."""
    draws: int = 4
    """Disjoint parts whose spread is reported."""
    seed: int = 0
    """Of a run's first sample, and of the parts."""
    batch_size: int = 64
    """Images per call of a network."""
    precision: str = "fp32"
    """What the networks multiply in, those of a run that draw included: fp32, tf32 or bf16; docs/gpu.md."""
    device: str = "auto"
    """auto, cpu or cuda."""
    bad: BadImageGroup
    check: Path | None = None
    """A file of results: measure again what it records, and say whether it reproduces (status 1: it does not). SAMPLES,
    --reference (--data), --tokenizer and --feature-network then say where these lie now, if not where they lay."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace results that are there."""


def command(options: Options) -> None:
    if options.data is not None and options.reference is not None:
        raise UserError("--data: given together with --reference, which says the same; keep one")
    with joined(options.device, "--device") as world, failing_together(world):
        if options.check is None:
            measure(options, world)
            return
        if world.size > 1:
            raise UserError("--check: is for one process; leave torchrun away")
        check(options, options.check, str(world.device))


def measure(options: Options, world: World) -> None:
    """In each of the processes that share it; the first one says and writes what there is."""
    place, out = options.samples, options.out
    if options.format is not None or options.prompts is not None:
        measure_prompts(options, options.prompts, world)
        return
    check_read(options, ("per_prompt",), "with --prompts")
    pick_precision(options.precision, world.device, "--precision", "measuring")
    if (codec := tokenizer_meant(options)) is not None:
        with memory.explained(f"lower --batch-size ({options.batch_size})", world.device):
            measure_tokenizer(options, codec, world)
        return
    check_read(options, ("data", "perceptual"), "where a tokenizer is measured")
    if place is None or options.reference is None:
        missing = "name samples, a run folder or a tokenizer" if place is None else "--reference: missing; name one"
        raise UserError(f"evaluate: {missing}, or a file of results with --check")
    is_run = keeps_results(place, f"--num-samples {options.num_samples}")
    if not place.exists():
        raise unknown("evaluate", str(place), ["samples (.npz, a folder)", "a run folder", *SHIPPED["tokenizer"]])
    if is_run and out is not None:
        raise UserError("--out: the results of a run are written into its folder; leave --out away")
    if is_run and options.tokenizer is not None:
        raise UserError("--tokenizer: a run knows its own; leave --tokenizer away")
    bad = options.bad.policy(place / "bad-images-evaluation.txt" if is_run else beside(out))
    with memory.explained(f"lower --batch-size ({options.batch_size})", world.device):
        (measure_generator if is_run else measure_samples)(options, place, options.reference, world, bad)
    say_bad(bad, world)


def tokenizer_meant(options: Options) -> Path | str | None:
    """The tokenizer that is to be measured, a folder or a name; None where samples or a generator are."""
    place = options.samples
    if place is None:
        return options.tokenizer
    is_name = not place.exists() and str(place) in SHIPPED["tokenizer"]
    found = str(place) if is_name else place if is_tokenizer(place) else None
    if found is not None and options.tokenizer is not None:
        raise UserError(f"--tokenizer: {place} is the tokenizer that is measured; leave --tokenizer away")
    return found


def check(options: Options, path: Path, device: str) -> None:
    """Whether the results in `path` reproduce; the process ends with status 1 where they do not."""
    read = ("samples", "reference", "data", "tokenizer", "feature_network", "device", "check", "bad")
    unread = [item.name for item in fields(options) if item.name not in read]
    check_read(options, unread, "without --check, which measures as it was measured")
    check_read(options.bad, BAD_IMAGES, "without --check")
    with memory.explained(NOT_SMALLER, torch.device(device)):
        found = check_results(
            path, samples=options.samples, reference=options.reference or options.data, tokenizer=options.tokenizer,
            feature_network=options.feature_network, device=device, progress=say,
        )  # fmt: skip
    show_check(found, str(path))
    if not found.reproduced:
        sys.exit(1)


def settings_of(kind: type[Settings], options: Options, device: str, **given: object) -> Settings:
    """The settings of measuring that options of the same names say, but for those `given`."""
    metrics = tuple(word.strip() for word in options.metrics.split(",")) if options.metrics else ()
    shared = {item.name for item in fields(kind)} & vars(options).keys()
    named: dict[str, Any] = {name: getattr(options, name) for name in shared}
    return kind(**named | {"metrics": metrics, "device": device} | given)


NOT_KEPT = "results: in no file; --out FILE keeps them with what they are of, as --check needs it"
BAD_IMAGES = ("bad_images", "bad_images_limit")
OF_DRAWING = ("per_prompt", "guidance_scales", "temperatures")
"""Options that say how a run is asked."""


def measure_prompts(options: Options, prompts: str | None, world: World) -> None:
    """The compositional score, of a run or of samples; or what the scorer of a benchmark found."""
    place = options.samples
    of_others = ("validation_split", "feature_network", "perceptual", "metrics", "match", "num_samples", "draws")
    unread = ("reference", "data", *of_others)
    check_read(options, unread, "without --prompts and --format")
    check_read(options.bad, BAD_IMAGES, "without --prompts and --format")
    if place is None or not place.exists():
        if place is not None:
            if (name := str(place)) in SHIPPED["generator"]:
                load_own_text_encoder(name, load_generator(name))  # refuses one of classes
            keeps_results(place, "--prompts FILE")  # refuses a generator of the package
        raise UserError(f"{place or 'evaluate'}: no such file or folder; name samples, or a run folder")
    if options.format is not None or prompts is None:
        read = ("samples", "format", "prompts", "out", "overwrite", *unread, "device", "bad", "check")
        check_read(options, [item.name for item in fields(options) if item.name not in read], "without --format")
        if world.is_main:
            show_benchmark(str(options.format), place, prompts, options.out, overwrite=options.overwrite)
        return
    is_run, of_samples = (place / "config.json").is_file(), (*OF_DRAWING, "batch_size", "precision")
    check_read(options, ("out", "tokenizer") if is_run else of_samples, "of samples" if is_run else "of a run")
    settings = PromptSettings(
        per_prompt=options.per_prompt, temperatures=numbers_in(options.temperatures, "--temperatures"),
        guidance_scales=numbers_in(options.guidance_scales or "1", "--guidance-scales"), seed=options.seed,
        batch_size=options.batch_size, precision=options.precision, device=str(world.device),
    )  # fmt: skip
    with memory.explained(f"lower --batch-size ({options.batch_size})", world.device):
        if is_run:
            score_of_run(place, prompts, settings, overwrite=options.overwrite, world=world)
        elif world.is_main:
            score_of_samples(place, prompts, options.tokenizer, settings, options.out, overwrite=options.overwrite)


def measure_tokenizer(options: Options, name: Path | str, world: World) -> None:
    """Into its folder; of one that has a name, and none of its own, or with --out: there, or nowhere."""
    unread = ("metrics", "temperatures", "guidance_scales", "match", "num_samples", "draws", "seed")
    check_read(options, unread, "where samples of a generator are measured")
    out, has_folder = options.out, name not in SHIPPED["tokenizer"] and Path(name).is_dir()
    into = Path(name) if has_folder and out is None else None
    check_read(options, ("overwrite",) if into is None and out is None else (), "with --out")
    if out is not None:
        check_place(out, overwrite=options.overwrite, key="--out", keys={"psnr", "origin"})
    bad = options.bad.policy(beside(out) if into is None else into / "bad-images-evaluation.txt")
    content = evaluate_tokenizer(
        name, reference=options.reference or options.data, into=into,
        feature_network=options.feature_network or NETWORK, perceptual=options.perceptual,
        batch_size=options.batch_size, device=str(world.device), precision=options.precision,
        overwrite=options.overwrite, validation_split=options.validation_split, bad=bad, world=world,
    )  # fmt: skip
    if world.is_main:
        origin = content.pop("origin")
        print_metrics({key: Measurement(value) for key, value in content.items()}, str(name))
        say_about(origin["protocol"], {}, origin["remarks"])
        if out is not None:
            now = {**content, "origin": origin}
            write_results(out, now, overwrite=options.overwrite, key="--out", keys={"psnr", "origin"})
        path = into / RECONSTRUCTION if into else out
        say(f"results: {path}" if path else NOT_KEPT)
    say_bad(bad, world)


def measure_generator(options: Options, place: Path, reference: str, world: World, bad: BadImages) -> None:
    temperatures = numbers_in(options.temperatures, "--temperatures")
    scales = numbers_in(options.guidance_scales, "--guidance-scales") if options.guidance_scales else []
    settings = settings_of(RunSettings, options, str(world.device), temperatures=temperatures, guidance_scales=scales)
    content = evaluate_run(
        place, settings, reference=reference, feature_network=options.feature_network or NETWORK,
        overwrite=options.overwrite, bad=bad, progress=say if world.is_main else lambda text: None, world=world,
    )  # fmt: skip
    if not world.is_main:
        return
    for row in content["rows"]:
        metrics = {name: Measurement(**found) for name, found in row["metrics"].items()}
        guided = f", guidance {row['guidance_scale']:g}" if scales else ""
        matched = f", entropy of {row['matched_to']}" if "matched_to" in row else ""
        print_metrics(metrics, f"temperature {row['temperature']:g}{guided}{matched}")
    say_about(content["protocol"], content["unavailable"], content["remarks"])
    say(f"results: {place / 'results.json'}")


def measure_samples(options: Options, place: Path, reference: str, world: World, bad: BadImages) -> None:
    """A sample file or folder; in tokens too when the file has them and their tokenizer is at hand."""
    out, tokenizer = options.out, options.tokenizer
    check_read(
        options,
        ("temperatures", "guidance_scales", "match", "num_samples"),
        f"with the run folder of a generator, not {place}",
    )
    check_read(options, ("overwrite",) if out is None else (), "with --out")
    check_seed(options.seed, "--seed")
    if out is not None:
        check_place(out, overwrite=options.overwrite, key="--out")
    device = str(world.device)
    measured = settings_of(EvaluationSettings, options, device)
    check_metrics(measured)
    samples = load_samples(place, bad=bad)
    measured.check_parts(samples.count, str(place))
    # Now, for what is wrong is found before pictures are read.
    network = load_feature_network(options.feature_network or NETWORK, device)
    target = open_target(samples, reference, tokenizer, measured, bad, world)
    if target.about and world.is_main:
        say(f"reference: {target.about}")
    with counting("evaluate", world.is_main) as count:
        results = evaluate(
            samples, target, measured, feature_network=network,
            progress=lambda name, done, total: count(done, total, name[-32:]), world=world,
        )  # fmt: skip
    if not world.is_main:
        return
    print_metrics(results.metrics, str(place))
    say_about(results.protocol, results.unavailable, results.remarks)
    if out is not None:
        results.to_json(out, overwrite=options.overwrite)
    say(f"results: {out}" if out else NOT_KEPT)
