"""Commands that measure and show: evaluate, report."""

from pathlib import Path
from typing import Any

import tyro

from consonar.cli.console import counting, print_metrics, say
from consonar.cli.parsing import check_bad_images, check_output, check_read
from consonar.data.bad_images import BadImages
from consonar.errors import UserError
from consonar.origin import Origin


def evaluate(
    samples: tyro.conf.Positional[Path],
    *,
    reference: str,
    feature_network: str = "efficientnet-lite0",
    out: Path | None = None,
    tokenizer: str | None = None,
    temperatures: str = "1",
    match: tuple[Path, ...] = (),
    num_samples: int = 2048,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    bad_images: str = "stop",
    bad_images_limit: float = 0.01,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Measure samples (.npz or a folder of images), a trained generator over a grid of temperatures, or a tokenizer.

    Args:
        samples: Samples, or a run folder: a generator is sampled, a tokenizer reconstructs the validation images;
            the results are written into the run, where `consonar report` finds them.
        reference: openmoji-64, an .npz of images or statistics, a folder, hf:owner/name.
        feature_network: efficientnet-lite0 (offline), inception (FID as in the ADM evaluator, torch-fidelity) or
            inception-pytorch-fid; the Inception weights are a file that you bring (docs/evaluation.md).
        out: Where to write the results of samples (JSON).
        tokenizer: Of samples: name or folder of their tokenizer, for the copy rate in tokens (default: the one that
            the file names, when it is a shipped one).
        temperatures: Of a run: the grid, e.g. 1,0.9,0.8.
        match: Of a run: other runs; each adds the temperature at which this one has its teacher-forced entropy.
        num_samples: Of a run: images drawn per temperature.
        draws: Disjoint parts whose spread is reported.
        seed: Of a run's first sample, and of the parts.
        batch_size: Images per call of a network.
        device: auto, cpu or cuda.
        bad_images: What is done about images that cannot be read: stop, or skip (leave them out, list them beside the
            results in a file called ...bad-images.txt).
        bad_images_limit: Share of images that may be left out before skip stops too; one image may always be.
        overwrite: Replace results that are there.
    """
    from consonar.components import SHIPPED_GENERATORS, read_component_kind
    from consonar.distributed import pick_device

    place = str(pick_device(device, "--device"))
    given = dict(locals())
    check_bad_images(bad_images, bad_images_limit)
    check_output(out)
    bad = BadImages(bad_images, bad_images_limit, out and out.with_name(f"{out.name}-bad-images.txt"))
    if not samples.exists() and str(samples) in SHIPPED_GENERATORS:
        raise UserError(
            f"evaluate: {samples} is a shipped generator, which keeps no results; first "
            f"consonar sample {samples} --num-samples {num_samples} --out {samples}.npz, then evaluate that file"
        )
    if (samples / "config.json").is_file() and (samples / "metrics.jsonl").is_file():
        if out is not None:
            raise UserError("--out: the results of a run are written into its folder; leave --out away")
        if tokenizer is not None:
            raise UserError("--tokenizer: a run knows its own; leave --tokenizer away")
        if read_component_kind(samples) == "tokenizer":
            unread = ("temperatures", "match", "num_samples", "draws", "seed", "batch_size")
            check_read(evaluate, given, unread, "where samples of a generator are measured")
        grid = number_list(temperatures)
        sampling = {
            "num_samples": num_samples, "draws": draws, "seed": seed, "batch_size": batch_size, "match": match
        }  # fmt: skip
        bad.listing = samples / "bad-images-evaluation.txt"
        fixed = {
            "reference": reference, "feature_network": feature_network, "device": place, "overwrite": overwrite,
            "bad": bad,
        }  # fmt: skip
        evaluate_folder(samples, fixed, temperatures=grid, **sampling)
    else:
        check_read(evaluate, given, ("temperatures", "match", "num_samples"), "with the run folder of a generator")
        check_read(evaluate, given, ("overwrite",) if out is None else (), "with --out")
        settings = {
            "draws": draws, "seed": seed, "batch_size": batch_size, "device": place, "feature_network": feature_network
        }  # fmt: skip
        evaluate_samples(samples, reference, out, tokenizer, bad, overwrite=overwrite, **settings)
    if bad.note:
        say(bad.note)
    bad.write()


def number_list(text: str) -> list[float]:
    """[1.0, 0.9] <- "1,0.9"; `UserError` for what is not a number."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--temperatures: {text!r} is not a list of numbers such as 1,0.9,0.8") from error


def evaluate_folder(run: Path, fixed: dict[str, Any], **sampling: Any) -> None:
    """Measures a run folder by what it holds: a tokenizer (with `fixed` alone), or a generator."""
    from consonar.components import read_component_kind
    from consonar.evaluation.reconstruction import evaluate_tokenizer
    from consonar.evaluation.runs import evaluate_run
    from consonar.evaluation.settings import RunSettings

    if read_component_kind(run) == "tokenizer":
        metrics = evaluate_tokenizer(run, **fixed)
        print_metrics({key: {"value": value, "spread": None} for key, value in metrics.items()}, str(run))
        return
    settings = RunSettings(device=fixed.pop("device"), **sampling)
    content = evaluate_run(run, settings, progress=say, **fixed)
    for row in content["rows"]:
        print_metrics(row["metrics"], f"temperature {row['temperature']:g}")
    for remark in content["remarks"]:
        say(remark)
    say(f"results: {run / 'results.json'}")


def evaluate_samples(
    path: Path,
    reference: str,
    out: Path | None,
    tokenizer: str | None,
    bad: BadImages,
    *,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Measures a sample file or folder; in tokens too when the file has them and their tokenizer is at hand."""
    from consonar.components import SHIPPED_TOKENIZERS, load_tokenizer
    from consonar.evaluation.evaluate import evaluate as measure
    from consonar.evaluation.inputs import check_tokenizer, encode_reference, load_samples, open_reference
    from consonar.evaluation.results import check_place
    from consonar.seeding import check_seed

    check_seed(settings["seed"], "--seed")
    if out is not None:
        check_place(out, overwrite=overwrite, key="--out")
    samples = load_samples(path, bad=bad)
    if tokenizer is not None and samples.tokens is None:
        raise UserError(f"--tokenizer: {tokenizer!r} is read only for samples with tokens, and {path} has none")
    target = open_reference(reference, samples.image_size, bad=bad)
    stored = samples.settings or {}
    name = tokenizer or (stored.get("tokenizer") if stored.get("tokenizer") in SHIPPED_TOKENIZERS else None)
    if name is not None and samples.tokens is not None:
        codec = load_tokenizer(name).to(settings["device"])
        check_tokenizer(samples, Origin(tokenizer=name, tokenizer_fingerprint=codec.fingerprint))
        target = encode_reference(target, codec)
    if target.about:
        say(f"reference: {target.about}")
    with counting("evaluate") as count:
        results = measure(samples, target, progress=lambda name, done: count(done, None), **settings)
    print_metrics({k: {"value": m.value, "spread": m.spread} for k, m in results.metrics.items()}, str(path))
    for metric, reason in results.unavailable.items():
        say(f"{metric}: not measured ({reason})")
    for remark in results.remarks:
        say(remark)
    if out is not None:
        results.to_json(out, overwrite=overwrite)
        say(f"results: {out}")


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    *,
    out: Path,
    title: str | None = None,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Write one self-contained HTML page that compares runs.

    Args:
        runs: One to eight run folders.
        out: The page to write.
        title: Its title.
        overwrite: Replace a page that is there.
    """
    from consonar.report import write_report

    check_output(out)
    say(f"report: {write_report(list(runs), out, title=title, overwrite=overwrite)}")
