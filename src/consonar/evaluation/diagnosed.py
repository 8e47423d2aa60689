"""Which command makes the file of a diagnosis again: all that it records of options, in words."""

import shlex

from consonar.config_io import to_dict
from consonar.errors import printable
from consonar.json_types import Json
from consonar.sampling.sample import SamplerConfig

OPTIONS = ("num_images", "perceptual", "feature_network", "seed", "batch_size", "precision")
"""Settings that are options of those names."""


def diagnosed_by(content: Json, name: str) -> str | None:
    """The command that makes a file of `diagnose` again, or one that is condensed from it, beside a page called after
    `name`; None for other files.

    What a file of an older version does not record is left at its default.
    """
    known = content.get("parts", content.get("numbers") if "command" in content else None)
    if known is None:
        return None
    made = table(content, "provenance")
    settings, model = table(made, "settings"), table(made, "generator") or table(made, "tokenizer")
    parts = [*(known if isinstance(known, dict) else ()), *table(content, "unavailable")]
    usual = to_dict(SamplerConfig())
    given = {
        "data": made.get("data"),
        "parts": ",".join(parts),
        **table(made, "asked"),
        **{key: settings.get(key) for key in OPTIONS},
        "device": str(settings["device"]).partition(":")[0] if "device" in settings else None,
        **{key: value for key, value in table(settings, "sampler").items() if value != usual.get(key)},
        "out": f"{name}-again.html",
    }
    words = ["consonar", "diagnose", str(content.get("subject", model.get("name")))]
    for key, value in given.items():
        if value not in (None, ""):
            words += [f"--{key.replace('_', '-')}", str(value)]
    return printable(shlex.join(words))


def table(content: Json, key: str) -> Json:
    """The table called `key`; an empty one where there is none."""
    found = content.get(key)
    return found if isinstance(found, dict) else {}
