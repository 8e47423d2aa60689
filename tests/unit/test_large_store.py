"""A store of a thousand million tokens, in a file with holes: opening it and drawing batches needs little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MAKE = """
import io, json, os, sys
import numpy as np
import pyarrow as pa
from consonar.data.store_format import TOKENS_FILE, METADATA_FILE
folder, rows, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

class WithHoles(io.RawIOBase):
    def __init__(self, path):
        self.file = open(path, "wb")
    def writable(self):
        return True
    def write(self, data):
        data = memoryview(data).cast("B")
        if len(data) > 100_000 and not np.frombuffer(data, np.uint8).any():
            self.file.seek(len(data), 1)
        else:
            self.file.write(data)
        return len(data)
    def tell(self):
        return self.file.tell()

os.mkdir(folder)
sink = WithHoles(f"{folder}/{TOKENS_FILE}")
schema = pa.schema([("tokens", pa.list_(pa.uint16(), tokens)), ("label", pa.int64()), ("caption", pa.string()),
                    ("name", pa.string())])
zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(1024 * tokens, np.uint16)), tokens)
with pa.ipc.new_stream(pa.PythonFile(sink, "w"), schema) as writer:
    for start in range(0, rows, 1024):
        numbers = np.arange(start, start + 1024)
        columns = [zeros, pa.array(numbers % 1000), pa.nulls(1024, pa.string()), pa.array(numbers.astype(str))]
        writer.write_batch(pa.record_batch(columns, schema=schema))
sink.file.close()
about = {"format_version": 1, "tokenizer": "t", "fingerprint": "f", "source": "s", "vocab_size": 16384,
         "num_tokens": tokens, "num_views": 1, "counts": {"items": rows, "labelled": rows, "captioned": 0},
         "num_classes": 1000, "class_names": None}
open(f"{folder}/{METADATA_FILE}", "w").write(json.dumps(about))
"""
READ = """
import re, sys, json
import torch
from consonar.data.loader import TokenBatches
from consonar.data.tokens import TokenStore

def own():
    "MB of memory that is not the file's: what the system can take back at any time does not count."
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000

before = own()
store = TokenStore.open(sys.argv[1])
opened = own()
batches = TokenBatches(store, batch_size=64, seed=0)
for step in range(20):
    batch = batches.batch(step)
    assert torch.equal(batch.condition, batch.indices % 1000) and not batch.tokens.any()
drawn = own()
for step in range(20, 200):
    batches.batch(step * 997)  # all over the epoch, and in later ones
print(json.dumps({"opened": opened - before, "drawn": drawn - before, "end": own() - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("rows", [976_896])
def test_a_thousand_million_tokens_take_some_megabytes(rows, tmp_path):
    folder = tmp_path / "large"
    subprocess.run([sys.executable, "-c", MAKE, str(folder), str(rows), "1024"], check=True)
    file = (folder / "tokens.arrow").stat()
    assert file.st_size > 2e9 and file.st_blocks * 512 < 3e8, "a file with holes"
    found = json.loads(
        subprocess.run([sys.executable, "-c", READ, str(folder)], check=True, capture_output=True).stdout
    )
    # Labels and the order of two epochs are 8 bytes an image each: 24 MB; the rest is the first use of PyTorch.
    assert found["opened"] < 24 and found["drawn"] < 100 and found["end"] < 100, found
