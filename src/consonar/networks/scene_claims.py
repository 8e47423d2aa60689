"""What a caption of scenes claims, and whether it is so in what was found in a picture: GenEval's checks.

As in GenEval (Ghosh et al. 2023, arXiv 2310.11513): of each group of objects the most confident ones are looked at, as
many as are asked for; a colour has to be that of all of them, a relation has to hold between all of one group and all
of the other. "A dog" is one dog or more; two and more are exactly so many. Deviations: one bound of confidence (theirs
is higher for counting); objects are left of others where their centres are apart by more than a tenth of both sides
along that axis, without that this be most of the distance, which in true scenes it not always is; sizes and grounds are
judged as well, which GenEval does not ask for.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product

from consonar.data.scenes import SIZES, Group, Scene, read_caption, side_of
from consonar.networks.scene_detector import Found, Sight

CONFIDENCE = 0.3
"""Of an object that counts as found."""
CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Bounds over which `degree` is a mean."""
MARGIN = 0.1
"""Of the sum of both sides: by how much centres have to be apart."""
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CLAIMS = ("object", "count", "colour", "size", "position", "ground")
scene_of = lru_cache(maxsize=100_000)(read_caption)
"""`read_caption`, each caption once."""


def kind_of(scene: Scene) -> str:
    """Which of `KINDS` a scene is: its own where it asks for one thing, else mixed."""
    groups = scene.groups
    asked = {
        "counting": any(group.count > 1 for group in groups),
        "colour" if len(groups) == 1 else "attribution": any(group.colour for group in groups),
        "size": any(group.size for group in groups),
        "position": bool(scene.relation),
    }
    kinds = [kind for kind, is_asked in asked.items() if is_asked] or ["single" if len(groups) == 1 else "pair"]
    return kinds[0] if len(kinds) == 1 and (kinds[0] != "counting" or len(groups) == 1) else "mixed"


def claims(scene: Scene, sight: Sight, confidence: float = CONFIDENCE) -> Iterator[tuple[str, bool]]:
    """Every claim of a caption, one of `CLAIMS`, and whether it holds."""
    best = []
    for group in scene.groups:
        found = [one for one in sight.objects if one.object == group.object and one.confidence >= confidence]
        best.append(sorted(found, key=lambda one: -one.confidence)[: group.count])
        yield "object", bool(found)
        if group.count > 1:
            yield "count", len(found) == group.count
        if group.colour:
            yield "colour", bool(found) and all(one.colour == group.colour for one in best[-1])
        if group.size:
            yield "size", bool(found) and all(is_of_size(scene, group, one) for one in best[-1])
    if scene.relation:
        yield "position", all(map(bool, best)) and all(stands(scene.relation, a, b) for a, b in product(*best))
    if scene.ground:
        yield "ground", sight.ground == scene.ground


def is_of_size(scene: Scene, group: Group, found: Found) -> bool:
    """Whether the size that the group has is as near to the found one as any is in its place."""
    across = group.count if len(scene.groups) > 1 else min(group.count, 2)
    cell, total = 64 / max(across, len(scene.groups)), sum(one.count for one in scene.groups)
    away = {size: abs(64 * found.side - side_of(size, cell, total)) for size in SIZES}
    return away[group.size] == min(away.values())


def stands(relation: str, first: Found, second: Found) -> bool:
    right, down = DIRECTIONS[relation]
    apart = right * (first.x - second.x) + down * (first.y - second.y)
    return apart > MARGIN * (first.side + second.side)


def degree(scene: Scene, sight: Sight) -> float:
    """0 to 1: the share of claims that hold, meaned over bounds of confidence, so that it moves before a claim does."""
    found = [[held for _, held in claims(scene, sight, bound)] for bound in CONFIDENCES]
    return sum(map(sum, found)) / sum(map(len, found))


def degrees(captions: Sequence[str], sights: Sequence[Sight]) -> list[float]:
    """Of each picture; `UserError` for a caption that is none of scenes."""
    return [degree(scene_of(caption), sight) for caption, sight in zip(captions, sights, strict=True)]
