"""Commands that measure and show: evaluate, report."""

from pathlib import Path

import tyro

from consonar.cli.console import counting, print_metrics, say
from consonar.errors import UserError


def evaluate(
    samples: tyro.conf.Positional[Path],
    *,
    reference: str,
    out: Path | None = None,
    temperatures: str = "1",
    num_samples: int = 2048,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Measure samples (.npz or a folder of images), a trained generator over a grid of temperatures, or a tokenizer.

    Args:
        samples: Samples, or a run folder: a generator is sampled, a tokenizer reconstructs the validation images;
            the results are written into the run, where `consonar report` finds them.
        reference: openmoji-64, an .npz of images or statistics, a folder, hf:owner/name.
        out: Where to write the results of samples (JSON).
        temperatures: Of a run: the grid, e.g. 1,0.9,0.8.
        num_samples: Of a run: images drawn per temperature.
        draws: Disjoint parts whose spread is reported.
        seed: Of a run's first sample, and of the parts.
        batch_size: Images per call of a network.
        device: auto, cpu or cuda.
        overwrite: Replace results that are there.
    """
    from consonar.distributed import pick_device
    from consonar.generators import read_component_kind

    place = str(pick_device(device))
    if (samples / "config.json").is_file() and (samples / "metrics.jsonl").is_file():
        from consonar.evaluation.frontier import evaluate_run, evaluate_tokenizer

        if out is not None:
            raise UserError("--out: the results of a run are written into its folder; leave --out away")
        if read_component_kind(samples) == "tokenizer":
            metrics = evaluate_tokenizer(samples, reference=reference, device=place, overwrite=overwrite)
            print_metrics({key: {"value": value, "spread": None} for key, value in metrics.items()}, str(samples))
            return
        try:
            grid = [float(word) for word in temperatures.split(",")]
        except ValueError as error:
            raise UserError(f"--temperatures: {temperatures!r} is not a list of numbers such as 1,0.9,0.8") from error
        content = evaluate_run(
            samples, reference=reference, temperatures=grid, num_samples=num_samples, draws=draws,
            seed=seed, batch_size=batch_size, device=place, overwrite=overwrite, progress=say,
        )  # fmt: skip
        for row in content["rows"]:
            print_metrics(row["metrics"], f"temperature {row['temperature']:g}")
        say(f"results: {samples / 'results.json'}")
        return
    from consonar.evaluation.evaluate import evaluate as measure

    if out is not None and out.exists() and not overwrite:
        raise UserError(f"--out: {out} exists; choose another name, or add --overwrite")
    with counting("evaluate") as count:
        results = measure(
            samples, reference, draws=draws, seed=seed, batch_size=batch_size, device=place,
            progress=lambda name, done: count(done, None),
        )  # fmt: skip
    print_metrics({k: {"value": m.value, "spread": m.spread} for k, m in results.metrics.items()}, str(samples))
    for name, reason in results.unavailable.items():
        say(f"{name}: not measured ({reason})")
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
        runs: One to six run folders.
        out: The page to write.
        title: Its title.
        overwrite: Replace a page that is there.
    """
    from consonar.report import write_report

    say(f"report: {write_report(list(runs), out, title=title, overwrite=overwrite)}")
