"""The diagnostics in a table, all of one subject, and the record of them with everything that makes it a result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import torch

from consonar.components import model_folder, weights_sha256
from consonar.config_io import to_dict
from consonar.diagnostics import codes, context, decoding, exposure, layers
from consonar.diagnostics.findings import Finding
from consonar.diagnostics.subject import DiagnosisSettings, Subject, open_subject
from consonar.distributed import machine_name
from consonar.errors import UserError, check_choice
from consonar.evaluation.results import library_versions
from consonar.json_types import Json
from consonar.precision import multiplying
from consonar.sampling.pictures import evaluating
from consonar.sampling.sample import SamplerConfig

SCHEMA = 1


class Part(NamedTuple):
    """A diagnostic."""

    title: str
    reading: str
    """How it is made and read, for the page."""
    measure: Callable[[Subject], Finding | str]
    """The finding, or in words why there is none."""
    of_generator: bool = True
    """Whether it needs a generator, not a tokenizer alone."""
    draws: bool = False
    """Whether tokens are drawn for it, by the settings' sampler."""
    compares: bool = False
    """Whether pictures are compared for it, by the perceptual distance."""


PARTS: dict[str, Part] = {
    "exposure": Part(
        "Exposure bias",
        "Of every picture a share of tokens is true; the generator draws the others, each from all before it. Prefix: "
        "the first tokens are true. Interleaved: as many at random places, so that the generator reads its own errors "
        "early. A curve above another is worse at an equal share of correct tokens; interleaved above prefix is "
        "exposure bias (reAR, Figure 3a). The dotted curves draw at the same places under the true tokens: what they "
        "differ by comes from where the wrong tokens are, only a solid curve above its dotted one from the context.",
        exposure.exposure_bias,
        draws=True,
        compares=True,
    ),
    "embedding": Part(
        "Embedding unawareness",
        "Tokens are drawn under the true ones before them; then wrong ones are replaced by the code nearest to the "
        "true one. As many tokens are wrong as before. A falling distance means that a loss which counts right tokens "
        "alone overlooks what the decoder sees (reAR, Figure 3b).",
        codes.embedding_unawareness,
        draws=True,
        compares=True,
    ),
    "layers": Part(
        "Layer probe",
        "A linear map from a layer's output to the code of the token that was read, or of the one that comes next, "
        "scored on pictures that it was not fitted to. High where the layer knows the code. reAR puts its heads where "
        "a generator without them is nearest to the codes; one that was trained with heads is nearest there because "
        "of them.",
        layers.layer_probe,
    ),
    "noise": Part(
        "Robustness to noise",
        "Tokens of the context are replaced by any code; the generator still predicts the true ones. The flatter, the "
        "less its own errors will disturb it.",
        context.noise_robustness,
    ),
    "gap": Part(
        "Training against held-out pictures",
        "Cross-entropy of pictures that were trained on, in their centre crop, beside held-out ones. A gap is memory: "
        "regularisation can help where there is one.",
        context.train_gap,
    ),
    "positions": Part(
        "Where on the grid",
        "Each token under the true ones before it. Entropy far below cross-entropy at a place means that "
        "the generator is surer there than it is right.",
        context.positions,
    ),
    "receptive": Part(
        "Receptive field of the decoder",
        "One token becomes another code; where does the picture change? A token that reaches far makes its error, and "
        "the credit for it, everyone's; a change within its own cell is local.",
        decoding.receptive_field,
        of_generator=False,
    ),
    "codebook": Part(
        "Neighbourhoods of the codebook",
        "One token becomes the k-th nearest code. If change grows with k, near codes look alike, and a loss may count "
        "them as half right (soft targets, codes as regression targets); if it does not, distance in the codebook says "
        "nothing about pictures.",
        codes.neighbourhoods,
        of_generator=False,
        compares=True,
    ),
    "forgiveness": Part(
        "What the tokenizer forgives",
        "Pictures decoded from tokens of which some are wrong, against the originals (pFID). Of two tokenizers with "
        "one rFD the flatter is easier on a generator, which will make errors.",
        decoding.forgiveness,
        of_generator=False,
        compares=True,
    ),
    "attribution": Part(
        "Whose is the distance",
        "Four sets of equally many pictures against other real ones: real, decoded from true tokens, from tokens drawn "
        "under the true ones, and drawn freely. What a step adds has one cause: the tokenizer, the single draw, the "
        "generator's own context. Few pictures make all four too far in much the same way; read the differences.",
        decoding.attribution,
        draws=True,
    ),
}
"""By the name that `--parts` takes."""


@dataclass(frozen=True)
class Diagnosis:
    """All findings about one subject."""

    subject: str
    findings: dict[str, Finding]
    """By the names of `PARTS`."""
    unavailable: dict[str, str]
    """Parts that were asked for and cannot be measured here, and why."""
    provenance: Json

    def content(self) -> Json:
        """What diagnosis.json holds: all but pictures."""
        parts = {}
        for name, finding in self.findings.items():
            item = asdict(finding)
            del item["pictures"]
            item["numbers"] = {key: interval._asdict() for key, interval in finding.numbers.items()}
            for drawn, figure in zip(item["figures"], finding.figures, strict=True):
                drawn["curves"] = [
                    {"name": c.name, "control": c.control, "x": list(map(float, c.x)), "y": [y._asdict() for y in c.y]}
                    for c in figure.curves
                ]
            parts[name] = item
        return {
            "schema": SCHEMA, "subject": self.subject, "parts": parts, "unavailable": self.unavailable,
            "provenance": self.provenance,
        }  # fmt: skip


def chosen_parts(names: Sequence[str], *, has_generator: bool) -> list[str]:
    """The parts that `names` mean, in the table's order; all that can be measured for none. `UserError` for others."""
    possible = [name for name, part in PARTS.items() if has_generator or not part.of_generator]
    for name in names:
        if name in PARTS and name not in possible:
            raise UserError(
                f"--parts: {name!r} is of a generator, and this is a tokenizer; choices: {', '.join(possible)}"
            )
        check_choice("--parts", name, possible)
    return [name for name in possible if name in names or not names]


def check_sampler(sampler: SamplerConfig, chosen: Sequence[str]) -> None:
    """Raises `UserError` for a setting of draws where none of the parts `chosen` draws."""
    given = [name for name, value in vars(SamplerConfig()).items() if getattr(sampler, name) != value]
    if given and not any(PARTS[name].draws for name in chosen):
        drawing = ", ".join(name for name, part in PARTS.items() if part.draws)
        raise UserError(
            f"--{given[0].replace('_', '-')}: {getattr(sampler, given[0])} is read only where tokens of a generator "
            f"are drawn ({drawing}), and nothing here does; leave it away"
        )


def diagnose(
    name: str,
    data: str,
    settings: DiagnosisSettings,
    *,
    parts: Sequence[str] = (),
    tokenizer: str | None = None,
    validation_split: str | None = None,
    label_default: str | None = None,
    progress: Callable[[str], None] = lambda part: None,
) -> Diagnosis:
    """The findings about the generator called `name` with its tokenizer, or about a tokenizer, on the pictures of
    `data`; `parts` are names of `PARTS`, none: all. `progress` gets the name of each before it is measured.

    Raises `UserError` as `open_subject` does, and for unknown parts.
    """
    for part in parts:
        check_choice("--parts", part, PARTS)
    place = torch.device(settings.device)
    with torch.inference_mode(), multiplying(settings.precision, place, autocast=True):
        subject = open_subject(
            name, data, settings, tokenizer=tokenizer, validation_split=validation_split, label_default=label_default
        )
        chosen = chosen_parts(parts, has_generator=subject.model is not None)
        check_sampler(settings.sampler, chosen)
        findings: dict[str, Finding] = {}
        unavailable: dict[str, str] = {}
        with evaluating(subject.model, subject.tokenizer):
            for part in chosen:
                progress(part)
                measure = PARTS[part].measure
                found = subject.too_small if PARTS[part].compares and subject.too_small else measure(subject)
                if not isinstance(found, str) and found.not_finite:
                    found = f"{found.not_finite} is no finite number"
                if isinstance(found, str):
                    unavailable[part] = found
                else:
                    findings[part] = found
    asked = {"tokenizer": tokenizer, "validation_split": validation_split, "label_default": label_default}
    return Diagnosis(name, findings, unavailable, provenance(name, data, subject, asked))


def provenance(name: str, data: str, subject: Subject, asked: Mapping[str, str | None]) -> Json:
    """What the numbers are of, and were made with; of the options `asked` those that were given."""
    settings, what = subject.settings, "generator" if subject.model is not None else "tokenizer"
    used = {"held-out": subject.held_out, "training": subject.train, "others": subject.others}
    cut = {key: part.about for key, part in used.items() if part is not None and part.about}
    tokenizer = {"name": subject.tokenizer.name, "fingerprint": subject.tokenizer.fingerprint}
    return {
        what: {"name": name, "sha256": weights_sha256(model_folder(name, what))},
        **({"tokenizer": tokenizer} if what == "generator" else {"fingerprint": tokenizer["fingerprint"]}),
        "data": data,
        **({"asked": given} if (given := {key: value for key, value in asked.items() if value is not None}) else {}),
        "pictures": {
            key: {"name": part.name, "count": len(part.images), "sha256": part.sha256, "enlarged": part.enlarged}
            for key, part in used.items() if part is not None
        },
        **({"left out": subject.left_out} if subject.left_out else {}),
        **({"captions": cut} if cut else {}),
        "perceptual": {"name": subject.judge.name, "sha256": subject.judge.weights_sha256},
        "feature network": {"name": subject.network.name, "sha256": subject.network.weights_sha256},
        "settings": to_dict(settings),
        "versions": library_versions(),
        "machine": machine_name(settings.device),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
