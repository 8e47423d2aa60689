"""The kit for a quarter of an hour on a GPU (`benchmarks/gpu`) runs dry: a name that moves breaks it here already."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import picture
from torch._dynamo import reset
from torch._dynamo.testing import CompileCounterWithBackend

from consonar import cli
from consonar.generators import build_generator
from consonar.sampling.sample import SamplerConfig, sample_tokens
from consonar.seeding import generator as seeded
from consonar.types import Grid

ROOT = Path(__file__).parents[2]
KIT = ROOT / "benchmarks" / "gpu"
PARITY_CASES = [
    "generators: llamagen: a pass", "generators: rear: sampling, filtered", "tokenizers: vqgan-plus, signs",
    "objectives: post-training, vapi", "objectives: post-training, ste", "networks: features of inception-pytorch",
    "networks: features of efficientnet", "networks: features of clip", "networks: features of dinov2",
    "networks: text encoder t5", "networks: distance efficientnet", "networks: patch", "rewards: lpips",
]  # fmt: skip
"""Every function of the script; every case is in the other files here."""

SMALLER = {
    "rear-openmoji": ["--model.num-layers", "1", "--model.width", "64"],
    "vapi-openmoji": ["--objective.group-size", "2"],
}
"""Enough for a test of the other options."""


def script(name: str) -> ModuleType:
    """A script of the kit as a module; `parity` is also a folder of tests, so that it goes by another name."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", KIT / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    return script("parity")


@pytest.fixture(scope="module")
def timing() -> ModuleType:
    return script("timing")


def test_parity_holds_where_the_device_is_a_pretence(cuda, parity, capsys) -> None:
    parity.main(["--only", *PARITY_CASES])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"FAILS: 0 of {len(lines) - 1}" and all(line.startswith("OK ") for line in lines[:-1])
    assert all(any(text in line for line in lines) for text in PARITY_CASES)


def test_parity_fails_where_the_device_computes_something_else(cuda, parity, monkeypatch, capsys) -> None:
    def moved_and_changed(model, device):
        model = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        return model.to(device)

    monkeypatch.setattr(parity, "moved", moved_and_changed)
    cases = ["rear: a pass", "tokenizers: maskgit", "distance efficientnet"]
    with pytest.raises(SystemExit) as ended:
        parity.main(["--only", *cases, "rewards: mse"])
    *lines, last = capsys.readouterr().out.split("FAILS: ")
    failed = last.splitlines()[1:]
    assert ended.value.code == 1 and all(any(text in name for name in failed) for text in cases)
    assert "OK    rewards: mse" in lines[0]  # the others are tried all the same


def test_parity_fails_where_something_breaks_or_nothing_is_tried(cuda, parity, monkeypatch, capsys) -> None:
    def broken(device):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(parity.GROUPS, "tokenizers", lambda: iter([("vq", broken)]))
    for arguments in (["tokenizers"], ["--only", "nothing of this name"]):
        with pytest.raises(SystemExit) as ended:
            parity.main(arguments)
        assert ended.value.code == 1
    assert "FAIL  tokenizers: vq: RuntimeError: no such kernel" in capsys.readouterr().out


@pytest.fixture
def timed(cuda, timing, monkeypatch, tmp_path):
    """The exit status and the lines of some stages at toy sizes."""

    def run(stages: dict, seconds: float = 600) -> tuple[int, list[dict]]:
        for key, value in {"TOY": "1", "OUT": str(tmp_path), "SECONDS_LEFT": str(seconds)}.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(timing, "STAGES", stages)
        monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # before each: half a second, of all that pytest has
        status = 0
        try:
            timing.main()
        except SystemExit as ended:
            status = ended.code
        return status, [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]

    return run


def test_every_way_of_timing_gives_a_line(timed, timing) -> None:
    one_of_each = {getattr(run, "func", run): name for name, run in timing.STAGES.items()}
    captions = next(name for name in timing.STAGES if "captions" in name)
    stages = {name: timing.STAGES[name] for name in (*one_of_each.values(), captions)}
    status, lines = timed(stages)
    assert not [line for line in lines if "error" in line] and status == 0
    assert [line["name"] for line in lines] == list(stages)
    assert {"gpu", "torch", "date", "tb_per_s", "bf16_tflops"} <= lines[0].keys()
    ratios = [line for line in lines if "against" in line["name"]]
    alone = [line for line in lines[1:] if line not in ratios]
    assert len(alone) == 6 and all(line["seconds"] > 0 for line in alone)
    assert all({"share_of_floor", "share_of_products", "planned_gib"} & line.keys() for line in alone)
    assert any({"encode_s", "decode_s", "judge_s", "one_stream_s"} <= line.keys() for line in alone)
    found = {key for line in ratios for key in line if " / " in key}
    others = ("no cache / ours", "growing cache / ours", "static cache, compiled / ours")
    assert found == {*others, "no graphs / graphs", "released / shared context", "released / ours"}
    assert all(share > 0.5 for line in ratios for share in line.get("equal_tokens", {}).values())  # bf16 rounds


def test_the_alternatives_draw_what_ours_draws(cuda, timing) -> None:
    """In float32, where rounding does not decide; two images of four tokens."""
    shape = replace(timing.LLAMAGEN_PRESETS["XL"], num_layers=2, width=64, num_heads=4)
    model = build_generator(shape.sized(64, 4, 10, grid=Grid(2, 2)))
    model.reset_parameters(seeded(0, "alternatives"))
    torch.nn.init.normal_(model.output.weight, generator=seeded(1, "alternatives"))
    model, labels = model.to("cuda").eval(), torch.arange(2, device="cuda")
    ours, _ = sample_tokens(model, labels, range(2), SamplerConfig(temperature=0, guidance_scale=2.0))
    assert len(ours.unique()) > 2
    versus = sys.modules["versus"]
    assert torch.equal(versus.growing_greedy(model, labels, 2.0), ours)
    assert torch.equal(versus.StaticSampler(model, 2, compiled=False).greedy(labels, 2.0), ours)


def test_the_static_cache_is_one_that_cuda_graphs_may_write_to(timing, monkeypatch) -> None:
    """PyTorch makes no graph of a call that writes to a tensor whose place in memory it does not know to stay."""
    versus, own, kinds = sys.modules["versus"], torch.compile, {}

    def look(graph, inputs):
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                kinds[tuple(node.meta["example_value"].shape)] = node.meta["tensor_dict"].get(
                    "_dynamo_static_input_type"
                )
        return graph

    monkeypatch.setattr(torch, "compile", lambda call, mode, fullgraph: own(call, backend=look, fullgraph=fullgraph))
    shape = replace(timing.LLAMAGEN_PRESETS["XL"], num_layers=1, width=64, num_heads=4)
    sampler = versus.StaticSampler(build_generator(shape.sized(64, 4, 10, grid=Grid(2, 2))), 2, compiled=True)
    reset()
    sampler.greedy(torch.arange(2), 2.0)
    assert kinds[tuple(sampler.cache.shape)] == "unguarded" and None in kinds.values()


def test_a_ratio_against_graphs_that_were_not_made_is_none(timed, timing, monkeypatch) -> None:
    versus = sys.modules["versus"]
    own = versus.compare_tokens

    def compare(*given):
        versus.counters["inductor"]["cudagraph_skips"] += 1
        return own(*given)

    monkeypatch.setattr(versus, "compare_tokens", compare)
    name = next(name for name in timing.STAGES if "RAR's and LlamaGen's samplers" in name)
    status, (line,) = timed({name: timing.STAGES[name]})
    assert status == 1 and "made no CUDA graph" in line["error"]


def test_the_released_step_of_rear_is_compiled_as_ours_is(timing) -> None:
    """One graph for all blocks, with the loss of ours."""
    counter, shape = CompileCounterWithBackend("eager"), replace(timing.REAR_PRESETS["S"], width=64, num_heads=4)
    shape, taken = replace(shape, num_layers=3, dropout=0.0).sized(32, 4, 10), []
    tokens, labels = torch.arange(8).view(2, 4), torch.arange(2)
    reset()
    for make in (build_generator, timing.Released):
        model = make(shape)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02, generator=seeded(parameter.numel(), "released"))
        if make is timing.Released:
            model.one_block = torch.compile(model.one_block, backend=counter, fullgraph=True)
        taken.append(model.train()(tokens, labels)[0])
    torch.testing.assert_close(*taken)
    assert counter.frame_count == 1


def test_a_stage_that_breaks_loses_no_other_and_time_runs_out(timed) -> None:
    stages = {"breaks": lambda bench: 1 / 0, "goes on": lambda bench: {"seconds": 1.23456}}
    lines = [
        {"name": "breaks", "error": "ZeroDivisionError: division by zero"},
        {"name": "goes on", "seconds": 1.235, "peak_gib": 0.0},
    ]
    assert timed(stages) == (1, lines)
    assert timed(stages, seconds=-1) == (0, lines + [{"name": name, "skipped": "no time left"} for name in stages])


def test_memory_that_cannot_be_given_back_loses_no_stage(timed, monkeypatch) -> None:
    """As after a kernel that read where it may not: every call of CUDA fails from then on, and every stage says so."""

    def refuse() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    status, lines = timed(dict.fromkeys(("first", "second"), lambda bench: {}))
    assert status == 1 and [line["name"] for line in lines] == ["first", "second"]
    assert all("illegal memory access" in line["error"] for line in lines)


def test_the_commands_of_the_real_run(tmp_path: Path) -> None:
    """As `real.sh` gives them, on the CPU with few pictures."""
    for split, count in (("train", 12), ("validation", 6)):
        for index in range(count):
            path = tmp_path / "openmoji" / split / "abc"[index % 3] / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(index, 64).save(path)
    places = {"DATA": tmp_path, "OUT": tmp_path, "WORK": tmp_path / "work", "PYTHON": sys.executable}
    settings = {key: str(value) for key, value in places.items()} | {"TOY": "1", "CONSONAR": "echo consonar"}
    told = subprocess.run(["bash", KIT / "real.sh"], env=os.environ | settings, capture_output=True, text=True)
    commands = [shlex.split(line)[1:] for line in told.stdout.splitlines() if line.startswith("consonar ")]
    assert [command[0] for command in commands] == ["tokenize", "train", "train", *["sample", "evaluate"] * 2, "sample"]
    for command in [*commands[:5], commands[-1]]:  # `vapi` is sampled and evaluated as `rear` is
        cli.main(command + SMALLER.get(command[1], []))
    assert (tmp_path / "rear.json").is_file() and (tmp_path / "vapi.png").is_file()


def test_the_scripts_find_what_they_import_where_check_sh_calls_them() -> None:
    """There pytest has put no folder of tests on the path."""
    code = f"import sys; sys.path[:0] = [{str(KIT)!r}]; import parity, timing"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_compiles_or_calls_nccl_is_tested_after_all_else() -> None:
    """In two stages that together run every test."""
    text, tests = (KIT / "check.sh").read_text(), (ROOT / "tests" / "gpu" / "test_cuda.py").read_text()
    first, last = re.findall(r'tests \w+ "(.+)"', text)
    assert first == f"not ({last})" and text.index("real.sh") < text.index(f'"{last}"')
    slow = re.compile(last.replace(" or ", "|"))
    bodies = re.split(r"\ndef (?=test_)", tests)[1:]
    assert len(bodies) > 10
    for body in bodies:
        assert bool(slow.search(body.partition("(")[0])) == bool(re.search(r'compile|"fsdp"', body)), body[:80]


@pytest.mark.parametrize("name", ["prepare", "check", "real"])
def test_shell_scripts_can_be_read_and_import_what_there_is(name) -> None:
    assert subprocess.run(["bash", "-n", KIT / f"{name}.sh"]).returncode == 0
    for line in re.findall(r"^from consonar\S* import .*$", (KIT / f"{name}.sh").read_text(), re.MULTILINE):
        exec(line, {})
