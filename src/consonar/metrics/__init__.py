"""Formulas over numbers that judge models, and in one table what each of these numbers is called and means.

A row is all that tables and charts need of a number; one that has no row is shown under its own name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """A number of results, or of a training's log."""

    name: str
    """As files have it, without a log's `train/` or `validation/`; of a family their beginning, up to "(" or "_"."""
    heading: str = ""
    """What people call it; `{}` is the rest of the name in a family. Empty: its name."""
    unit: str = ""
    """"%": files hold shares of 1."""
    direction: int = 0
    """-1 where lower is better, 1 where higher is, 0 where neither is."""
    drawn: bool = True
    """Whether its course in training tells anything: settings do not, nor sums of different terms in different runs."""
    meaning: str = ""
    """A clause that follows the heading."""

    @property
    def label(self) -> str:
        """Heading and unit."""
        return f"{self.heading} ({self.unit})" if self.unit else self.heading


METRICS = (
    Metric(
        "FD(", direction=-1,
        meaning="is the Fréchet distance between the features of samples and of real pictures, seen ones (train) and "
        "held-out ones (validation)",
    ),
    Metric(
        "FD-infinity(", direction=-1,
        meaning="is that distance for infinitely many samples: where a line over 1 / number of samples ends",
    ),
    Metric("FD per class(", direction=-1, meaning="is the mean of the distances within single classes"),
    Metric("sFD(", direction=-1),
    Metric("KID(", direction=-1, meaning="is without the bias of few samples: around 0 for perfect ones"),
    Metric("IS(", direction=1),
    Metric("precision", direction=1, meaning="is the share of samples that look real"),
    Metric("recall", direction=1, meaning="is the share of real variety that samples cover"),
    Metric("density", direction=1, meaning="is how crowded with real pictures the places of samples are, about 1"),
    Metric("coverage", direction=1, meaning="is the share of real pictures that have a sample beside them"),
    Metric(
        "copy rate (", unit="%", direction=-1,
        meaning="is the share of samples nearer to a training picture than any held-out picture is: the larger, the "
        "more of a score is memory",
    ),
    Metric(
        "compositional score", unit="%", direction=1,
        meaning="is the share of pictures that are all that their prompts say, meaned over kinds of prompts",
    ),
    Metric("compositional score (", unit="%", direction=1),
    *(Metric(name, unit="%", direction=1) for name in ("GenEval", "GenEval (", "GenEval 2", "GenEval 2 (")),
    *(Metric(name, unit="%", direction=1) for name in ("DPG-Bench", "DPG-Bench (")),
    Metric("claims (", unit="%", direction=1, meaning="is the share of what prompts say of this that pictures show"),
    Metric(
        "reward", unit="weighted sum", direction=1,
        meaning="is of one draw of every token, decoded, without a spread; a better one is not yet a better picture",
    ),
    Metric("reward_spread", "spread of rewards in a group"),
    Metric("reward_ties", "groups whose draws all earn the same", "share"),
    Metric("reward_spread_", "spread in a group: {}", drawn=False),
    Metric("reward_ties_", "groups whose draws all earn the same: {}", "share", drawn=False),
    Metric("reward_", "reward: {}", direction=1),
    Metric("kl", "KL to the start model", "nats per token"),
    Metric(
        "cross_entropy", "cross-entropy", "nats per token", -1,
        meaning="is how well held-out tokens are predicted, which is not yet a better picture",
    ),
    Metric("soft_cross_entropy", "cross-entropy against soft targets", "nats per token", -1),
    Metric("align_current", "alignment with the current token's code", "cosine distance", -1),
    Metric("align_next", "alignment with the next token's code", "cosine distance", -1),
    Metric("accuracy", unit="share of tokens", direction=1),
    Metric("entropy", unit="nats per token"),
    Metric(
        "entropy (teacher-forced)", "entropy under the true context", "nats per token",
        meaning="is that of the next token of held-out pictures: lower is sharper, as a lower temperature is",
    ),
    Metric("psnr", "PSNR", "dB", 1),
    Metric("exact", "images reproduced exactly", direction=1),
    Metric("ssim", "SSIM", direction=1),
    Metric("l1", "mean absolute error", direction=-1),
    Metric("rFD(", direction=-1),
    Metric("mse", "squared error", direction=-1),
    Metric("perceptual", "perceptual distance", direction=-1),
    Metric("perceptual(", "perceptual distance ({}", direction=-1),
    Metric("usage", "codes used", "share of the codebook", 1, meaning="leaves out codes that are capacity lost"),
    Metric("perplexity", "code perplexity", "effective number of codes"),
    Metric("num_images", "images measured"),
    Metric("ratio_deviation", "largest deviation of the probability ratio from 1"),
    Metric("clip_fraction", "clipped ratios", "share"),
    *(Metric(name, drawn=False) for name in ("policy", "loss", "grad_norm", "learning_rate", "noise_rate", "chunk")),
)  # fmt: skip
"""In the order of columns and charts."""


def metric_of(name: str) -> Metric:
    """The row of a number by its name in results or in a log, with the heading of this one; its own for a new name."""
    short = in_results(name)
    row = [*METRICS, Metric(short)][place_of(name)]
    return replace(row, heading=row.heading.format(short.removeprefix(row.name)) or short)


def in_results(name: str) -> str:
    """A number's name without what a log puts before it; that of a network may hold a "/"."""
    return name.removeprefix("train/").removeprefix("validation/")


def place_of(name: str) -> int:
    """Number of a name's row; that of rows for a name that has none."""
    short = in_results(name)
    for place, row in enumerate(METRICS):
        if short == row.name or (row.name.endswith(("(", "_")) and short.startswith(row.name)):
            return place
    return len(METRICS)


def in_order(names: Iterable[str]) -> list[str]:
    """The names in the order of the table, those it does not have last; of a log held-out numbers first."""
    return sorted(names, key=lambda name: (place_of(name), not (name.startswith("validation/") or decides(name)), name))


def meanings(names: Iterable[str]) -> dict[str, str]:
    """What numbers of these names mean, by what they are called; a family once."""
    rows = [metric_of(name) for name in names]
    return {row.name.rstrip("(") if row.name.endswith("(") else row.heading: row.meaning for row in rows if row.meaning}


def protocol_line(measured: str, network: str, against: str, sets: Mapping[str, int], *more: str) -> str:
    """What numbers are of, which their names do not say: pictures that were `measured`, in the features of which
    network, `against` what, with `more` of it, and its `sets` of so many images."""
    return f"{measured}, {network}, against {against}: " + ", ".join(
        [*more, *(f"{count:,} images as {name}" for name, count in sets.items())]
    )


def decides(name: str) -> bool:
    """Whether runs are judged by this number: the Fréchet distance to held-out images, in whatever features."""
    return name.startswith("FD(") and name.endswith(" validation")
