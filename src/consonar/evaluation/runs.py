"""Frontiers, not points: one run measured over a grid of temperatures, into the run's own folder.

Regularisation changes how sharp a model is, and temperature alone moves the Fréchet distance a lot, so a run is a
curve. All rows of all runs share classes and seeds (common random numbers).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from consonar.components import (
    load_generator,
    load_own_text_encoder,
    load_own_tokenizer,
    read_origin,
    weights_sha256,
)  # fmt: skip
from consonar.config_io import to_dict
from consonar.data.bad_images import BadImages
from consonar.distributed import ALONE, World, of_every
from consonar.errors import UserError
from consonar.evaluation.entropy import Sharpness
from consonar.evaluation.evaluate import compare
from consonar.evaluation.inputs import ReferenceSet, in_tokens, load_samples, open_reference
from consonar.evaluation.kept import keep_samples
from consonar.evaluation.reconstruction import measure_reconstruction
from consonar.evaluation.reference import PreparedReference
from consonar.evaluation.results import (
    RESULTS,
    Evaluation,
    Measurement,
    check_unmeasured,
    origin_of_numbers,
    replacing,
    setting_text,
)  # fmt: skip
from consonar.evaluation.sample_metrics import check_metrics
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.readers import read_npz
from consonar.files.writers import file_sha256, write_json
from consonar.json_types import Json
from consonar.metrics import decides
from consonar.networks import FeatureNetwork, load_feature_network
from consonar.origin import check
from consonar.sampling.job import Job, Prompts, balanced_labels, check_count, run_job
from consonar.sampling.sample import SamplerConfig
from consonar.types import Generator

RESULTS_SCHEMA = 1
ENTROPY = "entropy (teacher-forced)"
UNGUIDED = f"{ENTROPY} is that of the model alone, without guidance, in rows that are drawn with it too"


@dataclass(frozen=True, kw_only=True)
class RunSettings(EvaluationSettings):
    """How a run is sampled, a row for every temperature, and how the samples are measured."""

    draws: int = 4
    """As in `EvaluationSettings`."""
    num_samples: int = 1024
    """Images of every row."""
    temperatures: Sequence[float] = (1.0,)
    guidance_scales: Sequence[float] = ()
    """Every temperature is measured at each of these; none: at that of `sampler`."""
    match: Sequence[Path] = ()
    """Other runs, each of which adds a row at the temperature at which this one has its teacher-forced entropy."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """All but the temperature, and the guidance where `guidance_scales` say it: 1, or one of them, for its schedule."""
    reconstruct: bool = True
    """Measure the tokenizer on the validation images as well."""

    def __post_init__(self) -> None:
        check_count(self.num_samples, "num_samples", self.seed)
        super().__post_init__()
        self.check_parts(self.num_samples, "num_samples")
        check_metrics(self)
        if not self.wants("fd"):
            raise UserError(f"metrics: {', '.join(self.metrics)}; the rows of a run are ranked by fd, add it")
        for key, drawn in (("temperature", self.temperatures), ("guidance_scale", self.guidance_scales)):
            if len({*drawn}) < len(drawn):
                raise UserError(f"{key}s: {[*drawn]} has one twice; keep one of each")
            if drawn and (given := getattr(self.sampler, key)) not in (1, *drawn):
                raise UserError(f"sampler.{key}: {given} is none of {key}s {[*drawn]}, at which rows are drawn; add it")
        self.grid()

    def at(self, temperature: float, scale: float | None = None) -> SamplerConfig:
        """The sampler of one row; `scale` None: the first of those of the grid."""
        if scale is None and not self.guidance_scales:
            return replace(self.sampler, temperature=temperature)
        scale = self.guidance_scales[0] if scale is None else scale
        usual = SamplerConfig() if scale == 1 else self.sampler  # without guidance nothing reads its schedule
        return replace(
            self.sampler, temperature=temperature, guidance_scale=scale, guidance_schedule=usual.guidance_schedule,
            guidance_power=usual.guidance_power, guidance_interval=usual.guidance_interval,
        )  # fmt: skip

    def grid(self) -> list[SamplerConfig]:
        """Of all rows but those that are matched."""
        return [self.at(one, scale) for scale in self.guidance_scales or (None,) for one in self.temperatures]


class FinishedRun:
    """The model of a run and its tokenizer, which may be said to lie elsewhere now, on a device."""

    def __init__(self, folder: Path, device: str, tokenizer: str | None = None) -> None:
        self.folder, self.sha256, self.origin = folder, weights_sha256(folder), read_origin(folder)
        self.generator = load_generator(folder).to(device)
        self.tokenizer = load_own_tokenizer(folder, tokenizer).to(device)
        self.encoder = None if self.generator.num_classes else load_own_text_encoder(folder, self.generator)

    def sharpness(self, reference: str, settings: RunSettings, bad: BadImages | None) -> Sharpness:
        """Its entropy on the validation images of the reference."""
        return Sharpness(
            reference, self.tokenizer, settings.batch_size, self.origin, bad, settings.validation_split, self.encoder
        )

    def asked(self, count: int, sharpness: Sharpness) -> tuple[Tensor, Prompts | None]:
        """Of so many samples the classes (count,), or the numbers of the prompts, which then come with them: the
        (first) captions of the validation images in turn, of more captions than samples those at equal steps."""
        if self.encoder is None:
            return balanced_labels(count, self.generator.num_classes), None
        captions = sharpness.features
        texts = captions.words(balanced_labels(min(count, len(captions)), len(captions))).read()
        return balanced_labels(count, len(texts)), Prompts.read_by(self.encoder, texts)


def evaluate_run(
    folder: Path,
    settings: RunSettings,
    *,
    reference: str = "openmoji-64",
    feature_network: str | FeatureNetwork = "efficientnet-lite0",
    tokenizer: str | None = None,
    target: ReferenceSet | None = None,
    grid: Sequence[SamplerConfig] = (),
    overwrite: bool = False,
    bad: BadImages | None = None,
    progress: Callable[[str], None] = lambda text: None,
    world: World = ALONE,
) -> Json:
    """Samples a finished run at every temperature, measures each against `reference`, and writes results.json into it.

    `tokenizer`: where that of the run lies now, if not where it lay. `target` is the encoded reference where several
    runs share it; else it is opened here without `bad` images. `grid` says how the rows are drawn in the place of the
    settings' own. Beside results.json, whose content is returned: samples_tX.npz (some images of each row, with their
    nearest training images) and, of validation images and where wanted, reconstructions.npz and reconstruction.json.
    What was there stays until all is measured. `progress` gets what is being done, in words. The processes of `world`
    share the work; the first one writes. `UserError` for an unfinished run, and for results there without `overwrite`.
    """
    check_unmeasured(folder, RESULTS, overwrite=overwrite)
    run = FinishedRun(folder, settings.device, tokenizer)
    network = load_feature_network(feature_network, settings.device)
    sharpness = run.sharpness(reference, settings, bad)
    with replacing(folder, RESULTS, overwrite=overwrite, world=world) as staged, settings.multiplying():
        labels, prompts = run.asked(settings.num_samples, sharpness)
        if prompts and prompts.features.num_cut:
            progress(prompts.features.about)
        samplers = of_every(samplers_of(settings, grid or settings.grid(), sharpness, run.generator), world)[0]
        target = target_of(run, reference, target, settings, bad, world)
        classes = (None if prompts else labels, run.origin.class_names)  # what is wrong is found before any sampling
        prepared = PreparedReference(target, network, settings, world=world, classes=classes)
        progress(f"reference: {target.about}")
        unavailable: dict[str, str] = {}
        entropies = sharpness.entropies(run.generator, [sampler.temperature for sampler in samplers])
        if isinstance(entropies, str):
            progress(f"{ENTROPY}: not measured ({entropies})")
            unavailable[ENTROPY], entropies = entropies, {}
        rows = []
        for sampler, matched in samplers.items():
            at = setting_text(sampler.temperature, sampler.guidance_scale)
            progress(f"{folder.name}: {settings.num_samples} samples at {at}")
            row, results = measure_row(run, sampler, labels, prompts, prepared, settings, staged, world)
            if sampler.temperature in entropies:
                row["metrics"][ENTROPY] = Measurement(entropies[sampler.temperature]).record()
            matches = [{"matched_to": other.name, "matched_sha256": weights_sha256(str(other))} for other in matched]
            rows += [row | match for match in matches or [{}]]
        content = record_of_run(run, rows, results, settings, unavailable)
        if settings.reconstruct and (held_out := target.images.get("validation")):
            measure_reconstruction(
                staged, run.tokenizer, held_out, network, world=world, batch_size=settings.batch_size,
                tokenizer_place=run.origin.tokenizer, reference=reference, validation_split=settings.validation_split,
                precision=settings.precision, bad=target.bad, held_out=0,
            )  # fmt: skip
        if world.is_main:
            write_json(staged / RESULTS, content)
    return content


def record_of_run(
    run: FinishedRun, rows: list[Json], results: Evaluation, settings: RunSettings, unavailable: dict[str, str]
) -> Json:
    """The content of results.json; `results` are those of the last row."""
    guided = any(row["guidance_scale"] != 1 and ENTROPY in row["metrics"] for row in rows)
    return {
        "schema": RESULTS_SCHEMA,
        "rows": rows,
        "best": best_row(rows),
        "checkpoint_sha256": run.sha256,
        "tokenizer": {"name": run.tokenizer.name, "fingerprint": run.tokenizer.fingerprint},
        "origin": to_dict(run.origin),
        "unavailable": unavailable | results.unavailable,
        **origin_of_numbers(results),
        "remarks": [*results.remarks, *([UNGUIDED] if guided else [])],
        "draws": settings.draws,
        "machine": results.machine,
    }


def samplers_of(
    settings: RunSettings, grid: Iterable[SamplerConfig], sharpness: Sharpness, generator: Generator
) -> dict[SamplerConfig, list[Path]]:
    """The sampler of every row, and the runs whose entropy it was chosen to reach."""
    samplers: dict[SamplerConfig, list[Path]] = {sampler: [] for sampler in grid}
    for other in settings.match:
        samplers.setdefault(settings.at(round(sharpness.match(generator, other), 4)), []).append(other)
    return samplers


def target_of(
    run: FinishedRun,
    reference: str,
    target: ReferenceSet | None,
    settings: RunSettings,
    bad: BadImages | None,
    world: World,
) -> ReferenceSet:
    """The reference in the tokens of the run's tokenizer: `target`, checked to be that, or opened and encoded here."""
    tokenizer = run.tokenizer
    if target is None:
        wanted = settings.validation_split
        target = open_reference(reference, tokenizer.image_size, validation_split=wanted, bad=bad)
        return in_tokens(target, tokenizer, settings, world)
    if target.name != reference or target.origin is None:
        raise UserError(f"target: {target.name} is not {reference} in the tokens of {tokenizer.name}; encode it anew")
    check("target", target.origin, run.origin, str(run.folder), "encode it anew", parts=("tokenizer",))
    return target


def measure_row(
    run: FinishedRun,
    sampler: SamplerConfig,
    labels: Tensor,
    prompts: Prompts | None,
    reference: PreparedReference,
    settings: RunSettings,
    staged: Path,
    world: World,
) -> tuple[Json, Evaluation]:
    """Draws the samples of one row of results.json, measures them, and keeps some in `staged`."""
    job = Job(
        run.generator, run.tokenizer, labels, seed=settings.seed, sampler=sampler, source=str(run.folder),
        origin=run.origin, precision=settings.precision, prompts=prompts,
    )  # fmt: skip
    guided = f"_g{digits(sampler.guidance_scale)}" if settings.guidance_scales else ""
    name = f"samples_t{digits(sampler.temperature)}{guided}.npz"
    drawn, kept = run.folder / f".{name}", staged / name
    if world.is_main:
        drawn.unlink(missing_ok=True)
    of_every(None, world)
    run_job(job, drawn, batch_size=settings.batch_size, restart=True, world=world)
    results = compare(load_samples(drawn), reference, settings, world=world)
    entropy = float(read_npz(drawn, ["entropy"])["entropy"].mean())
    of_every(None, world)
    if world.is_main:
        keep_samples(drawn, kept, reference.given, results.copies, run.origin.class_names)
        drawn.unlink()
    of_every(None, world)
    metrics = results.metrics | {"entropy": Measurement(entropy)}
    row = {
        **to_dict(sampler),
        "num_samples": results.num_samples,
        "metrics": {name: found.record() for name, found in metrics.items()},
        "copies": {kind: {"threshold": copies.threshold} for kind, copies in results.copies.items()},
        "samples": kept.name,
        "seed": settings.seed,
        "samples_sha256": file_sha256(kept),
    }
    return row, results


def digits(number: float) -> str:
    """Those that tell it from every other number, 1 rather than 1.0."""
    return repr(float(number)).removesuffix(".0")


def best_row(rows: list[Json]) -> int:
    """Index of the row with the lowest Fréchet distance, to the validation images where it was measured."""
    names = [name for name in rows[0]["metrics"] if name.startswith("FD(")]
    name = next(filter(decides, names), names[0])
    return min(range(len(rows)), key=lambda i: rows[i]["metrics"][name]["value"])
