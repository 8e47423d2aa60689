"""The command `plan`: whether a run fits (status 1: it does not) and how long it takes, with the options of `train`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from consonar.cli import say
from consonar.cli.train import parse_run
from consonar.files.readers import has_keys
from consonar.files.writers import check_replaced, check_writable, write_json
from consonar.options import Range
from consonar.planning.page import lines, record
from consonar.planning.plan import Machine, plan, remedies
from consonar.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=Machine)
    num_classes: int | None = None
    """Classes of a generator whose token store is not there yet (default: ImageNet's 1,000)."""
    json: Path | None = None
    """Also write all numbers to this file."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace a plan that lies there."""


def command(args: Sequence[str]) -> None:
    options = parse_run("plan", args, Options)
    if options is None:
        return
    if options.num_classes is not None:
        Range(1).check("--num-classes", options.num_classes)
    if options.json is not None:
        check_json(options.json, overwrite=options.overwrite)
        check_writable(options.json, "--json")
    found = plan(options.config, options.machine, options.num_classes)
    if options.json is not None:
        check_json(options.json, overwrite=options.overwrite)  # another may have come meanwhile
        write_json(options.json, record(found))
    for line in lines(found, remedies(found, options.num_classes)):
        say(line)
    if not found.fits:
        sys.exit(1)


def check_json(path: Path, *, overwrite: bool) -> None:
    """Raises `UserError` where a plan would replace anything but a plan."""
    is_ours = partial(has_keys, keys={"gpus", "fits"})
    check_replaced(path, "--json", "plan.json", "holds no plan", is_ours, overwrite=overwrite)
