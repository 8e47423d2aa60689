"""Does a result reproduce? What a file of results records is measured again, and the numbers are compared.

What is read: the results of samples, of a run (which is sampled again), of a cell of a sweep, and of a tokenizer.
`evaluation.compared` says how close numbers must come.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from consonar.components import (
    load_generator,
    load_own_text_encoder,
    load_own_tokenizer,
    read_component_kind,
    read_origin,
)  # fmt: skip
from consonar.config_io import from_dict
from consonar.data.bad_images import BadImages
from consonar.errors import UserError, begins, reading
from consonar.evaluation.compared import Check, compare, differences, image_counts, made_of, model_differs, numbers_of
from consonar.evaluation.compositional import COMPOSITIONAL, PromptSettings, score_run, score_samples
from consonar.evaluation.diagnosed import diagnosed_by
from consonar.evaluation.evaluate import evaluate, open_target
from consonar.evaluation.inputs import load_samples
from consonar.evaluation.reconstruction import evaluate_tokenizer
from consonar.evaluation.results import RECONSTRUCTION, RESULTS
from consonar.evaluation.runs import RunSettings, evaluate_run
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.readers import read_json
from consonar.files.weights import component_fingerprint
from consonar.json_types import Json, JsonMap
from consonar.model_folders import SHIPPED
from consonar.networks import FeatureNetwork, load_feature_network
from consonar.sampling.job import Job, Prompts, balanced_labels, run_job
from consonar.sampling.sample import SamplerConfig

Value = TypeVar("Value")
PLACES = ("SAMPLES", "--reference", "--tokenizer", "--feature-network")


@dataclass(frozen=True)
class Record:
    """A file of results, and what there is now in the place of what it was made from."""

    path: Path
    content: Json
    samples: Path | None
    """The samples, or the run; None: where the record says, or beside it."""
    reference: str | None
    tokenizer: str | None
    feature_network: str | None
    device: str
    progress: Callable[[str], None]

    def find(self, key: str) -> object:
        """An entry by dotted path; None where there is none."""
        value: object = self.content
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def get(self, key: str, kind: type[Value]) -> Value:
        """An entry by dotted path. `UserError` where it is missing or of another kind."""
        if not isinstance(value := self.find(key), kind):
            found = f"lacks {key}" if value is None else f"{key} is {value!r:.60}"
            raise UserError(f"{self.path}: {found}, which is needed to measure again, and which `evaluate` writes")
        return value

    def target(self, key: str) -> str:
        """Against what was measured."""
        return self.get(key, str) if self.reference is None else self.reference

    def network(self, known: JsonMap | None = None) -> FeatureNetwork:
        """The recorded feature network (None: that of samples or a run) from its place, or from where it is said to
        lie now, called as it was then, for numbers are. `UserError` for another one."""
        known = self.get("feature_network", dict) if known is None else known
        given, name, sha256 = self.feature_network, str(known.get("name")), known.get("sha256")
        with begins("--feature-network: ", instead_of="feature_network: ") if given else nullcontext():
            network = load_feature_network(given or str(known.get("place", name)), self.device)
        is_kind, now = network.name.partition(":")[0] == name.partition(":")[0], network.weights_sha256
        if given and not (is_kind and sha256 in (None, now)):
            wanted = f"{self.path} is of {name}, {str(sha256)[:12]}; say where that lies now"
            raise UserError(f"--feature-network: {given} is {network.name}, SHA-256 {now[:12]}, and {wanted}")
        network.name = name
        return network

    @contextmanager
    def found(self) -> Iterator[None]:
        """Around the measuring: what is not there ends with the options that say where it lies now."""
        places = (self.samples, self.reference, self.tokenizer, self.feature_network)
        unsaid = ", ".join(option for option, place in zip(PLACES, places, strict=True) if place is None)
        try:
            yield
        except UserError as error:
            begun = str(error).removeprefix("reference ").removeprefix("--reference: ").partition(": ")[0]
            if not unsaid or begun.startswith("--") or Path(begun[:200]).is_file():  # says what to do, or is there
                raise
            raise UserError(f"{error}; what has moved since {self.path} was made is named by {unsaid}") from error

    def bad(self, key: str = "bad_images") -> BadImages | None:
        """What was done about pictures that cannot be read."""
        return BadImages("skip", self.get(f"{key}.limit", float)) if self.find(key) else None

    def settings(self, seed: int) -> Json:
        """How it was measured; the device is that of now."""
        return {**self.get("config", dict), "seed": seed, "device": self.device}


def check_results(
    path: Path,
    *,
    samples: Path | None = None,
    reference: str | None = None,
    tokenizer: str | None = None,
    feature_network: str | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> Check:
    """Measures again what the file `path` records. `samples` (or the run), `reference`, `tokenizer` and
    `feature_network` (with its kind, as inception:FILE): where these lie now, if not where they lay.

    Raises `UserError` for a file without such a record, and where what it was made from is nowhere to be found.
    """
    record = Record(path, read_json(path), samples, reference, tokenizer, feature_network, device, progress)
    if (schema := record.content.get("schema", 1)) != 1:
        raise UserError(f"{path}: schema is {schema!r:.60}; this version reads 1")
    if again := diagnosed_by(record.content, path.stem):
        raise UserError(
            f"{path}: is of a diagnosis, which is made again rather than checked: {again}; of which pictures and "
            "weights it is stands in it under provenance"
        )
    cell: Json = {}
    if "asked" in record.content:  # a cell of a sweep
        cell = record.content
        if (failure := cell.get("failure")) is not None:
            raise UserError(f"{path}: records a run that failed ({failure}); there is nothing to measure")
        run = samples or path.parent / record.get("run", str)
        if not run.exists():
            started = " --init START" if cell.get("start_weights") else ""
            raise UserError(
                f"{path}: its run is not in {run}; name it, or train it again: consonar train {path}{started} --out "
                f"RUN; consonar evaluate RUN --check {path}"
            )
        record = replace(record, content=record.get("results", dict), samples=run)
    if "benchmark" in record.content:
        raise UserError(f"{path}: holds what another scorer found, which is not measured here; read it again")
    made_by = {"prompts": prompts_again, "rows": run_again, "metrics": samples_again, "psnr": codec_again}
    measure = next((function for key, function in made_by.items() if key in record.content), None)
    if measure is None:
        raise UserError(f"{path}: no results of samples, a run, a cell of a sweep or a tokenizer; others have no check")
    with reading(path, "results as `evaluate` writes them"):
        before, made, sizes = numbers_of(record.content), made_of(record.content), image_counts(record.content)
    if not before:
        raise UserError(f"{path}: records no number; evaluate again")
    with tempfile.TemporaryDirectory() as folder, record.found():
        now, redrawn = measure(record, Path(folder))
    after = made_of(now)
    if cell and component_fingerprint({}, load_generator(str(record.samples)).state_dict()) == cell.get("weights"):
        made["weights"] = after["weights"]  # in another file
    other = model_differs(made, after)
    return Check(compare(before, numbers_of(now), sizes, redrawn, other), redrawn, differences(made, after), other)


def samples_again(record: Record, folder: Path) -> tuple[Json, bool]:
    """Results of a file or folder of samples; where it is gone, it is drawn again by the generator that it names."""
    settings = from_dict(record.settings(record.get("seed", int)), str(record.path), EvaluationSettings)
    place, redrawn = find_samples(record, folder, settings)
    samples = load_samples(place, bad=(bad := record.bad()))
    codec = record.tokenizer
    if codec is None and "copy rate (tokens)" in record.content["metrics"]:
        codec = (record.content.get("tokenizer") or {}).get("name") or (samples.settings or {}).get("tokenizer")
        check_there(record, codec, "copy rate in tokens")
    network = record.network()
    target = open_target(samples, record.target("reference"), codec, settings, bad)
    evaluate(samples, target, settings, feature_network=network).to_json(folder / RESULTS)
    content = read_json(folder / RESULTS)
    if redrawn:
        content["samples"].pop("sha256")  # another file, of other names and versions
    return content, redrawn


def find_samples(record: Record, folder: Path, settings: EvaluationSettings) -> tuple[Path, bool]:
    """The samples of a record, where it says or beside it, or drawn again into `folder`; and whether they are that."""
    named = Path(record.get("samples.name", str))
    places = [record.samples] if record.samples else [named, record.path.parent / named.name]
    if place := next((path for path in places if path.exists()), None):
        return place, False
    return draw_again(record, named, folder / "samples.npz", settings), True


def check_there(record: Record, codec: str | None, what: str) -> None:
    """Raises `UserError` where the tokenizer that is recorded is nowhere."""
    if codec not in SHIPPED["tokenizer"] and not str(codec).startswith("hf:") and not Path(str(codec)).is_dir():
        raise UserError(f"{record.path}: holds a {what} of {codec!r}; say where it lies: --tokenizer")


def draw_again(record: Record, named: Path, to: Path, settings: EvaluationSettings) -> Path:
    """The samples of a file that is gone, from what it said of its making."""
    made = record.content["samples"].get("settings")
    remedy = f"name the samples, or draw them again: consonar evaluate SAMPLES --check {record.path}"
    if record.samples or not isinstance(made, dict):
        raise UserError(f"{record.path}: {record.samples or named} is not there; {remedy}")
    source, count = record.get("samples.settings.generator", str), record.get("samples.settings.num_samples", int)
    record.progress(f"{named} is gone: {count} samples are drawn again from {source}")
    codec = record.tokenizer or (made["tokenizer"] if made.get("tokenizer") in SHIPPED["tokenizer"] else None)
    generator, tokenizer = load_generator(source).to(settings.device), load_own_tokenizer(source, codec)
    prompts = None
    if texts := made.get("prompts"):
        prompts = Prompts.read_by(load_own_text_encoder(source, generator), texts)
    balanced = balanced_labels(count, len(texts or ()) or generator.num_classes)
    for labels in (balanced, balanced.sort().values):  # in turn, or by --per-prompt all of a prompt together
        job = Job(
            generator, tokenizer.to(settings.device), labels,
            seed=record.get("samples.settings.seed", int),
            sampler=from_dict(record.get("samples.settings.sampler", dict), str(record.path), SamplerConfig),
            source=source, origin=read_origin(source), precision=made.get("precision", "fp32"),
            prompts=prompts, image_size=made.get("image_size"),
        )  # fmt: skip
        if job.settings["labels_sha256"] == made.get("labels_sha256"):
            return run_job(job, to, batch_size=settings.batch_size)
    asked = "prompts" if texts else "classes"
    raise UserError(f"{record.path}: {named} is not there, and the {asked} of its images are not known; {remedy}")


def run_again(record: Record, folder: Path) -> tuple[Json, bool]:
    """Results of a run, sampled again as every row says."""
    rows = record.get("rows", list)
    names = [item.name for item in fields(SamplerConfig) if item.name in rows[0]]
    grid = [from_dict({name: row[name] for name in names}, str(record.path), SamplerConfig) for row in rows]
    settings = from_dict(
        {
            **record.settings(rows[0]["seed"]),
            "num_samples": rows[0]["num_samples"],
            "guidance_scales": list(dict.fromkeys(sampler.guidance_scale for sampler in grid)),
            "reconstruct": False,
        },
        str(record.path), RunSettings,
    )  # fmt: skip
    run = stand_in(record.samples or record.path.parent, folder, record.path)
    content = evaluate_run(
        run, settings, reference=record.target("reference.name"), feature_network=record.network(), grid=grid,
        tokenizer=record.tokenizer, bad=record.bad(), progress=record.progress,
    )  # fmt: skip
    return content, True


def prompts_again(record: Record, folder: Path) -> tuple[Json, bool]:
    """The compositional score of a run, which draws anew, or of samples."""
    if unread := record.reference or record.feature_network:
        raise UserError(f"{record.path}: is of prompts, and nothing reads {unread!r}; leave it away")
    if "rows" in record.content:
        settings = from_dict(record.settings(record.get("config.seed", int)), str(record.path), PromptSettings)
        run = stand_in(record.samples or record.path.parent, folder, record.path)
        texts, name = record.get("prompts.texts", list), record.get("prompts.name", str)
        return score_run(run, texts, settings, name=name, tokenizer=record.tokenizer, progress=record.progress), True
    seed, codec = record.get("config.seed", int), record.tokenizer
    place, redrawn = find_samples(record, folder, EvaluationSettings(seed=seed, device=record.device))
    if codec is None and (made := record.get("tokenizer", dict)):
        codec = made.get("place") or made.get("name")  # older versions kept no place
        check_there(record, codec, "ceiling")
    content = score_samples(place, tokenizer=codec, seed=seed, device=record.device)
    if redrawn:
        content["samples"].pop("sha256")  # another file, of other versions
    return content, redrawn


def codec_again(record: Record, folder: Path) -> tuple[Json, bool]:
    """The reconstruction metrics of a tokenizer: of that beside the record, else of that which it names."""
    origin, beside = record.get("origin", dict), record.path.parent
    named = record.samples or record.tokenizer
    if named is None:
        with suppress(UserError):
            named = beside if read_component_kind(beside) == "tokenizer" else None
    if named is None and (named := origin.get("tokenizer_place")) is None:
        raise UserError(f"{record.path}: {beside} holds no tokenizer; name it: --tokenizer FOLDER")
    name = next((name[4:-1] for name in record.content if name.startswith("rFD(")), "efficientnet-lite0")
    known = {"name": name, "place": origin.get("feature_network", name), "sha256": origin.get("feature_network_sha256")}
    found = evaluate_tokenizer(
        named, reference=record.target("origin.reference"), feature_network=record.network(known),
        perceptual=origin.get("perceptual"), batch_size=origin.get("batch_size", 64), device=record.device,
        precision=record.get("origin.precision", str), validation_split=origin.get("validation_split"),
        held_out=origin.get("held_out"), bad=record.bad("origin.bad_images"),
    )  # fmt: skip
    return found, False


def stand_in(run: Path, folder: Path, path: Path) -> Path:
    """A folder like the run, for results of its own: what is in the run, but its results, by links."""
    if not (run / "model").is_dir() and not (run / "model.safetensors").is_file():
        raise UserError(f"{path}: no trained model in {run}; name the run: consonar evaluate RUN --check {path}")
    made = folder / run.resolve().name
    made.mkdir()
    for entry in run.iterdir():
        if not entry.name.startswith(("samples", ".")) and entry.name not in (RESULTS, RECONSTRUCTION, COMPOSITIONAL):
            (made / entry.name).symlink_to(entry.resolve())
    return made
