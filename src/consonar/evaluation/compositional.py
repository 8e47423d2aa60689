"""Do pictures of scenes show what their prompts say? By kind of prompt, with intervals, beside what is to be had.

Every number stands beside its ceilings: the same of true pictures of the same prompts, of which the detector too misses
some, and of these after the tokenizer, which no generator of its tokens is expected to pass. The score is the mean over
kinds, as GenEval's is over tasks; intervals are over prompts, whose pictures are no independent trials.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consonar.components import load_own_text_encoder, load_tokenizer
from consonar.config_io import to_dict
from consonar.data.scene_source import Scenes
from consonar.data.scenes import GROUNDS, KINDS, picture_of, place
from consonar.data.transforms import from_uint8
from consonar.distributed import ALONE, World, in_turn, machine_name
from consonar.errors import UserError, reading
from consonar.evaluation.inputs import as_input, load_samples
from consonar.evaluation.results import Measurement, library_versions, replacing
from consonar.evaluation.runs import FinishedRun
from consonar.files.readers import read_json, read_npz
from consonar.files.writers import write_json
from consonar.float32 import exact
from consonar.json_types import Json
from consonar.metrics.shares import mean_of, wilson
from consonar.model_folders import SHIPPED, from_anywhere
from consonar.networks.scene_claims import CLAIMS, claims, kind_of, scene_of
from consonar.networks.scene_detector import SceneDetector, detector_sha256, load_scene_detector, look
from consonar.options import Count, check_options
from consonar.records import device_of
from consonar.sampling.job import Job, Prompts, run_job
from consonar.sampling.sample import SamplerConfig
from consonar.seeding import check_seed
from consonar.tokenizers.base import CodebookTokenizer
from consonar.types import Tokenizer

COMPOSITIONAL = "compositional.json"
SCORE = "compositional score"
VALIDATION, VALIDATION_PROMPTS = "scenes-validation", 400
"""Prompts of held-out scenes by name, and how many they are where nothing else is said."""
Judged = list[tuple[str, bool]]
"""The claims of a picture's prompt, and whether they hold."""


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How a run is asked, a row for every temperature at every guidance, and where it is measured."""

    per_prompt: Count = 4
    """Pictures of every prompt."""
    temperatures: Sequence[float] = (1.0,)
    guidance_scales: Sequence[float] = (1.0,)
    """1: none."""
    seed: int = 0
    """Of the first picture, and of the true pictures."""
    batch_size: Count = 64
    """Pictures per call of a network."""
    precision: str = "fp32"
    """What the run multiplies in; the detector is float32."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_options(self, "")
        check_seed(self.seed, "seed")
        self.grid()

    def grid(self) -> list[SamplerConfig]:
        """The sampler of every row."""
        pairs = product(self.guidance_scales, self.temperatures)
        return [SamplerConfig(temperature=one, guidance_scale=scale) for scale, one in pairs]


def validation_prompts(count: int = VALIDATION_PROMPTS) -> list[str]:
    """The first so many different captions of scenes for validation: fewer of kinds that have few, such as counting."""
    scenes, texts = Scenes("validation", count=10 * count), dict[str, None]()
    for index in range(scenes.count):
        texts.setdefault(str(scenes.placed(index)[0]))
        if len(texts) == count:
            break
    return list(texts)


def judge(detector: SceneDetector, images: Iterable[Tensor], captions: Iterable[str]) -> list[Judged]:
    """The claims of each caption in its picture, of batches of images (B, 3, H, W) in [-1, 1]."""
    sights = (sight for batch in images for sight in look(detector, batch))
    return [list(claims(scene_of(caption), sight)) for caption, sight in zip(captions, sights, strict=True)]


def shares(captions: Sequence[str], judged: Sequence[Judged]) -> dict[str, Measurement]:
    """The score, that of each kind and the claims of each sort that hold, of pictures of these captions."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    held: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for caption, found in zip(captions, judged, strict=True):
        right[kind_of(scene_of(caption))][caption].append(all(holds for _, holds in found))
        for name, holds in found:
            held[name][caption].append(holds)
    kinds = {kind: share_of(right[kind].values()) for kind in KINDS if kind in right}
    intervals = [one.interval for one in kinds.values() if one.interval]
    score = measured(*mean_of([one.value for one in kinds.values()], intervals))
    return (
        {SCORE: score}
        | {f"{SCORE} ({kind})": one for kind, one in kinds.items()}
        | {f"claims ({name})": share_of(held[name].values()) for name in CLAIMS if name in held}
    )


def share_of(prompts: Iterable[Sequence[bool]]) -> Measurement:
    """The mean over prompts of the share of what is right."""
    means = [sum(right) / len(right) for right in prompts]
    share = sum(means) / len(means)
    return measured(share, wilson(share, len(means)))


def measured(share: float, interval: tuple[float, float]) -> Measurement:
    return Measurement(share, error=(interval[1] - interval[0]) / (2 * 1.96), interval=interval)


def true_pictures(captions: Iterable[str], image_size: int, seed: int) -> Iterator[np.ndarray]:
    """A picture by the rules of scenes for each caption, uint8 (H, H, 3)."""
    for caption in captions:
        scene, rng = scene_of(caption), random.Random(f"{seed}/{caption}")
        ground = scene.ground or rng.choice(list(GROUNDS))
        yield np.asarray(picture_of(ground, place(scene, image_size, rng), image_size))


@torch.inference_mode()
def ceilings(
    detector: SceneDetector, captions: Sequence[str], image_size: int, tokenizer: Tokenizer | None, seed: int
) -> dict[str, dict[str, Measurement]]:
    """What true pictures of the different captions score, and these through the tokenizer, where it is known."""
    texts = list(dict.fromkeys(captions))
    pictures = torch.from_numpy(np.stack(list(true_pictures(texts, image_size, seed)))).split(64)
    found = {"true pictures": shares(texts, judge(detector, map(from_uint8, pictures), texts))}
    if tokenizer is not None:
        with exact(device_of(tokenizer)):
            decoded = [tokenizer.decode(tokenizer.encode(as_input(part.numpy(), tokenizer))) for part in pictures]
        found["reconstructions"] = shares(texts, judge(detector, decoded, texts))
    return found


def record(
    captions: Sequence[str], name: str, per_prompt: float, found: Mapping[str, Mapping[str, Measurement]]
) -> Json:
    """What every file of scores says: of which prompts, against what, by which detector."""
    texts = list(dict.fromkeys(captions))
    return {
        "schema": 1,
        "prompts": {"name": name, "texts": texts, "per_prompt": per_prompt},
        "ceilings": {of: {key: one.record() for key, one in metrics.items()} for of, metrics in found.items()},
        "detector_sha256": detector_sha256(),
        "versions": library_versions(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def score_run(
    folder: Path,
    texts: Sequence[str],
    settings: PromptSettings,
    *,
    name: str,
    tokenizer: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    world: World = ALONE,
) -> Json:
    """Draws pictures of the different prompts, called `name`, by a finished run at every temperature, and writes
    `COMPOSITIONAL` into it, whose content is returned.

    `tokenizer` says where that of the run lies now, if not where it lay. The processes of `world` share the drawing;
    the first one writes. Raises `UserError` for a run that takes no
    captions, for prompts that are none of scenes, and where there are scores, unless `overwrite`.
    """
    texts = [text for text in dict.fromkeys(texts) if scene_of(text)]
    run, detector = FinishedRun(folder, settings.device, tokenizer), load_scene_detector().to(settings.device)
    prompts = Prompts.read_by(load_own_text_encoder(folder, run.generator), texts)
    if prompts.features.num_cut:
        progress(prompts.features.about)
    rows, labels = [], torch.arange(len(texts)).repeat_interleave(settings.per_prompt)
    captions = [texts[index] for index in labels.tolist()]
    with replacing(folder, COMPOSITIONAL, overwrite=overwrite, world=world) as staged:
        for sampler in settings.grid():
            at = f"temperature {sampler.temperature:g}, guidance {sampler.guidance_scale:g}"
            progress(f"{folder.name}: {len(labels)} pictures of {len(texts)} prompts, {at}")
            job = Job(
                run.generator, run.tokenizer, labels, seed=settings.seed, sampler=sampler, source=str(folder),
                origin=run.origin, precision=settings.precision, prompts=prompts,
            )  # fmt: skip
            drawn = staged / "drawn.npz"
            run_job(job, drawn, batch_size=settings.batch_size, world=world)
            [metrics] = in_turn(partial(of_pictures, detector, drawn), [captions], world)  # by the first one alone
            rows += [{**to_dict(sampler), "num_samples": len(labels), "seed": settings.seed, "metrics": metrics}]
            if world.is_main:
                drawn.unlink()
        size = run.tokenizer.image_size
        [found] = in_turn(lambda all: ceilings(detector, all, size, run.tokenizer, settings.seed), [texts], world)
        content = {
            **record(texts, name, settings.per_prompt, found),
            "rows": rows,
            "checkpoint_sha256": run.sha256,
            "tokenizer": {"name": run.tokenizer.name, "fingerprint": run.tokenizer.fingerprint},
            "config": to_dict(settings),
            "machine": machine_name(settings.device),
        }
        if world.is_main:
            write_json(staged / COMPOSITIONAL, content)
    return content


def of_pictures(detector: SceneDetector, place: Path, captions: Sequence[str]) -> Json:
    """The scores of a file or folder of samples of these captions."""
    images = load_samples(place).images.stream(64)
    judged = judge(detector, (from_uint8(torch.from_numpy(np.array(batch))) for batch in images), captions)
    return {name: one.record() for name, one in shares(captions, judged).items()}


def captions_of(place: Path) -> list[str]:
    """What samples that `sample` drew were asked for, picture by picture; `UserError` where they do not say, and for
    what is no caption of scenes."""
    texts = settings_of(place).get("prompts")
    numbers: Sequence[int | str] = ()
    if place.is_file():
        numbers = read_npz(place, ("labels",))["labels"].tolist() if texts else []
    elif of_geneval := sorted(place.glob("[0-9]*/metadata.jsonl")):
        texts = [read_json(path).get("prompt") for path in of_geneval]
        numbers = [n for n, path in enumerate(of_geneval) for _ in path.with_name("samples").glob("*.png")]
    else:
        numbers = [path.stem.rpartition("_prompt")[2] for path in sorted(place.glob("*_prompt*.png"))]
    if not texts or not numbers:
        raise UserError(f"--prompts: {place} does not say what its pictures were asked for; draw them by `sample`")
    with reading(place, "samples of prompts"):
        by_number = dict(enumerate(map(str, texts)))  # of which none is before the first
        found = [by_number[int(number)] for number in numbers]
    for text in dict.fromkeys(found):
        try:
            scene_of(text)
        except UserError as error:
            raise UserError(f"--prompts: {place}: {error}") from error
    return found


def settings_of(place: Path) -> Json:
    """What a file or folder of samples says of its making; nothing where it does not."""
    if place.is_dir():
        return read_json(path) if (path := place / "settings.json").is_file() else {}
    return load_samples(place).settings or {}


def shipped_tokenizer(place: Path) -> CodebookTokenizer | None:
    """The tokenizer of the package that samples say they were decoded by, at its own size."""
    made = settings_of(place)
    name: str | None = made.get("tokenizer")
    if name not in SHIPPED["tokenizer"] or "image_size" in made:
        return None
    codec = load_tokenizer(name)  # another of that name may have made them
    return codec if made.get("tokenizer_fingerprint") in (None, codec.fingerprint) else None


def score_samples(place: Path, *, tokenizer: str | None = None, seed: int = 0, device: str = "cpu") -> Json:
    """The scores of a file or folder of samples that says its prompts, with the ceiling of the tokenizer that is named,
    else of the one of the package that the samples name."""
    captions, detector, samples = captions_of(place), load_scene_detector().to(device), load_samples(place)
    texts = list(dict.fromkeys(captions))
    codec = shipped_tokenizer(place) if tokenizer is None else load_tokenizer(tokenizer)
    used: Json = {}
    if codec is not None:
        used = {"name": codec.name, "fingerprint": codec.fingerprint}
        used["place"] = from_anywhere("tokenizer", tokenizer or codec.name)
        codec = codec.to(device)
    found = ceilings(detector, texts, samples.image_size, codec, seed)
    return {
        **record(captions, str(place), len(captions) / len(texts), found),
        "metrics": of_pictures(detector, place, captions),
        "num_samples": samples.count,
        "samples": {"name": str(place), "sha256": samples.sha256, "settings": settings_of(place) or None},
        "tokenizer": used,
        "config": {"seed": seed, "device": device},
        "machine": machine_name(device),
    }
