# ruff: noqa: E501  (the sentences of the page)
"""What goes wrong together, and where: python claims/diagnosis.py [--page].

`consonar diagnose` for the generator of the package, for the two that a demo trains (runs/demo), and for three that the
study on photographs trains (`make claims`). Of each the numbers and what they are of are kept,
claims/results/diagnosis/NAME.json, and committed; what is there is not made again. A model of the study that is missing
is trained as `make claims` trains it; those of a demo `make demo` makes. Then the section of docs/results.md is written
from these files.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

from photographs import one_line, prepare, write_section

from consonar.cpu import hold_memory
from consonar.diagnostics.diagnose import diagnose
from consonar.diagnostics.findings import Interval
from consonar.diagnostics.subject import DiagnosisSettings
from consonar.errors import UserError
from consonar.files.lock import hold
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.json_types import Json
from consonar.sweeps.page import table
from consonar.sweeps.rows import read_sweep
from consonar.sweeps.work import Place, check_begun, check_contents, hold_needed, train_cell

HERE = Path(__file__).parent
EMOJI, PHOTOGRAPHS = "openmoji", "cifar10:runs/photographs/data"
SOME = ("exposure", "embedding", "noise")
MOST = (*SOME, "layers", "gap", "attribution")
STUDIED = "claims/results/photographs/runs"
MODELS = {
    "openmoji": ("openmoji", EMOJI, ()),
    "plain-ar": ("runs/demo/plain-ar", EMOJI, SOME),
    "rear": ("runs/demo/rear", EMOJI, SOME),
    "photographs-plain": (f"{STUDIED}/plain-0", PHOTOGRAPHS, MOST),
    "photographs-rear": (f"{STUDIED}/rear-0", PHOTOGRAPHS, MOST),
    "photographs-vapi": (f"{STUDIED}/plain+vapi-0", PHOTOGRAPHS, MOST),
}
"""File: model, data, and parts (none: all)."""
SHOWN = {
    "exposure": ("",), "embedding": ("perceptual distance", "the same", "PSNR", "share"), "layers": ("cosine with",),
    "noise": ("cross-entropy, nats", "cross-entropy added by 10%"), "gap": ("cross-entropy, held-out",),
    "forgiveness": ("rFD", "the same above rFD"), "attribution": ("added", "gFD"),
}  # fmt: skip
"""Part: how the names of its numbers begin that the page shows; the files have all."""


def complete(names: list[str]) -> None:
    """Trains the models of the study that these diagnoses are of, and what they start from, where they are not here, of
    the same files as its results. `UserError` for a model of a demo that is not here."""
    models = [MODELS[name][0] for name in names]
    for model in models:
        if model.startswith("runs/demo") and not Path(model).exists():
            raise UserError(f"{model}: not here; `make demo MINUTES=60` makes it, and `make results` its numbers")
    cells = [Path(model).name for model in models if model.startswith(STUDIED)]
    if not cells:
        return
    out = HERE / "results" / "photographs"
    sweep = read_sweep(HERE / "photographs.yaml", out)
    with hold(out / ".working" / "preparing", wait=True):
        prepare("cpu", sweep, out)
    place = Place(out, sweep, lambda text: print(text, flush=True))
    check_begun(place)
    check_contents(place)
    for cell in cells:
        with ExitStack() as locks:
            for needed in hold_needed(place, sweep.cells[cell], locks):
                train_cell(place, needed)


def measured(name: str) -> Json:
    """What is kept of a diagnosis."""
    model, data, parts = MODELS[name]
    found = diagnose(model, data, DiagnosisSettings(), parts=parts)
    numbers = {
        part: {
            what: {key: float(f"{value:.6g}") for key, value in one._asdict().items()}
            for what, one in finding.numbers.items()
        }
        for part, finding in found.findings.items()
    }
    chosen = f" --parts {','.join(parts)}" if parts else ""
    command = f"consonar diagnose {model} --data {data}{chosen} --out {name}.html"
    return {"command": command, "numbers": numbers, "provenance": found.provenance}


def page(known: dict[str, Json]) -> str:
    """The section, of the files by name."""
    lines = ["## What goes wrong: emoji of the package and of the demo, photographs of the study, diagnosed", ""]
    for name, one in known.items():
        made, model = one["provenance"], one["provenance"]["generator"]
        lines.append(
            f"- `{name}`: `{one['command']}` (seed {made['settings']['seed']}, {made['pictures']['held-out']['count']} held-out pictures, temperature "
            f"{made['settings']['sampler']['temperature']:g}; weights {model['sha256'][:12]}; {made['machine']}, torch {made['versions']['torch']})"
        )
    lines += [
        "",
        "95 % intervals over pictures, of one model each; perceptual distance and FD by efficientnet-lite0. Made by `make claims-diagnosis`, of photographs after `make claims`; all numbers are in "
        "`claims/results/diagnosis`, what they mean in [diagnostics.md](diagnostics.md).",
    ]
    for part, shown in SHOWN.items():
        of = {name: one["numbers"][part] for name, one in known.items() if part in one["numbers"]}
        names = dict.fromkeys(what for numbers in of.values() for what in numbers if what.startswith(shown))
        rows = {
            what: [Interval(**numbers[what]).text if what in numbers else "–" for numbers in of.values()]
            for what in names
        }
        lines += ["", f"### {part.capitalize()}", "", *table(list(of), rows)] if rows else []
    return "\n".join(lines)


@one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the section from the files that are there alone")
    only_page, paths = parser.parse_args().page, {n: HERE / "results" / "diagnosis" / f"{n}.json" for n in MODELS}
    hold_memory()
    missing = [] if only_page else [name for name, path in paths.items() if not path.exists()]
    complete(missing)
    for name in missing:
        write_json(paths[name], measured(name))
    write_section("diagnosis", page({name: read_json(path) for name, path in paths.items() if path.exists()}))


if __name__ == "__main__":
    main()
