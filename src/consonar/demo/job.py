"""The main job on real data: plain AR and reAR on OpenMoji, each then post-trained by VA-pi and by its control.

It opens with pictures of a generator in the package, measures how fast this machine is, and fits the job to the minutes
given. Same seed, data order, steps and samples for the runs of a comparison; one page at the end.

Every step that is finished is skipped when the demo is called again, so that an interrupted one goes on, as planned.
"""

import shutil
import time
from dataclasses import asdict, replace
from itertools import count, pairwise
from pathlib import Path

import torch

from consonar.components import load_generator, load_own_tokenizer, load_tokenizer, read_origin
from consonar.data.openmoji import OpenMoji
from consonar.data.picture_files import save_grid
from consonar.data.sources import open_source
from consonar.data.store_format import METADATA_FILE
from consonar.data.tokenizing import write_token_store
from consonar.demo import plan
from consonar.demo.plan import PARTS, POST_TRAINING, RUNS, TEMPERATURES, Progress, Rate, Say, Work, config_of
from consonar.distributed import pick_device
from consonar.errors import UserError
from consonar.evaluation.features import cached_features
from consonar.evaluation.inputs import ReferenceSet, encode_reference, open_reference
from consonar.evaluation.results import is_measured
from consonar.evaluation.runs import RunSettings, evaluate_run
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.lock import hold, is_taken
from consonar.files.readers import read_json
from consonar.files.weights import is_component
from consonar.files.writers import write_json
from consonar.json_types import Json, JsonMap
from consonar.networks import load_feature_network
from consonar.options import Range
from consonar.report import write_report
from consonar.sampling.job import MOST_IMAGES
from consonar.sampling.sample import SamplerConfig, sample
from consonar.seeding import check_seed
from consonar.training.config import TrainConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics
from consonar.types import Tokenizer

TOKENIZER = "openmoji-64"
OPENING, OPENING_SAMPLER, PER_CLASS = "openmoji", SamplerConfig(temperature=0.8), 8
"""The generator whose pictures come first, how they are drawn, and how many of each class."""
MOST_MINUTES = 100_000
STORES = {"train": ("tokens", "center_flip"), "validation": ("tokens-validation", "center")}
"""Folder and views of the tokens of each split."""
PROBE_STEPS, PROBE_ITEMS, PROBE_SAMPLES = 4, 128, (32, 96)
"""What is run to measure this machine: steps of every kind of training, validation items, samples of two rows."""


def run_demo(out: Path, *, minutes: float, seed: int, say: Say) -> Path:
    """Draws `out`/opening.png, measures this machine, trains and measures all runs, and returns `out`/report.html.

    The number of steps, updates and samples is what fits into `minutes` here; it is decided once and kept in
    `out`/demo.json. Raises `UserError` when `out` holds a demo with other minutes or another seed, or something
    else, and when another process is at it.
    """
    Range(0, MOST_MINUTES, "(]").check("--minutes", minutes)
    check_seed(seed, "--seed", MOST_IMAGES)
    with hold(out):
        stored, page = claim(out, {"minutes": minutes, "seed": seed}), out / "report.html"
        if page.exists():
            say(f"{page} is there already; remove {out} to run the demo again")
            return page
        began = time.monotonic()
        tokenizer = load_tokenizer(TOKENIZER).to(pick_device())
        drawing = draw_opening(out / "opening.png", pick_device(), say)
        if drawing is not None and "seconds" not in stored:
            say(plan.first_guess(drawing, minutes))
        reference = open_reference(TOKENIZER, tokenizer.image_size)
        if "seconds" not in stored:
            stored |= make_plan(out, stored, reference, tokenizer, began, say)
            write_json(out / "demo.json", stored)
        work, progress = Work(stored["steps"], stored["updates"], stored["samples"]), Progress(stored["seconds"], say)
        progress.skip("preparing")
        with progress.piece("tokens", "of the training images"):
            make_tokens(out, "train", tokenizer)
        with progress.piece("reference", "tokens of all images"):
            target = encode_reference(reference, tokenizer)
        for name in PARTS:
            train_part(name, out, work, seed, progress)
        for name in PARTS:
            measure_part(name, out, work, seed, target, progress)
        with progress.piece("page"):
            runs = [out / name for start in RUNS for name in (start, *(f"{start}-{post}" for post in POST_TRAINING))]
            write_report(runs, page, title="Plain AR, reAR and VA-pi on OpenMoji", opening=out / "opening.png")
        say(f"done in {(time.monotonic() - began) / 60:.1f} minutes")
        return page


def draw_opening(path: Path, device: torch.device, say: Say) -> float | None:
    """A grid of the shipped generator's pictures, one row per class: the seconds of drawing it; None: it was there."""
    if path.exists():
        return None
    generator, names = load_generator(OPENING).to(device), read_origin(OPENING).class_names or ()
    tokenizer = load_own_tokenizer(OPENING).to(device)
    labels = [label for label in range(generator.num_classes) for _ in range(PER_CLASS)]
    began = time.monotonic()
    drawn = sample(generator, tokenizer, labels, config=OPENING_SAMPLER)
    seconds = time.monotonic() - began
    save_grid(drawn.images, path, columns=PER_CLASS)
    say(f"{path}: drawn by the generator {OPENING!r} of the package; its rows: {', '.join(names)}")
    return seconds


def make_tokens(out: Path, split: str, tokenizer: Tokenizer) -> None:
    """The token store of the images of a split, unless it is there."""
    folder, views = STORES[split]
    if not (out / folder / METADATA_FILE).is_file():  # written last
        source = open_source("openmoji", split=split, image_size=tokenizer.image_size)
        write_token_store(out / folder, source, tokenizer, views=views)


def train_part(name: str, out: Path, work: Work, seed: int, progress: Progress) -> None:
    """Trains one run, or goes on with it."""
    piece, config, run = f"training {name}", config_of(name, out, work, seed), out / name
    if is_component(run / "model"):
        progress.skip(piece)
        return
    steps, unit = config.loop.steps, "step" if name in RUNS else "update"
    with progress.piece(piece, f"{steps} {unit}s"):
        train(
            config, run, resume=(run / "config.json").exists(), quiet=True,
            on_step=lambda step: progress.at(step / steps, f"{unit} {step} of {steps}"),
        )  # fmt: skip


def measure_part(name: str, out: Path, work: Work, seed: int, target: ReferenceSet, progress: Progress) -> None:
    """Samples and measures one run at every temperature."""
    piece, trained, rows = f"measuring {name}", name in RUNS, plan.rows_of(PARTS[name])
    if is_measured(out / name):
        progress.skip(piece)
        return
    done = count()
    settings = RunSettings(
        temperatures=TEMPERATURES, match=[out / f"{name}-vapi"] if trained else (), num_samples=work.samples, seed=seed,
        reconstruct=trained, device=str(pick_device()),
    )  # fmt: skip
    with progress.piece(piece, f"{rows} x {work.samples} samples"):
        evaluate_run(
            out / name, settings, reference=TOKENIZER, target=target, overwrite=True,
            progress=lambda text: progress.at(next(done) / rows, text.removeprefix(f"{name}: ")),
        )  # fmt: skip


def make_plan(
    out: Path, settings: JsonMap, reference: ReferenceSet, tokenizer: Tokenizer, began: float, say: Say
) -> Json:
    """Measures this machine, says how long the whole job takes, and returns what demo.json keeps of it."""
    say("measuring this machine: some steps of every kind")
    minutes = settings["minutes"]
    rates = measure_machine(out / ".measure", out, reference, tokenizer, settings["seed"])
    spent = time.monotonic() - began
    work = plan.most_work(60 * minutes - spent, rates)
    planned = {"preparing": spent, **plan.seconds_of(work, rates)}
    whole = sum(planned.values()) / 60
    speed = ", ".join(f"{kind} {rates[kind].each:.2g}" for kind in (*RUNS, *POST_TRAINING))
    say(f"seconds per step here: {speed}; per sample: {rates['row'].each:.2g}")
    short = f", the least there is: {minutes:g} are too few" if whole > minutes * 1.05 else ""
    say(
        f"the whole takes about {whole:.0f} minutes here{short}: {work.steps} steps for {' and '.join(RUNS)}, "
        f"{work.updates} updates for each post-training run, {work.samples} samples per row"
    )
    return {**asdict(work), "seconds": planned, "rates": {kind: asdict(rate) for kind, rate in rates.items()}}


def measure_machine(
    folder: Path, out: Path, reference: ReferenceSet, tokenizer: Tokenizer, seed: int
) -> dict[str, Rate]:
    """Rates of everything the job does, from little of it in `folder`, which is removed. Only the validation images are
    encoded and seen by the feature network here, in the place of the training images too."""
    shutil.rmtree(folder, ignore_errors=True)
    device, total = str(pick_device()), len(OpenMoji("train", tokenizer.image_size))
    held_out, stamps = reference.images["validation"], [time.monotonic()]
    target = encode_reference(replace(reference, images=dict.fromkeys(("train", "validation"), held_out)), tokenizer)
    stamps.append(time.monotonic())
    settings = EvaluationSettings(device=device)
    with settings.multiplying():
        cached_features(load_feature_network("efficientnet-lite0", device), held_out, settings)
    stamps.append(time.monotonic())
    seen, (twice, features) = len((target.tokens or {})["validation"]), [b - a for a, b in pairwise(stamps)]
    # The training tokens are of two views, the reference's of one.
    images = {"tokens": total * twice, "reference": (total + seen) * twice / 2, "features": total * features}
    rates = {piece: Rate(seconds / seen) for piece, seconds in images.items()}
    make_tokens(out, "validation", tokenizer)
    for name, kind in PARTS.items():
        if kind not in rates:
            config = config_of(name, out, Work(PROBE_STEPS, PROBE_STEPS, 0), seed)
            rates[kind] = measure_training(folder, config, plan.VALIDATIONS[kind] * seen / PROBE_ITEMS)
    (_, few), (setup, many) = (
        measure_evaluation(
            folder, target, RunSettings(num_samples=samples, seed=seed, reconstruct=False, device=device)
        )
        for samples in PROBE_SAMPLES
    )
    shutil.rmtree(folder)
    row = plan.rate_through(*zip(PROBE_SAMPLES, (few, many), strict=True))
    return {**rates, "measuring": Rate(setup), "row": row}


def measure_training(folder: Path, config: TrainConfig, validations: float) -> Rate:
    """The rate of runs with so many `validations` (on `PROBE_ITEMS`), from the first steps of one."""
    tokens = f"{config.data.tokens}-validation" if config.data.tokens else None
    config = replace(
        config,
        init=str(folder / Path(config.init).name) if config.init else None,
        data=replace(config.data, tokens=tokens, validation_tokens=tokens, validation_items=PROBE_ITEMS),
        loop=replace(config.loop, log_every=1, validate_every=0, save_every=0),
    )
    out, began = folder / str(config.recipe), time.monotonic()
    train(config, out, quiet=True)
    return plan.training_rate(read_metrics(out / "metrics.jsonl"), time.monotonic() - began, validations)


def measure_evaluation(folder: Path, target: ReferenceSet, settings: RunSettings) -> tuple[float, float]:
    """Seconds of what measuring the first of the runs begins with, and of its row of results."""
    stamps = [time.monotonic()]
    evaluate_run(
        folder / next(iter(RUNS)), settings, reference=TOKENIZER, target=target, overwrite=True,
        progress=lambda _: stamps.append(time.monotonic()),
    )  # fmt: skip
    return stamps[1] - stamps[0], time.monotonic() - stamps[-1]


def claim(out: Path, settings: Json) -> Json:
    """Makes `out` this demo's folder, or checks that it is; returns what its demo.json holds."""
    path = out / "demo.json"
    if not path.exists():
        if is_taken(out):
            raise UserError(f"--out: {out} exists and holds no demo; choose another folder")
        write_json(path, settings)
        return settings
    stored = read_json(path, "remove the folder or choose another --out")
    for key, value in settings.items():
        if stored.get(key) != value:
            raise UserError(
                f"--{key}: {value:g}, but the demo in {out} was started with {stored.get(key)}; "
                "remove it or choose another --out"
            )
    if "steps" in stored and not {f"training {name}" for name in PARTS} <= stored.get("seconds", {}).keys():
        raise UserError(f"--out: the demo in {out} was planned by an older version; remove it or choose another --out")
    return stored
