"""Valid small files of every format that consonar reads, and the reader that a command would call on each."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from conftest import same
from PIL import Image
from tiny_janus import WORDS, byte_words
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from consonar.components import load_generator, load_tokenizer, read_origin, save_generator, save_tokenizer
from consonar.config_io import to_dict
from consonar.convert import read_source
from consonar.convert.containers import read_weights
from consonar.data.bad_images import BadImages, readable_rows
from consonar.data.labels import read_class_file
from consonar.data.loader import TokenBatches
from consonar.data.picture_files import read_image
from consonar.data.shard_index import SCHEMA, kept_index
from consonar.data.shards import open_shards
from consonar.data.sources import open_source
from consonar.data.tokenizing import write_token_store
from consonar.data.tokens import TokenStore
from consonar.data.upstream import import_llamagen_npy, import_rar_jsonl
from consonar.demo.job import claim
from consonar.errors import BadImage
from consonar.evaluation.benchmarks import read_scores
from consonar.evaluation.inputs import load_samples, open_reference
from consonar.files.weights import save_tensors
from consonar.files.writers import write_json
from consonar.generators.janus import JanusConfig
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.networks.base import WeightFile
from consonar.networks.prompts import load_prompt_tokenizer
from consonar.origin import Origin
from consonar.recipes import find_recipe, read_config
from consonar.report import write_report
from consonar.shards import own_group
from consonar.sweeps.page import markdown
from consonar.sweeps.rows import read_sweep
from consonar.sweeps.summary import summarise
from consonar.sweeps.work import Place, read_result
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.training.checkpoints import load_resume, save_resume, save_shards
from consonar.training.origins import FILE, read_run_origin
from consonar.training.run import sessions_before
from consonar.training.tracking import read_metrics
from consonar.types import ImageRecord

TINY = VQConfig(image_size=8, vocab_size=16, code_dim=2, base_channels=4, channel_multipliers=(1, 2),
                latent_channels=4, num_groups=2)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A file that is damaged on purpose."""

    file: str
    """Its path below the folder that `make` fills."""
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    """Gets the folder; whatever a command would do with the file."""


def pixels(size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def picture(format: str, **settings: Any) -> Format:
    file = f"a.{format.lower()}"

    def make(folder: Path) -> None:
        Image.fromarray(pixels()).save(folder / file, format, **settings)

    return Format(file, make, lambda folder: read_image(folder / file, file))


class Pictures:
    name, class_names = "pictures", ("a", "b")

    def __iter__(self):
        for i in range(6):
            yield ImageRecord(Image.fromarray(pixels() // (i + 1)), f"picture {i}", i % 2, "text" if i else None)


@lru_cache
def tokenizer() -> VQTokenizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQTokenizer(TINY, name="tiny")


def make_tokenizer(folder: Path) -> None:
    save_tokenizer(tokenizer(), folder / "t")


def make_words(folder: Path) -> None:
    byte_words(*WORDS).save(str(folder / "tokenizer.json"))


def read_words(folder: Path) -> None:
    shape = JanusConfig(text_vocab_size=300, pad_token=257, max_prompt_tokens=40)
    load_prompt_tokenizer(str(folder), shape).encode(["a dog", "é"])


def make_generator(folder: Path) -> None:
    model = ReARGenerator(ReARConfig(width=8, num_layers=1, num_heads=1, vocab_size=16, num_tokens=16, num_classes=2))
    save_generator(model, folder / "g", Origin(tokenizer="openmoji-64", class_names=("a", "b")))


def read_generator(folder: Path) -> None:
    load_generator(folder / "g")
    read_origin(folder / "g")


def make_store(folder: Path) -> None:
    write_token_store(folder / "s", Pictures(), tokenizer())


def read_store(folder: Path) -> None:
    store = TokenStore.open(folder / "s")
    batches = TokenBatches(store, batch_size=2, seed=0)
    list(batches.ordered(2))
    store.table.column("caption").to_pylist()
    store.check_content()


def encoded(index: int) -> bytes:
    Image.fromarray(pixels() // (index + 1)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def make_tar(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for index in range(2):
            for name, data in ((f"{index}.png", encoded(index)), (f"{index}.json", b'{"label": 1, "caption": "x"}')):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def make_table(folder: Path, ending: str) -> None:
    table = pa.table({"image": [{"bytes": encoded(i), "path": "x"} for i in range(3)], "label": [0, 1, 2]})
    if ending == "parquet":
        pq.write_table(table, folder / "a.parquet")
    else:
        with pa.ipc.new_stream(str(folder / "a.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


def shards(kind: str, ending: str, make: Callable[[Path], None]) -> Format:
    return Format(f"a.{ending}", make, lambda folder: list(open_shards(kind, str(folder / f"a.{ending}"), "train")))


def make_index(folder: Path) -> None:
    table = pa.table([[0, 1, 1], [0, 0, 512], [512, 512, 1024], [1, None, 2], ["x", None, "yy"]], schema=SCHEMA)
    with pa.ipc.new_file(str(folder / "i.arrow"), SCHEMA) as writer:
        writer.write_table(table)


def make_samples(folder: Path) -> None:
    np.savez(folder / "a.npz", arr_0=pixels()[None].repeat(2, 0), labels=np.zeros(2, np.int64),
             tokens=np.zeros((2, 4), np.int64), seeds=np.arange(2), settings=np.array("{}"))  # fmt: skip


def read_samples(folder: Path) -> None:
    list(load_samples(folder / "a.npz").images.stream(1))


def make_reference(folder: Path) -> None:
    np.savez_compressed(folder / "a.npz", images=pixels()[None].repeat(2, 0), mu=np.zeros(3), sigma=np.eye(3))


def read_reference(folder: Path) -> None:
    for images in open_reference(folder / "a.npz", 8).images.values():
        list(images.stream(1))


def make_torch(folder: Path) -> None:
    torch.save({"model": {"w": torch.arange(6.0), "b": torch.zeros(2)}, "step": 3}, folder / "a.pt")


def make_old_torch(folder: Path) -> None:
    torch.save({"w": torch.arange(6.0)}, folder / "a.pt", _use_new_zipfile_serialization=False)


def make_weights(folder: Path) -> None:
    torch.save({"w": torch.arange(6.0)}, folder / "a.pth")


def read_weight_file(folder: Path) -> None:
    WeightFile("net", "a.pth", "https://example.org", "00").read(folder / "a.pth", check_hash=False)


def make_shards(folder: Path) -> None:
    save_tensors(folder / "one.safetensors", {"w": torch.zeros(2)})
    save_tensors(folder / "two.safetensors", {"b": torch.zeros(2)})
    text = json.dumps({"metadata": {}, "weight_map": {"w": "one.safetensors", "b": "two.safetensors"}})
    (folder / "m.safetensors.index.json").write_text(text)


def make_codes(folder: Path) -> None:
    for name, array in (("codes", np.zeros((1, 2, 16), np.int64)), ("labels", np.zeros(1, np.int64))):
        (folder / name).mkdir()
        np.save(folder / name / "0.npy", array)


def imported(read: Callable[..., Any], *names: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        read(*(folder / name for name in names), folder / "out", tokenizer())

    return run


def make_jsonl(folder: Path) -> None:
    lines = [json.dumps({"class_id": i, "tokens": [i] * 16}) for i in range(2)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")


def make_yaml(folder: Path) -> None:
    (folder / "a.yaml").write_text(
        "base: rear-openmoji\nmodel: {kind: rear, width: 64}\noptim:\n  lr: 1e-4\nloop:\n  steps: 10\n"
        "  trackers: []\ndata: {tokens: tokens/mine}\nseed: 3\n"
    )


def make_json(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(to_dict(find_recipe("vapi-openmoji")), indent=0))


def make_run(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    settings = {"recipe": "x", "init": None, "objective": {"kind": "consistency", "embedding_weight": 1.0},
                "data": {"tokens": "t"}, "loop": {"steps": 20, "batch_size": 4}}  # fmt: skip
    (run / "config.json").write_text(json.dumps(settings))
    lines = [{"step": s, "time": 6.0 * s, "train/cross_entropy": 7.0, "train/noise_rate": 0.5} for s in (1, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"temperature": 1.0, "num_samples": 6, "top_k": 0, "seed": 0, "samples": "s.npz",
           "metrics": {"FD(n) validation": {"value": 1.5, "spread": 0.5}}}  # fmt: skip
    labels, seeds = np.repeat(np.arange(3), 2), np.tile(np.arange(2), 3)
    np.savez(run / "s.npz", images=np.zeros((6, 8, 8, 3), np.uint8), labels=labels, seeds=seeds)
    content = {"schema": 1, "rows": [row], "best": 0, "remarks": ["few samples"],
               "noise_floor": {"FD(n) validation vs train": {"value": 1.0}}}  # fmt: skip
    (run / "results.json").write_text(json.dumps(content))
    (run / "reconstruction.json").write_text(json.dumps({"psnr": 20.5, "ssim": 0.5}))
    (run / "stopped.json").write_text(json.dumps({"step": 3, "reason": "guard"}))
    (run / "best.json").write_text(json.dumps({"step": 3, "metric": "FD", "value": 1.5}))
    np.savez(run / "reconstructions.npz", originals=pixels()[None], reconstructions=pixels()[None], names=["a"])


def read_run(folder: Path) -> None:
    write_report([folder / "run"], folder / "page.html", overwrite=True)


def read_lines(folder: Path) -> None:
    read_metrics(folder / "run/metrics.jsonl")


def make_listing(folder: Path) -> None:
    bad = BadImages("skip", 1.0, folder / "bad.txt")
    bad.totals["train"] = 12
    bad.met("train", 3, BadImage("a.png: not an image"), 12)
    bad.write()


def read_listing(folder: Path) -> None:
    readable_rows(lambda row: row, 12, BadImages("skip", 1.0, folder / "bad.txt", resume=True), "train")


def make_run_origin(folder: Path) -> None:
    origin = Origin(tokenizer="t", class_names=("a", "b"), data="d", data_sha256="0" * 64)
    write_json(folder / FILE, to_dict(origin))


def make_sessions(folder: Path) -> None:
    write_json(folder / "sessions.json", {"sessions": [{"step": 0, "precision": "bf16"}, {"step": 9}]})


def make_class_file(folder: Path) -> None:
    (folder / "classes.txt").write_text("cat\ndog\n")


def make_dataset(folder: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    stream = io.BytesIO()
    Image.fromarray(pixels()).save(stream, "PNG")
    types = Features(image=ImageFeature(), label=ClassLabel(names=["a", "b"]), text=Value("string"))
    rows = {"image": [{"bytes": stream.getvalue(), "path": None}] * 2, "label": [0, 1], "text": ["x", None]}
    Dataset.from_dict(rows, features=types).save_to_disk(str(folder / "d"))


def read_dataset(folder: Path) -> None:
    list(open_source(f"arrow:{folder / 'd'}", image_size=8))


def make_demo(folder: Path) -> None:
    claim(folder / "demo", {"minutes": 1.0, "seed": 0})


def read_demo(folder: Path) -> None:
    claim(folder / "demo", {"minutes": 1.0, "seed": 0})


def make_source(folder: Path) -> None:
    (folder / "source.json").write_text(json.dumps({"recognised_as": "rar", "entry": ["model"]}))


SHARDED = {"model": {"w": torch.arange(6.0), "b": torch.ones(2)}, "stopped": None}


def make_sharded(folder: Path) -> None:
    """A checkpoint in shards, by a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    weights = SHARDED["model"] | {"w": distribute_tensor(SHARDED["model"]["w"], mesh, [Shard(0)])}
    path = folder / "step_00000001"
    save_shards(path, 1, SHARDED | {"model": weights}, keep=1, group=own_group(), is_main=True)
    dist.destroy_process_group()


def read_sharded(folder: Path) -> None:
    """What is read is what was written: nothing passes for another number."""
    found = load_resume(folder / "step_00000001")
    assert same(found, {"format_version": 1, "step": 1} | SHARDED)


RESUMED = {"trainee": {"w": torch.zeros(3)}, "rng": torch.arange(8, dtype=torch.uint8)}


def make_resume(folder: Path) -> None:
    save_resume(folder, 1, RESUMED, keep=1)


def read_resume(folder: Path) -> None:
    found = load_resume(folder / "step_00000001.pt")
    assert same(found, {"format_version": 1, "step": 1} | RESUMED)


def make_sweep(folder: Path) -> None:
    (folder / "study.yaml").write_text(
        "base: ar-openmoji\nseeds: 1\noptions: {loop.steps: 3}\nrows:\n  a: {}\n  b: {base: ce-openmoji, "
        "init: {cell: a}}\ngrid: {optim.lr: [0.1, 0.2]}\nevaluate: {reference: openmoji-64, temperatures: [1, 0.5]}\n"
    )


def read_study(folder: Path) -> None:
    read_sweep(folder / "study.yaml", folder / "out")


def make_result(folder: Path) -> None:
    make_sweep(folder)
    cell = read_sweep(folder / "study.yaml", folder / "run").cells["a-0"]
    line = {"num_samples": 6, "seed": 0, "metrics": {"FD(x) validation": {"value": 2.0, "spread": None}}}
    lines = [{"temperature": temperature, **line} for temperature in (1.0, 0.5)]
    numbers = {"rows": lines, "machine": "m", "reference": {"name": "r"}, "remarks": ["few"]}
    content = {"row": "a", "seed": 0, "asked": cell.asked(), "matched": [], "config_sha256": "0", "failure": None,
               "versions": {"torch": "2"}, "weights": "w", "start_weights": None, "stopped": {"step": 1, "reason": "r"},
               "validation": {"validation/cross_entropy": 5.0}, "results": numbers}  # fmt: skip
    write_json(folder / "run" / "results" / "a-0.json", content)


def read_sweep_result(folder: Path) -> None:
    make_sweep(folder)
    sweep = read_sweep(folder / "study.yaml", folder / "run")
    cell = sweep.cells["a-0"]
    content = read_result(Place(folder / "run", sweep, print), cell)
    markdown(summarise(replace(sweep, cells={"a-0": cell}, rows=("a",)), {"a-0": content} if content else {}))


def make_benchmarks(folder: Path) -> None:
    """What the scorers of three benchmarks read and write."""
    asked = {"prompt": "two dogs", "atom_count": 2, "skills": ["count", "object"], "tag": "counting", "include": []}
    (folder / "p.jsonl").write_text(json.dumps(asked) + "\n")
    (folder / "scores.json").write_text("[[0.25, 1.0]]")
    row = {"tag": "counting", "prompt": "two dogs", "correct": True}
    (folder / "results.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "correct": False}) + "\n")
    columns = "item_id,text,proposition_id,dependency,tuple,question_natural_language"
    (folder / "dpg.csv").write_text(
        f'{columns}\na,"one, two",1,0,entity - whole (dog),Is it?\na,"one, two",2,1,x (y),So?\n'
    )
    (folder / "detail.txt").write_text("o/a.png, (0, 0, 8, 8), Is it?, yes\no/a.png, (0, 0, 8, 8), So?, no\n")


def benchmark(form: str, name: str, prompts: str) -> Callable[[Path], object]:
    return lambda folder: read_scores(form, folder / name, folder / prompts)


FORMATS = {
    "webdataset": shards("webdataset", "tar", make_tar),
    "parquet shard": shards("parquet", "parquet", partial(make_table, ending="parquet")),
    "arrow shard": shards("arrow", "arrow", partial(make_table, ending="arrow")),
    "shard index": Format("i.arrow", make_index, lambda folder: kept_index(folder / "i.arrow", 2).to_pylist()),
    "png": picture("PNG"),
    "palette png": Format(
        "a.png",
        lambda folder: Image.fromarray(pixels()).convert("P").save(folder / "a.png", transparency=3, dpi=(72, 72)),
        lambda folder: read_image(folder / "a.png", "a.png"),
    ),
    "jpg": picture("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    "webp": picture("WEBP"),
    "gif": picture("GIF"),
    "bmp": picture("BMP"),
    "tiff": picture("TIFF", compression="tiff_lzw"),
    "ppm": picture("PPM"),
    "jpeg2000": picture("JPEG2000"),
    "avif": picture("AVIF"),
    "samples npz": Format("a.npz", make_samples, read_samples),
    "reference npz": Format("a.npz", make_reference, read_reference),
    "llamagen npy": Format("codes/0.npy", make_codes, imported(import_llamagen_npy, "codes", "labels")),
    "rar jsonl": Format("a.jsonl", make_jsonl, imported(import_rar_jsonl, "a.jsonl")),
    "tokenizer weights": Format("t/model.safetensors", make_tokenizer, lambda folder: load_tokenizer(folder / "t")),
    "tokenizer config": Format("t/config.json", make_tokenizer, lambda folder: load_tokenizer(folder / "t")),
    "words of Janus": Format("tokenizer.json", make_words, read_words),
    "generator config": Format("g/config.json", make_generator, read_generator),
    "safetensors": Format("one.safetensors", make_shards, lambda folder: read_weights(folder / "one.safetensors")),
    "index json": Format(
        "m.safetensors.index.json", make_shards, lambda folder: read_weights(folder / "m.safetensors.index.json")
    ),
    "pt": Format("a.pt", make_torch, lambda folder: read_weights(folder / "a.pt")),
    "old pt": Format("a.pt", make_old_torch, lambda folder: read_weights(folder / "a.pt")),
    "pth": Format("a.pth", make_weights, read_weight_file),
    "resume file": Format("step_00000001.pt", make_resume, read_resume),
    "resume folder's state": Format("step_00000001/state.pt", make_sharded, read_sharded),
    "resume folder's description": Format("step_00000001/.metadata", make_sharded, read_sharded),
    "resume folder's shard": Format("step_00000001/__0_0.distcp", make_sharded, read_sharded),
    "yaml config": Format("a.yaml", make_yaml, lambda folder: read_config(folder / "a.yaml")),
    "json config": Format("a.json", make_json, lambda folder: read_config(folder / "a.json")),
    "store json": Format("s/store.json", make_store, read_store),
    "store arrow": Format("s/tokens.arrow", make_store, read_store),
    "data set state": Format("d/state.json", make_dataset, read_dataset),
    "data set info": Format("d/dataset_info.json", make_dataset, read_dataset),
    "data set arrow": Format("d/data-00000-of-00001.arrow", make_dataset, read_dataset),
    "run config": Format("run/config.json", make_run, read_run),
    "metrics": Format("run/metrics.jsonl", make_run, read_run),
    "metrics of a resumed run": Format("run/metrics.jsonl", make_run, read_lines),
    "results": Format("run/results.json", make_run, read_run),
    "sample sheet": Format("run/s.npz", make_run, read_run),
    "reconstructions": Format("run/reconstructions.npz", make_run, read_run),
    "reconstruction": Format("run/reconstruction.json", make_run, read_run),
    "stopped": Format("run/stopped.json", make_run, read_run),
    "best": Format("run/best.json", make_run, read_run),
    "demo": Format("demo/demo.json", make_demo, read_demo),
    "bad images": Format("bad.txt", make_listing, read_listing),
    "run origin": Format("origin.json", make_run_origin, read_run_origin),
    "sessions": Format("sessions.json", make_sessions, lambda folder: sessions_before(5, folder / "sessions.json")),
    "class file": Format("classes.txt", make_class_file, lambda folder: read_class_file(folder / "classes.txt")),
    "sweep": Format("study.yaml", make_sweep, read_study),
    "result of a sweep": Format("run/results/a-0.json", make_result, read_sweep_result),
    "results of GenEval": Format("results.jsonl", make_benchmarks, benchmark("geneval", "results.jsonl", "p.jsonl")),
    "scores of GenEval 2": Format("scores.json", make_benchmarks, benchmark("geneval2", "scores.json", "p.jsonl")),
    "prompts of GenEval 2": Format("p.jsonl", make_benchmarks, benchmark("geneval2", "scores.json", "p.jsonl")),
    "answers of DPG-Bench": Format("detail.txt", make_benchmarks, benchmark("dpg", "detail.txt", "dpg.csv")),
    "questions of DPG-Bench": Format("dpg.csv", make_benchmarks, benchmark("dpg", "detail.txt", "dpg.csv")),
    "source": Format("source.json", make_source, lambda folder: read_source(folder / "source.json")),
}
