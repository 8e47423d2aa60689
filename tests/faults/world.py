"""A folder in which every command has something to do, all of it tiny, and a command of each kind."""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from conftest import TINY_VQ, save_pictures, save_tokenizer_of_32
from faults.server import Server
from forked import free_port

from consonar.config_io import to_dict

LOOP = {
    "steps": 6, "batch_size": 4, "log_every": 1, "save_every": 2, "validate_every": 3, "sample_every": 3,
    "keep_checkpoints": 2, "precision": "fp32", "device": "cpu",
}  # fmt: skip
CODEC = replace(TINY_VQ, base_channels=32, channel_multipliers=(1, 1, 1), latent_channels=32, num_groups=32)
"""With the groups that released tokenizers have."""
TINY = {"kind": "rear", "width": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1}
FILES = {
    "ar.yaml": {
        "base": "rear-openmoji", "tokenizer": "vq/model", "model": TINY, "objective": {"head_width": 16}, "loop": LOOP,
        "data": {"tokens": "tokens"}, "optim": {"warmup_steps": 1},
    },
    "va.yaml": {
        "base": "vapi-openmoji", "init": "run", "loop": LOOP, "data": {"images": "pictures"},
        "objective": {"rewards": {"mse": 1.0}, "group_size": 2}, "optim": {"warmup_steps": 1},
    },
    "words.yaml": {
        "base": "ar-scenes", "tokenizer": "codec32", "text_encoder": "encoder", "loop": LOOP,
        "model": {**TINY, "condition": "text", "caption_dim": 8, "num_condition_tokens": 12},
        "data": {"tokens": "scenes", "validation_items": 4}, "optim": {"warmup_steps": 1},
    },
    "vq.yaml": {
        "base": "tokenizer-openmoji-64", "model": to_dict(CODEC), "loop": LOOP, "data": {"images": "pictures"},
        "objective": {"perceptual_weight": 0.0, "discriminator_weight": 0.1, "discriminator_start": 2},
    },
    "study.yaml": {
        "seeds": 1,
        "options": {"loop.steps": 2, **{f"loop.{key}": value for key, value in LOOP.items() if key != "steps"}},
        "rows": {
            "plain": {"base": "ar-openmoji", "model": TINY, "tokenizer": "vq/model", "data.tokens": "tokens"},
            "noise": {"base": "ar-openmoji", "model": TINY, "tokenizer": "vq/model", "data.tokens": "tokens",
                      "objective.noise.schedule": "linear"},
        },
        "evaluate": {"reference": "pictures", "feature_network": "quarters", "temperatures": [1], "draws": 2,
                     "num_samples": 8, "reconstruct": False},
    },
}  # fmt: skip
SCENES = ["a dog", "two red apples"]
ALONE = ["TORCHELASTIC_RUN_ID=none", "WORLD_SIZE=1", "RANK=0", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=0"]
"""One process that torchrun has started."""
TWO = [
    *ALONE[:1],
    "WORLD_SIZE=2",
    "RANK=0",
    "MASTER_ADDR=127.0.0.1",
    f"MASTER_PORT={free_port()}",
    "CONSONAR_TIMEOUT=10",
]
"""Two of them: the server starts the second."""
TOKENIZE = ["tokenize", "--tokenizer", "vq/model", "--data", "pictures"]
EVALUATE = ["--reference", "pictures", "--feature-network", "quarters", "--draws", "2"]
LORA = ["--init", "run", "--lora.rank", "2"]
MADE = (
    ["train", "vq.yaml", "--out", "vq"],
    [*TOKENIZE, "--out", "tokens"],
    ["train", "ar.yaml", "--out", "run"],
    ["train", "ar.yaml", "--out", "half", "--stop-at", "3"],
    ["train", "va.yaml", "--out", "va-half", "--stop-at", "3"],
    ["sample", "run", "--num-samples", "8", "--out", "some.npz"],
    ["evaluate", "run", *EVALUATE, "--num-samples", "8", "--temperatures", "1"],
    ["convert", "vq/model", "--to-official", "released.pt"],
    ["report", "run", "--out", "page.html"],
    ["tokenize", "--tokenizer", "codec32", "--data", "pictures", "--out", "tokens32"],
    ["train", "ar.yaml", "--tokenizer", "codec32", "--data.tokens", "tokens32", "--out", "run32"],
    ["tokenize", "--tokenizer", "codec32", "--data", "scenes:12", "--out", "scenes"],
    ["train", "words.yaml", "--out", "words"],
    ["sample", "words", "--prompts", "prompts.txt", "--per-prompt", "2", "--out", "words.npz"],
    ["train", "ar.yaml", *LORA, "--out", "lora-half", "--stop-at", "3"],
)
COMMANDS = {
    "train": ["train", "ar.yaml", "--out", "new"],
    "resume": ["train", "ar.yaml", "--out", "half", "--resume"],
    "post-train": ["train", "va.yaml", "--out", "va"],
    "resume post-training": ["train", "va.yaml", "--out", "va-half", "--resume"],
    "train a tokenizer": ["train", "vq.yaml", "--out", "codec"],
    "sample .npz": ["sample", "run", "--num-samples", "8", "--out", "new.npz"],
    "sample .png": ["sample", "run", "--num-samples", "8", "--out", "new.png"],
    "sample folder": ["sample", "run", "--num-samples", "8", "--out", "new"],
    "tokenize": ["tokenize", "--tokenizer", "vq/model", "--data", "mixed", "--bad-images", "skip", "--bad-images-limit",
                 "0.5", "--out", "new"],
    "evaluate a run again": ["evaluate", "run", *EVALUATE, "--num-samples", "8", "--temperatures", "1,0.8",
                             "--overwrite"],
    "evaluate samples": ["CONSONAR_CACHE=new-cache", "evaluate", "some.npz", *EVALUATE, "--out", "some.json"],
    "evaluate a tokenizer": ["evaluate", "vq", "--reference", "pictures", "--feature-network", "quarters"],
    "evaluate a tokenizer into a file": ["evaluate", "vq", "--reference", "pictures", "--feature-network", "quarters",
                                         "--out", "codec.json"],
    "convert": ["convert", "released.pt", "--to", "converted"],
    "convert back": ["convert", "vq/model", "--to-official", "back.safetensors"],
    "convert back .pt": ["convert", "vq/model", "--to-official", "back.pt"],
    "report": ["report", "run", "half", "--out", "new.html"],
    "report again": ["report", "run", "half", "--out", "page.html", "--overwrite"],
    "train in shards": [*ALONE, "train", "ar.yaml", "--out", "new", "--parallel.strategy", "fsdp"],
    "tokenize shards": ["tokenize", "--tokenizer", "vq/model", "--data", "webdataset:shards/{0..1}.tar",
                        "--out", "new"],
    "import tokens": ["import-tokens", "--format", "rar-jsonl", "--data", "some.jsonl", "--tokenizer", "vq/model",
                      "--out", "new"],
    "plan": ["plan", "ar.yaml", "--json", "plan.json"],
    "sweep": ["sweep", "study.yaml", "--out", "study"],
    "diagnose": ["diagnose", "run32", "--data", "many", "--out", "diagnosis.html", "--num-images", "8",
                 "--parts", "gap,positions"],
    "keep the best": ["train", "ar.yaml", "--out", "new", "--loop.keep-best"],
    "train adapters": ["train", "ar.yaml", *LORA, "--out", "new"],
    "resume adapters": ["train", "ar.yaml", *LORA, "--out", "lora-half", "--resume"],
    "tokenize captions": ["tokenize", "--tokenizer", "codec32", "--data", "scenes:12", "--out", "new"],
    "train on captions": ["CONSONAR_CACHE=new-cache", "train", "words.yaml", "--out", "new"],
    "sample for GenEval": ["sample", "words", "--format", "geneval", "--prompts", "prompts.jsonl", "--out", "new"],
    "sample for GenEval 2": ["sample", "words", "--format", "geneval2", "--prompts", "prompts.jsonl", "--out", "new"],
    "sample for DPG": ["sample", "words", "--format", "dpg", "--prompts", "dpg", "--out", "new"],
    "score a run": ["evaluate", "words", "--prompts", "prompts.txt", "--per-prompt", "2"],
    "score samples": ["evaluate", "words.npz", "--prompts", "stored", "--out", "new.json"],
    "read scores": ["evaluate", "geneval.jsonl", "--format", "geneval", "--out", "new.json"],
    "evaluate by two": [*TWO, "evaluate", "run", *EVALUATE, "--num-samples", "8", "--temperatures", "0.9",
                        "--overwrite"],
}  # fmt: skip


def fill(root: Path) -> None:
    """Writes into `root` what no command makes: pictures, configurations, files of others."""
    save_pictures(root / "pictures")
    (save_pictures(root / "mixed") / "train" / "a" / "broken.png").write_bytes(b"no picture")
    lines = [json.dumps({"class_id": label, "tokens": [label] * 16}) for label in range(2)]
    (root / "some.jsonl").write_text("\n".join(lines))
    (root / "shards").mkdir()
    for index in range(2):
        with tarfile.open(root / "shards" / f"{index}.tar", "w") as tar:
            tar.add(root / "pictures" / "train" / "abc"[index] / f"{index:03d}.png", "a.png")
    for name, content in FILES.items():
        (root / name).write_text(yaml.safe_dump(content, sort_keys=False))


def fill_captions(root: Path) -> None:
    """The same for commands that read captions."""
    from tiny_encoder import save_encoder  # transformers takes seconds to import

    save_pictures(root / "many", validation=9)
    save_tokenizer_of_32(root / "codec32")
    save_encoder(root / "encoder")
    asked = {"tag": "single_object", "include": [], "skills": ["object"], "atom_count": 1}
    asked_lines = [json.dumps({**asked, "prompt": text, "correct": True}) for text in SCENES]
    for name, text in {"prompts.txt": SCENES, "prompts.jsonl": asked_lines, "geneval.jsonl": asked_lines}.items():
        (root / name).write_text("\n".join(text) + "\n")
    (root / "dpg").mkdir()
    (root / "dpg" / "7.txt").write_text(SCENES[0])


def make(root: Path, server: Server, commands: Sequence[Sequence[str]] = MADE) -> None:
    """Calls commands in `root`. Raises AssertionError with what one said that failed."""
    for words in commands:
        ended = server.run(words, root)
        assert ended.code == 0, (words, ended.err)
