"""By content, what a cell is made of and measured against: a result or a run is re-used for the same files only.

Hashes are those of what lies on this machine now, and those that a result or a run recorded. What one of them does not
know (a store that is elsewhere, an older file, a data set that is fetched by its name) differs from nothing. What is
here and cannot be read is an error: it might be another.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from consonar.components import load_generator, load_tokenizer, read_origin, weights_sha256
from consonar.config_io import from_dict, to_dict
from consonar.data.mixture import as_one, store_paths
from consonar.data.sources import at_size, find_source
from consonar.data.splits import open_splits
from consonar.data.tokens import TokenStore
from consonar.errors import NotHere, UserError
from consonar.files.readers import home_expanded
from consonar.files.weights import component_fingerprint
from consonar.files.writers import file_sha256
from consonar.json_types import JsonMap
from consonar.networks import load_feature_network
from consonar.origin import Origin
from consonar.sweeps.plan import Cell
from consonar.training.build import open_pictures
from consonar.training.origins import PLACES, read_run_origin

Hashes = dict[str, str]
"""By the key of a cell that names the thing."""
Read = tuple[str, tuple[str | None, ...]]
"""That key, and all that says what is read."""
REFERENCE, NETWORK = "evaluate.reference", "evaluate.feature_network"
MADE_OF = " made of"
"""Ends the key of what tokens were made of (`store_made_of`); the key without it is that of the tokens themselves."""


def tokenizer_of(cell: Cell) -> str:
    """The tokenizer of a cell: its own, or that of what it starts from."""
    config = cell.config
    if config.tokenizer is not None:
        return config.tokenizer
    if cell.start is not None:
        return tokenizer_of(cell.start)
    named = read_origin(str(config.init)).tokenizer  # a generator has one of the three
    if named is None:
        raise UserError(f"{cell.name}: init: {config.init} does not say which tokenizer it goes with; add tokenizer")
    return named


def fingerprint(run: Path) -> str:
    """Of the weights themselves: equal for a run that was trained again to the same ones, unlike that of their file."""
    return component_fingerprint({}, load_generator(run).state_dict())


class Contents:
    """Of the cells of a sweep; what several of them share is read once."""

    def __init__(self) -> None:
        self.known: dict[Read, str | None] = {}

    def of(self, cell: Cell, run: Path) -> Hashes:
        """Of all that is here; `run` is the folder of the cell. `UserError` for what cannot be read."""
        config, data, asked = cell.config, cell.config.data, cell.evaluated
        split = asked.settings.validation_split

        def of_tokenizer() -> str | None:
            name = tokenizer_of(cell)
            return None if name.startswith("hf:") else load_tokenizer(name).fingerprint

        def image_size() -> int:
            return load_tokenizer(tokenizer_of(cell)).image_size

        def reference() -> str | None:
            return reference_content(asked.reference, split, image_size)

        def pictures() -> str | None:
            if data.bad_images != "stop" or not is_here(data.images):  # which are bad is known when all are read
                return None
            return open_pictures(config, image_size(), run).origin.data_sha256

        start = "" if config.init is None else cell.start.name if cell.start else str(config.init)
        reads: list[tuple[Read, Callable[[], str | None]]] = [
            (("tokenizer", (config.tokenizer, start)), of_tokenizer),
            ((REFERENCE, (asked.reference, split, config.tokenizer, start)), reference),
            ((NETWORK, (asked.feature_network,)), lambda: load_feature_network(asked.feature_network).weights_sha256),
        ]
        if config.init is not None and cell.start is None and not config.init.startswith("hf:"):
            reads.append((("init", (config.init,)), partial(weights_sha256, config.init)))
        if config.run == "generator":
            for key, path in (("data.tokens", data.tokens), ("data.validation_tokens", data.validation_tokens)):
                if path:  # "" is no store
                    reads.append(((key, (path,)), partial(store_content, path)))
                    reads.append(((key + MADE_OF, (path,)), partial(store_made_of, path)))
        else:
            reads.append((("data.images", (*map(str, to_dict(data).values()), start)), pictures))
        return {key[0]: sha256 for key, read in reads if (sha256 := self.once(key, read)) is not None}

    def once(self, key: Read, read: Callable[[], str | None]) -> str | None:
        if key not in self.known:
            try:
                self.known[key] = read()
            except NotHere:  # where there is work to do for which it is needed, that says so
                self.known[key] = None
        return self.known[key]


def recorded(content: JsonMap) -> Hashes:
    """What a result says of its making."""
    results = content.get("results") or {}
    found = {**(content.get("contents") or {}), **of_origin(from_dict(results.get("origin") or {}, "origin", Origin))}
    network, reference = results.get("feature_network"), results.get("reference")
    found |= {NETWORK: network["sha256"]} if network else {}
    if reference and REFERENCE not in found and "statistics_sha256" in reference:  # of an older version
        found[REFERENCE] = reference["statistics_sha256"]
    return found


def of_run(run: Path) -> Hashes:
    """What a run says of its making."""
    return of_origin(read_run_origin(run))


def of_origin(origin: Origin) -> Hashes:
    """By the keys that may name a thing."""
    found = {key: getattr(origin, name) for key, name in PLACES.items()}
    return {key: sha256 for key, sha256 in found.items() if sha256 is not None}


def known_to_both(now: Hashes, before: Hashes) -> tuple[dict[str, object], dict[str, object]]:
    """What both know, named as in a message. Tokens made alike are the same, though another processor, which rounds
    otherwise, may have decided between two codes at equal distance otherwise."""
    alike = {key for key, value in now.items() if key.endswith(MADE_OF) and before.get(key) == value}
    shared = sorted(
        key for key in now.keys() & before.keys() if not key.endswith(MADE_OF) and key + MADE_OF not in alike
    )
    ours, theirs = ({f"the content of {key}": one[key][:12] for key in shared} for one in (now, before))
    return {**ours}, {**theirs}


def store_content(path: str) -> str | None:
    return as_one([TokenStore.open(one) for one in store_paths(path)]).origin.data_sha256


def store_made_of(path: str) -> str | None:
    """Hash of pictures, tokenizer, views, precision, classes, labels and captions; None where one of the first is not
    known, as of imported tokens."""
    told = []
    for store in map(TokenStore.open, store_paths(path)):
        known = store.metadata
        made = (known.source_sha256, known.fingerprint, known.views, known.precision)
        if None in made:
            return None
        told.append((*made, known.class_names, store.table.column("label").to_pylist(), store.captions))
    return hashlib.sha256(f"{told}".encode(errors="replace")).hexdigest()


def is_here(spec: str | None) -> bool:
    """Whether images are files of this machine that somebody may have changed, not a data set with a name."""
    _, target = ("", "") if spec is None else find_source(spec)
    return bool(target) and home_expanded(target.partition("?")[0]).exists()


def reference_content(spec: str, split: str | None, image_size: Callable[[], int]) -> str | None:
    """Of a reference in files of this machine: of the whole .npz, else as sources know their content."""
    if at_size(spec)[1] is not None or not is_here(spec):
        return None
    if spec.endswith(".npz"):
        return file_sha256(home_expanded(spec))
    splits = open_splits(spec, split, key="evaluate.validation_split", otherwise=0, image_size=image_size())
    hashes = [getattr(one, "content_hash", None) for one in (splits.train, splits.validation) if one is not None]
    return None if None in hashes else hashlib.sha256(" ".join(map(str, hashes)).encode()).hexdigest()
