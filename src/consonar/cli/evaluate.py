"""The command `evaluate`: of samples, or of a run, which is a generator that is sampled first or a tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from consonar import memory
from consonar.cli import counting, say
from consonar.cli.parsing import BadImageGroup
from consonar.components import load_tokenizer, read_component_kind
from consonar.data.bad_images import BadImages
from consonar.data.store_format import check_tokens
from consonar.distributed import pick_device
from consonar.errors import UserError
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.inputs import check_tokenizer, encode_reference, load_samples, open_reference
from consonar.evaluation.reconstruction import evaluate_tokenizer
from consonar.evaluation.results import RECONSTRUCTION, Measurement, check_place
from consonar.evaluation.runs import RunSettings, evaluate_run
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.readers import read_json
from consonar.model_folders import SHIPPED
from consonar.options import default
from consonar.origin import Origin
from consonar.precision import pick_precision
from consonar.seeding import check_seed


@dataclass(frozen=True, kw_only=True)
class Options:
    samples: tyro.conf.Positional[Path]
    """Samples, or a run folder: a generator is sampled, a tokenizer reconstructs the validation images; the results are
    written into the run, where `consonar report` finds them."""
    reference: str
    """openmoji-64, an .npz of images or statistics, a folder, hf:owner/name."""
    feature_network: str = "efficientnet-lite0"
    """efficientnet-lite0 (offline), inception (FID as in the ADM evaluator, torch-fidelity), inception-pytorch-fid, or
    dinov2:FOLDER, clip:FOLDER; the weights of all but the first you bring (docs/evaluation.md)."""
    metrics: str = ""
    """Of samples and runs: what is calculated, e.g. fd,kid,precision,recall,density,coverage (default: all but
    fd-infinity and fd-per-class)."""
    out: Path | None = None
    """Where to write the results of samples (JSON)."""
    tokenizer: str | None = None
    """Of samples: name or folder of their tokenizer, for the copy rate in tokens (default: the one that the file names,
    when it is a shipped one)."""
    temperatures: str = "1"
    """Of a run: the grid, e.g. 1,0.9,0.8."""
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
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace results that are there."""


def command(options: Options) -> None:
    place, out, device = options.samples, options.out, str(pick_device(options.device, "--device"))
    pick_precision(options.precision, torch.device(device), "--precision", "measuring")
    is_run = (place / "config.json").is_file() and (place / "metrics.jsonl").is_file()
    listing = out and out.with_name(f"{out.name}-bad-images.txt")
    bad = options.bad.policy(place / "bad-images-evaluation.txt" if is_run else listing)
    if not place.exists() and str(place) in SHIPPED["generator"]:
        raise UserError(
            f"evaluate: {place} is a shipped generator, which keeps no results; first "
            f"consonar sample {place} --num-samples {options.num_samples} --out {place}.npz, then evaluate that file"
        )
    if not place.exists():
        raise UserError(f"{place}: no such file or folder; name samples, or a run folder")
    smaller = f"lower --batch-size ({options.batch_size})"
    if not is_run:
        with memory.explained(smaller, torch.device(device)):
            measure_samples(options, device, bad)
    elif out is not None:
        raise UserError("--out: the results of a run are written into its folder; leave --out away")
    elif options.tokenizer is not None:
        raise UserError("--tokenizer: a run knows its own; leave --tokenizer away")
    elif read_component_kind(place) == "tokenizer":
        with memory.explained("no setting takes less, another --device may have more", torch.device(device)):
            measure_tokenizer(options, device, bad)
    else:
        with memory.explained(smaller, torch.device(device)):
            measure_generator(options, device, bad)
    if bad.note:
        say(bad.note)
        bad.write()


def check_read(options: Options, unread: Sequence[str], why: str) -> None:
    """Raises `UserError` for the first of the options `unread` that is not at its default."""
    for name in unread:
        if (value := getattr(options, name)) != default(options, name):
            value = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"--{name.replace('_', '-')}: {value!r} is read only {why}; leave it away")


def chosen_metrics(options: Options) -> tuple[str, ...]:
    return tuple(word.strip() for word in options.metrics.split(",")) if options.metrics else ()


def measure_tokenizer(options: Options, device: str, bad: BadImages) -> None:
    unread = ("metrics", "temperatures", "match", "num_samples", "draws", "seed", "batch_size")
    check_read(options, unread, "where samples of a generator are measured")
    metrics = evaluate_tokenizer(
        options.samples, reference=options.reference, feature_network=options.feature_network, device=device,
        precision=options.precision, overwrite=options.overwrite, bad=bad,
    )  # fmt: skip
    print_metrics({name: Measurement(value) for name, value in metrics.items()}, str(options.samples))
    say(read_json(options.samples / RECONSTRUCTION)["origin"]["protocol"])


def measure_generator(options: Options, device: str, bad: BadImages) -> None:
    try:
        temperatures = [float(word) for word in options.temperatures.split(",")]
    except ValueError as error:
        given = options.temperatures
        raise UserError(f"--temperatures: {given!r} is not a list of numbers such as 1,0.9,0.8") from error
    settings = RunSettings(
        temperatures=temperatures, match=options.match, num_samples=options.num_samples,
        draws=options.draws, seed=options.seed, batch_size=options.batch_size, device=device,
        precision=options.precision, metrics=chosen_metrics(options),
    )  # fmt: skip
    content = evaluate_run(
        options.samples, settings, reference=options.reference, feature_network=options.feature_network,
        overwrite=options.overwrite, bad=bad, progress=say,
    )  # fmt: skip
    for row in content["rows"]:
        metrics = {name: Measurement(**found) for name, found in row["metrics"].items()}
        print_metrics(metrics, f"temperature {row['temperature']:g}")
    for remark in (content["protocol"], *content["remarks"]):
        say(remark)
    say(f"results: {options.samples / 'results.json'}")


def measure_samples(options: Options, device: str, bad: BadImages) -> None:
    """A sample file or folder; in tokens too when the file has them and their tokenizer is at hand."""
    path, out, tokenizer = options.samples, options.out, options.tokenizer
    check_read(options, ("temperatures", "match", "num_samples"), f"with the run folder of a generator, not {path}")
    check_read(options, ("overwrite",) if out is None else (), "with --out")
    check_seed(options.seed, "--seed")
    if out is not None:
        check_place(out, overwrite=options.overwrite, key="--out")
    samples = load_samples(path, bad=bad)
    if tokenizer is not None and samples.tokens is None:
        raise UserError(f"--tokenizer: {tokenizer!r} is read only for samples with tokens, and {path} has none")
    target = open_reference(options.reference, samples.image_size, bad=bad)
    settings = samples.settings or {}
    name = tokenizer or (named if (named := settings.get("tokenizer")) in SHIPPED["tokenizer"] else None)
    if name is not None and samples.tokens is not None:
        codec = load_tokenizer(name).to(device)
        if tokenizer is not None or settings.get("tokenizer_fingerprint") in (None, codec.fingerprint):
            check_tokenizer(samples, Origin(tokenizer=name, tokenizer_fingerprint=codec.fingerprint))
            check_tokens(samples.tokens.numpy(), codec.vocab_size, codec.name, str(path))
            target = encode_reference(target, codec, precision=options.precision)  # else it is another's of that name
    if target.about:
        say(f"reference: {target.about}")
    measured = EvaluationSettings(
        draws=options.draws, seed=options.seed, batch_size=options.batch_size, device=device,
        precision=options.precision, metrics=chosen_metrics(options),
    )  # fmt: skip
    with counting("evaluate") as count:
        results = evaluate(
            samples, target, measured, feature_network=options.feature_network,
            progress=lambda name, done: count(done, None),
        )  # fmt: skip
    print_metrics(results.metrics, str(path))
    say(results.protocol)
    for metric, reason in results.unavailable.items():
        say(f"{metric}: not measured ({reason})")
    for remark in results.remarks:
        say(remark)
    if out is not None:
        results.to_json(out, overwrite=options.overwrite)
        say(f"results: {out}")


def print_metrics(metrics: Mapping[str, Measurement], title: str) -> None:
    extra = ["spread", *(["error"] if any(found.error is not None for found in metrics.values()) else [])]
    table = Table("metric", "value", *extra, title=title, title_justify="left")
    for name, found in metrics.items():
        numbers = [getattr(found, column) for column in extra]
        table.add_row(name, f"{found.value:.4g}", *("" if one is None else f"{one:.2g}" for one in numbers))
    Console(highlight=False).print(table)
