"""Configurations: read strictly, refused in one line, and every field is read somewhere."""

import ast
import dataclasses
import json
import typing
from pathlib import Path

import pytest
import tyro

import consonar
from consonar.cli.train import Options, parse_run
from consonar.config_io import REPLACED_TABLES, from_dict, merge, to_dict
from consonar.errors import UserError
from consonar.generators import GENERATORS
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.janus import JanusConfig
from consonar.generators.llamagen import LlamaGenConfig
from consonar.generators.rear import REAR_PRESETS, ReARConfig
from consonar.parallel import ParallelConfig
from consonar.recipes import RECIPES, find_recipe, read_config
from consonar.sampling.sample import SamplerConfig
from consonar.sweeps.rows import read_sweep
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.alitok import AliTokConfig
from consonar.tokenizers.titok import TiTokConfig
from consonar.tokenizers.vit import TransformerConfig
from consonar.tokenizers.vq import VQConfig
from consonar.tokenizers.vqgan import MaskGITConfig, VQGANPlusConfig
from consonar.training.config import DataConfig, LoopConfig, TrainConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives import kinds
from consonar.training.objectives.alignment import GuardConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.controls import CrossEntropyConfig, StraightThroughConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.optim import OptimConfig

SOURCE = Path(consonar.__file__).parent


def read(tmp_path: Path, text: str, name: str = "mine.yaml") -> TrainConfig:
    path = tmp_path / name
    path.write_text(text)
    return read_config(path)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    config = find_recipe(name)
    assert config.recipe == name
    assert from_dict(json.loads(json.dumps(to_dict(config))), name, TrainConfig) == config


@pytest.mark.parametrize("name", RECIPES)
def test_a_written_config_can_be_read_as_a_file(name, tmp_path):
    """JSON writes 1e-05, which YAML 1.1 would take for text."""
    assert read(tmp_path, json.dumps(to_dict(find_recipe(name))), "config.json") == find_recipe(name)


def test_base_and_changes(tmp_path):
    config = read(
        tmp_path,
        "base: rear-openmoji\noptim: {lr: 1e-4, min_lr: 1.5e-5}\n"
        "objective:\n  noise: {corruption: mask}\nloop: {trackers: [wandb]}\n",
    )
    base = find_recipe("rear-openmoji")
    assert config.recipe == "mine"
    assert config.optim == dataclasses.replace(base.optim, lr=1e-4, min_lr=1.5e-5)
    assert config.objective.noise == dataclasses.replace(base.objective.noise, corruption="mask")
    assert config.objective.embedding_weight == base.objective.embedding_weight
    assert config.loop.trackers == ("wandb",) and config.model == base.model


@pytest.mark.parametrize("way", ["options", "file", "sweep"])
def test_what_a_recipe_says_itself_is_not_refused_where_a_change_leaves_it_unread(way, tmp_path):
    """A value that the user gave is."""

    def made(section: str, **changes: object) -> TrainConfig:
        if way == "options":
            words = [word for key in changes for word in (f"--{section}.{key.replace('_', '-')}", str(changes[key]))]
            given = parse_run("train", ["ar-scenes", "--out", str(tmp_path / "run"), *words], Options, out=tyro.MISSING)
            assert given is not None
            return given.config
        if way == "file":
            return read(tmp_path, json.dumps({"base": "ar-scenes", section: changes}))
        row = {f"{section}.{key}": value for key, value in changes.items()}
        table = {"base": "ar-scenes", "seeds": 1, "rows": {"one": row}, "evaluate": {"reference": "scenes"}}
        (tmp_path / "sweep.json").write_text(json.dumps(table))
        [cell] = read_sweep(tmp_path / "sweep.json", tmp_path / "out").cells.values()
        return cell.config

    assert made("data", validation_tokens="").data.validation_items == 0
    with pytest.raises(UserError, match=r"data\.validation_items: 7 is read only with"):
        made("data", validation_tokens="", validation_items=7)
    config = made("model", condition="class")
    assert config.model == REAR_PRESETS["tiny"] and config.text_encoder is None
    with pytest.raises(UserError, match=r"model\.caption_dim: 100 is read only with model\.condition 'text'"):
        made("model", condition="class", caption_dim=100)
    assert find_recipe("ar-scenes").data.validation_items == 1000


def test_another_kind_replaces_the_whole_table():
    base = {"model": {"kind": "rear", "width": 3}, "seed": 1}
    assert merge(base, {"model": {"kind": "vq", "vocab_size": 8}})["model"] == {"kind": "vq", "vocab_size": 8}
    assert merge(base, {"model": {"width": 4}}) == {"model": {"kind": "rear", "width": 4}, "seed": 1}
    assert base["model"]["width"] == 3


def test_rewards_in_a_file_replace_those_of_the_recipe(tmp_path):
    """As on the command line; all else that the file does not name stays."""
    config = read(tmp_path, "base: vapi-openmoji\nobjective: {rewards: {ssim: 1.0}}\n")
    base = find_recipe("vapi-openmoji")
    assert len(base.objective.rewards) == 2
    assert config.objective == dataclasses.replace(base.objective, rewards={"ssim": 1.0})


def test_every_table_of_the_users_own_keys_is_replaced():
    tables = {
        name for kind in CALLED for name, hint in typing.get_type_hints(kind).items() if typing.get_origin(hint) is dict
    }
    assert tables == set(REPLACED_TABLES)


MISTAKES = {
    "unknown key": ("base: ar-openmoji\noptim: {rate: 1}", r"optim\.rate: unknown .*choices: lr, min_lr"),
    "misspelt": ("base: ar-openmoji\nlop: {steps: 1}", r"lop: unknown 'lop' \(did you mean 'loop'\?\)"),
    "nested": ("base: ar-openmoji\nobjective: {noise: {shedule: none}}", r"objective\.noise\.shedule: .*'schedule'"),
    "type": ("base: ar-openmoji\nloop: {steps: many}", r"loop\.steps: input should be a valid integer, got 'many'"),
    "float for int": ("base: ar-openmoji\nloop: {steps: 1.5}", r"loop\.steps: .*got 1\.5"),
    "text for bool": ("base: ar-openmoji\ndata: {flip: 'yes'}", r"data\.flip: .*got 'yes'"),
    "table for number": ("base: ar-openmoji\nseed: {a: 1}", r"seed: .*got \{'a': 1\}"),
    "number for table": ("base: ar-openmoji\nloop: 3", r"loop: expected a table of keys, got 3"),
    "list for table": ("base: ar-openmoji\nmodel: [1]", r"model\.kind: unknown None; choices: rear, llamagen, .*, vq"),
    "choice": (
        "base: ar-openmoji\nobjective: {noise: {schedule: cosine}}",
        r"objective\.noise\.schedule: input should be 'none', 'constant', .*got 'cosine'",
    ),
    "value": ("base: ar-openmoji\noptim: {lr: -1}", r"optim\.lr: -1.* is not in \(0, 10\]"),
    "value of the second kind": (
        "base: tokenizer-openmoji-64\nmodel: {vocab_size: 1}", r"model\.vocab_size: 1 is too small; at least 2"
    ),
    "type in the second kind": (
        "base: tokenizer-openmoji-64\nmodel: {base_channels: wide}", r"model\.base_channels: .*got 'wide'"
    ),
    "kind": ("base: ar-openmoji\nmodel: {kind: gan}", r"model\.kind: unknown 'gan'; choices: rear, llamagen, .*, vq"),
    "other kind": ("base: ar-openmoji\nmodel: {kind: vq}", r"objective\.kind: 'consistency' does not train .*'vq'"),
    "base": ("base: ar-openmojo", r"recipe: unknown 'ar-openmojo' \(did you mean 'ar-openmoji'\?\)"),
    "base list": ("base: [a, b]", r"base: expected the name of a recipe, got \['a', 'b'\]"),
    "missing": ("tokenizer: openmoji-64", r"recipe: missing"),
    "no tokenizer": ("recipe: x", r"tokenizer: a generator needs"),
    "key given twice": ("base: ar-openmoji\noptim:\n  lr: 1\n  beta1: 0.5\n  lr: 2", r"lr is given twice .*line 5"),
    "key given twice in a line": ("base: ar-openmoji\noptim: {lr: 1, 'lr': 2}", r"lr is given twice .*line 2"),
    "section given twice": ("base: ar-openmoji\nseed: 1\nloop: {}\nloop: {}", r"loop is given twice in one table"),
    "reward given twice": ("base: vapi-openmoji\nobjective: {rewards: {mse: 1, mse: 2}}", r"mse is given twice"),
    "layers": ("base: ar-openmoji\nmodel: {num_layers: 1000000000}", r"num_layers: 1000000000"),
    "octal": ("base: ar-openmoji\nseed: 010", r"seed: .*'010'"),
    "minutes": ("base: ar-openmoji\nloop:\n  steps: 1:30", r"loop\.steps: .*'1:30'"),
    "YAML": ("a: [1", r"mine\.yaml: not valid YAML"),
    "list": ("- 1", r"mine\.yaml: expected a table of keys, got list"),
    "empty": ("", r"expected a table of keys, got NoneType"),
    "date": ("base: ar-openmoji\nseed: 2026-01-01", r"neither number, text, list nor table of such"),
    "device": ("base: ar-openmoji\nloop: {device: gpu}", r"loop\.device: unknown 'gpu' .*: auto, cpu, cuda"),
    "precision": ("base: ar-openmoji\nloop: {precision: fp16}", r"loop\.precision: unknown 'fp16' .*fp32, tf32, bf16"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_with_key_and_value(name, tmp_path):
    text, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not valid YAML"):
        read_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoopConfig(steps=0), r"loop\.steps: 0 is not positive"),
        (lambda: LoopConfig(batch_size=8, accumulation=3), r"loop\.accumulation: 3 does not divide loop\.batch_size 8"),
        (lambda: LoopConfig(ema_decay=1), r"loop\.ema_decay: 1 is not in"),
        (lambda: LoopConfig(save_every=-1), r"loop\.save_every: -1 is negative"),
        (
            lambda: LoopConfig(fd_samples=1),
            r"loop\.fd_samples: 1 is too small; at least 2, or 0; a distance needs 2 samples",
        ),
        (lambda: DataConfig(views="ten"), r"data\.views: unknown 'ten'.*choices: center, "),
        (lambda: ReARConfig(width=30, num_heads=4), r"model\.num_heads: 4 does not divide model\.width 30"),
        (lambda: ReARConfig(dropout=1), r"model\.dropout: 1 is not in"),
        (lambda: AutoregressiveConfig(embedding_weight=-1), r"objective\.embedding_weight: -1 is negative"),
        (lambda: AutoregressiveConfig(class_dropout=1), r"objective\.class_dropout: 1 is not in"),
        (lambda: NoiseConfig(schedule="linear", max_rate=1.5), r"objective\.noise\.max_rate: 1\.5 is not in"),
        (lambda: NoiseConfig(schedule="truncated_linear", anneal_end=0), r"objective\.noise\.anneal_end: 0 is not in"),
        (lambda: ReconstructionConfig(mse_weight=-1), r"objective\.mse_weight: -1 is negative"),
        (lambda: TrainConfig(recipe="x", tokenizer="t", seed=-1), r"seed: -1 is negative"),
        (lambda: TrainConfig(recipe="x", model=VQConfig()), r"objective\.kind: .*choices: reconstruction"),
    ],
)
def test_wrong_values_from_python(make, message):
    with pytest.raises(UserError, match=message):
        make()


# What the code calls a configuration of each class where it reads it.
CALLED = {
    TrainConfig: {"config"},
    DataConfig: {"data"},
    LoopConfig: {"loop"},
    ParallelConfig: {"config"},
    OptimConfig: {"optim", "config"},
    ReARConfig: {"model", "config"},
    VQConfig: {"model", "config"},
    AutoregressiveConfig: {"objective", "config"},
    ReconstructionConfig: {"objective", "config"},
    NoiseConfig: {"noise", "settings"},
    PolicyConfig: {"config", "settings", "objective", "AlignmentConfig"},
    CrossEntropyConfig: {"config", "AlignmentConfig"},
    StraightThroughConfig: {"config", "AlignmentConfig"},
    GuardConfig: {"guard"},
    LlamaGenConfig: {"config", "RotaryConfig"},
    AliTokARConfig: {"config", "RotaryConfig"},
    JanusConfig: {"config"},
    MaskGITConfig: {"config", "ConvConfig"},
    VQGANPlusConfig: {"config", "ConvConfig"},
    TiTokConfig: {"config", "ViTConfig"},
    AliTokConfig: {"config", "ViTConfig"},
    TransformerConfig: {"config", "encoder", "decoder"},
    SamplerConfig: {"config", "settings", "sampler"},
}


def test_every_kind_of_configuration_is_in_the_table():
    """Those of the registries and of `TrainConfig`."""
    known = {pair[0] for registry in (GENERATORS, TOKENIZERS) for pair in registry.values()}
    known |= set(kinds().values())
    assert known <= set(CALLED)


def test_every_field_is_read():
    """`x.field` occurs outside of `__post_init__`; x is what a configuration is called, `self` in it or its bases."""
    reads: set[tuple[str, str]] = set()

    class Reader(ast.NodeVisitor):
        owner = ""

        def visit_ClassDef(self, node):
            outer, self.owner = self.owner, node.name
            self.generic_visit(node)
            self.owner = outer

        def visit_FunctionDef(self, node):
            if node.name != "__post_init__" or self.owner == "TrainConfig":
                self.generic_visit(node)

        def visit_Attribute(self, node):
            base = node.value
            name = base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""
            reads.add((self.owner if name == "self" else name, node.attr))
            self.generic_visit(node)

        def visit_Subscript(self, node):  # of the plain dicts that rows of methods are chosen by
            if isinstance(node.value, ast.Name) and isinstance(node.slice, ast.Constant):
                reads.add((node.value.id, node.slice.value))
            self.generic_visit(node)

    for path in SOURCE.rglob("*.py"):
        Reader().visit(ast.parse(path.read_text()))
    unread = [
        f"{kind.__name__}.{item.name}"
        for kind, names in CALLED.items()
        for item in dataclasses.fields(kind)
        if not any((name, item.name) in reads for name in (*names, *(base.__name__ for base in kind.__mro__)))
    ]
    assert unread == []
    assert sum(len(dataclasses.fields(kind)) for kind in CALLED) > 150  # the table above is not empty


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_one_file_trains_and_one_file_knows_processes():
    sources = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    nodes = {name: list(ast.walk(ast.parse(path.read_text()))) for name, path in sources.items()}
    backward = [name for name in nodes if any(getattr(node, "attr", None) == "backward" for node in nodes[name])]
    assert backward == ["training/loop.py"]
    parsing = [name for name, path in sources.items() if any(i.split(".")[0] == "tyro" for i in imports(path))]
    assert parsing and all(name.startswith("cli/") for name in parsing)
    knowing = [name for name, path in sources.items() if any(i.startswith("torch.distributed") for i in imports(path))]
    assert sorted(knowing) == ["distributed.py", "parallel.py", "shards.py"]


@pytest.mark.parametrize(
    "text",
    [
        "loop: &a {trackers: [*a]}",
        "a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
        "e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\nloop: {trackers: [*e, *e]}",
    ],
)
def test_references_in_yaml_do_not_grow_without_end(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml: not valid YAML.*over 10000 values"):
        read_config(tmp_path / "x.yaml")
