"""consonar: autoregressive image generators trained to agree with their image tokenizer.

`load_tokenizer`, `load_generator`, `sample`, `train`, `evaluate` are imported when first used: importing the package
touches no network, no GPU and no optional package.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load_tokenizer": "consonar.components",
    "load_generator": "consonar.components",
    "sample": "consonar.sampling.sample",
    "SamplerConfig": "consonar.sampling.sample",
    "train": "consonar.training.run",
    "evaluate": "consonar.evaluation.evaluate",
    "write_report": "consonar.report",
    "UserError": "consonar.errors",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'consonar' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
