"""The command `doctor`: what a bug report needs to say about the machine, and why it calculates as it does."""

import importlib.metadata
import os
import platform
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy
import torch

import consonar
from consonar import distributed, precision
from consonar.cli import say
from consonar.cli.ceilings import benchmark
from consonar.cpu import kernels, kernels_mode, timing
from consonar.errors import UserError
from consonar.evaluation.results import source_hash
from consonar.files.writers import cache_dir
from consonar.networks import inception, lpips
from consonar.training.optim import adamw_ways

UNMEASURED = "nothing is kept: the machine is too busy to be measured, or the cache folder cannot be written"
LABEL = 12


@dataclass(frozen=True, kw_only=True)
class Options:
    benchmark: bool = False
    """Also measure, for about a minute, what the device can do at most and which share of it our work reaches."""


def command(options: Options) -> None:
    lines = textwrap.TextWrapper(80, subsequent_indent=" " * LABEL, break_long_words=False, break_on_hyphens=False)
    device = distributed.pick_device()
    with precision.multiplying("fp32", device):
        for label, text in chain(findings(), benchmark(device) if options.benchmark else ()):
            lines.initial_indent = f"{label:{LABEL}}"
            say(lines.fill(text))


def findings() -> Iterator[tuple[str, str]]:
    """(what, in words), one paragraph each; the kernels that are most used are measured if they were not yet."""
    ours = f"consonar {consonar.__version__} (source {source_hash()}), python {platform.python_version()}"
    yield "versions", f"{ours}, torch {torch.__version__}, numpy {numpy.__version__}"
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}, {' '.join(platform.libc_ver())}"
    yield from devices()
    yield from chosen_kernels()
    present, missing = optional_packages()
    yield "packages", f"present: {', '.join(present) or 'none of the optional ones'}"
    if missing:
        yield "", f"missing, not needed by all: {', '.join(missing)}"
    yield from cached()


def devices() -> Iterator[tuple[str, str]]:
    device = distributed.pick_device("auto")
    if device.type == "cpu":
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        yield "device", f"cpu: PyTorch sees no CUDA device and {built}"
    else:
        yield "device", f"{device.type}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            memory = f"{found.total_memory / 2**30:.0f} GB"
            yield "", f"{index}: {found.name}, {memory}, compute capability {found.major}.{found.minor}"
    yield "processor", f"{timing.processor()}, {os.cpu_count()} cores seen, threads used: {torch.get_num_threads()}"
    capability = torch.backends.cpu.get_cpu_capability()
    bf16 = "multiplies" if precision.cpu_multiplies_bf16() else "does not multiply"
    yield "", f"PyTorch uses {capability}; the processor {bf16} bf16"


def chosen_kernels() -> Iterator[tuple[str, str]]:
    """Precision and kernels, and why."""
    device = distributed.pick_device("auto")
    chosen = precision.pick_precision("auto", device, "precision", "training")
    mode, answers = kernels_mode(), timing.kept_answers()
    if device.type != "cpu":
        why = "PyTorch knows of the device"
    elif not precision.cpu_multiplies_bf16():
        why = "the processor has no instructions for bf16"
    elif mode != "measured":
        why = f"CONSONAR_KERNELS={mode}"
    else:
        why = f"bf16 has {answers['bf16']:.2f} times the speed of float32" if "bf16" in answers else UNMEASURED
    yield "precision", f"loop.precision auto is {chosen}: {why}"
    drawn = precision.pick_precision("auto", device, "precision", "sampling")
    yield "", f"sample --precision auto is {drawn}; tokenize and evaluate are fp32 unless told"
    if mode != "measured":
        yield "kernels", f"all {'ours' if mode == 'ours' else 'of PyTorch'}: CONSONAR_KERNELS={mode}"
        return
    timing.ours("adamw", adamw_ways)
    for length in (64, 256, 1024):
        kernels.prefers_plain_attention(length, 64, precision.autocast_type(chosen) or torch.float32)
    for rows in (2, 16) if kernels.HAS_ONEDNN else ():
        kernels.prefers_order(rows, 2304, 768)
    answers = timing.kept_answers()
    if not answers:
        yield "kernels", f"all of PyTorch: {UNMEASURED}"
        return
    text = (
        f"measured on this machine: speed of our way over PyTorch's, ours from {timing.CLEARLY} on (attention in "
        "training: plain products, fused kernel; linear while sampling: oneDNN, PyTorch; ordered: oneDNN with "
        "weights in its order, the faster of these; adamw: fused, one by one; bf16: autocast, float32)"
    )
    yield "kernels", text
    for choice, ratio in sorted(answers.items()):
        yield "", f"{ratio:6.2f}  {'ours   ' if ratio >= timing.CLEARLY else 'PyTorch'}  {choice}"


def optional_packages() -> tuple[list[str], list[str]]:
    """Those of consonar's extras that are installed, with versions, and those that are not."""
    extras: dict[str, str] = {}
    for line in importlib.metadata.requires("consonar") or []:
        found = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"](\w+)['\"]", line)
        if found and found[2] != "dev" and found[1] != "consonar":
            extras.setdefault(found[1], found[2])
    present, missing = [], []
    for name, extra in extras.items():
        try:
            present.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name} (pip install consonar[{extra}])")
    return present, missing


def cached() -> Iterator[tuple[str, str]]:
    """Weights found in the cache folder, its size, and what is free."""
    try:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        yield "cache", str(error)
        return
    except OSError as error:
        yield "cache", f"{error.filename}: cannot be made ({error.strerror}); set CONSONAR_CACHE"
        return
    weights = [
        f"{file.network} ({file.name}){'' if (folder / file.name).is_file() else ' not'} in the cache"
        for file in (lpips.WEIGHTS, inception.WEIGHTS)  # which a user brings
    ]
    shipped = sorted(path.name for path in Path(consonar.__file__).parent.glob("*/pretrained/*") if path.is_dir())
    yield "weights", f"shipped: {', '.join(shipped)}; " + "; ".join(weights)
    for kind in ("released", "converted"):
        models = [path.name for path in (folder / kind).glob("*")]
        if models:
            yield "", f"{kind}: {', '.join(sorted(models))}"
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    writable = "" if os.access(folder, os.W_OK) else "; cannot be written"
    yield "cache", f"{folder}: {sum(sizes) / 1e6:,.1f} MB in {len(sizes)} files{writable}"
    for what, place in (("cache folder", folder), ("working folder", Path.cwd())):
        yield "disk" if place is folder else "", f"{shutil.disk_usage(place).free / 1e9:,.1f} GB free for the {what}"
