"""Weight files of every kind, what lies beside the weights, and what is no weight file at all."""

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from released_models import load, released, same

from consonar.components import load_generator
from consonar.convert import convert, to_official
from consonar.errors import UserError
from consonar.files.weights import save_tensors

ENTRIES = {
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "steps": 7,
                        "args": argparse.Namespace(lr=1e-4)},
    "module": lambda s: {"module": s, "global_steps": 3},
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "state_dict/model": lambda s: {"state_dict": {"model": s}},
    "": lambda s: {**s, "step": 5},
    "prefix": lambda s: {"model": {f"_orig_mod.module.{key}": value for key, value in s.items()}},
    "compiled blocks": lambda s: {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in s.items()},
    "views of one storage": lambda s: as_views(s),
    "tensors with attributes": lambda s: with_attributes(s),
    "parameters": lambda s: {key: torch.nn.Parameter(value) for key, value in s.items()},
}  # fmt: skip


def with_attributes(state):
    """As consolidated FSDP files have them."""
    for value in state.values():
        value._of_a_shard = True
    return state


def as_views(state):
    flat = torch.cat([value.flatten() for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    return {key: part.view(value.shape) for (key, value), part in zip(state.items(), parts, strict=True)}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("archive", [True, False])
def test_containers(entry, archive, tmp_path):
    """Where the weights are in a training checkpoint, in the new and in the old format of PyTorch."""
    state = released("rar")
    torch.save(ENTRIES[entry](state), tmp_path / "c.pt", _use_new_zipfile_serialization=archive)
    (made,) = convert(tmp_path / "c.pt", tmp_path / "ours")
    assert same(dict(load_generator(tmp_path / "ours").state_dict()), state)
    if entry == "model":
        assert any("optimizer, steps, args" in note for note in made.notes)
        to_official(tmp_path / "ours", tmp_path / "back.pt")
        back = load(tmp_path / "back.pt")
        assert list(back) == ["model"] and same(back["model"], state)


def test_another_entry_can_be_taken(tmp_path):
    state = released("rar")
    average = {key: value + 1 for key, value in state.items()}
    torch.save({"model": state, "ema": average, "optimizer": {}}, tmp_path / "c.pt")
    convert(tmp_path / "c.pt", tmp_path / "ours", entry="ema")
    assert same(dict(load_generator(tmp_path / "ours").state_dict()), average)
    with pytest.raises(UserError, match=r"--entry: unknown 'emma' \(did you mean 'ema'\?\); choices: model, ema"):
        convert(tmp_path / "c.pt", tmp_path / "other", entry="emma")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards(ending, tmp_path):
    state = released("rar")
    names = {key: f"part-{i % 2}.{ending}" for i, key in enumerate(state)}
    for name in sorted(set(names.values())):
        part = {key: value for key, value in state.items() if names[key] == name}
        save_tensors(tmp_path / name, part) if ending == "safetensors" else torch.save(part, tmp_path / name)
    whole = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}[ending]
    (tmp_path / whole).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    convert(tmp_path, tmp_path / "ours")  # a folder as it is downloaded
    assert same(dict(load_generator(tmp_path / "ours").state_dict()), state)
    assert set(json.loads((tmp_path / "ours" / "source.json").read_text())["files"]) == {whole, *names.values()}
    (tmp_path / f"part-1.{ending}").unlink()
    with pytest.raises(UserError, match=rf"1 of 2 shards are not beside it: part-1\.{ending}"):
        convert(tmp_path / whole, tmp_path / "other")
    (tmp_path / whole).write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(UserError, match=r"names '\.\./elsewhere\.bin', which is not a file beside it"):
        convert(tmp_path / whole, tmp_path / "other")


class Evil:
    """Pickles as a command that makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def not_weights(folder: Path) -> dict[str, tuple[str, bytes, str]]:
    """Name to file name, content, and what the message says."""
    torch.save(released("rar"), folder / "good.bin")
    torch.save({"model": {"a": torch.ones(1)}, "extra": Evil(folder / "executed")}, folder / "evil.bin")
    torch.save(Evil(folder / "executed"), folder / "old.bin", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({"a": torch.ones(99)}, folder / "good.safetensors")
    archive, tensors = (folder / "good.bin").read_bytes(), (folder / "good.safetensors").read_bytes()
    web = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 3\n"
    return {
        "half an archive": ("a.pt", archive[: len(archive) // 2], "damaged, cut short, or not saved by torch.save"),
        "archive without its end": ("a.pt", archive[:-30], "damaged, cut short"),
        "half a safetensors": ("a.safetensors", tensors[:-40], "damaged or cut short"),
        "start of a safetensors": ("a.safetensors", tensors[:20], "a .safetensors file cut short"),
        "archive called safetensors": ("a.safetensors", archive, "holds a PyTorch archive, not .safetensors"),
        "safetensors called pt": ("a.pt", tensors, "holds .safetensors, not what PyTorch saves"),
        "web page": ("a.pt", web, "it is a web page"),
        "web page, safetensors": ("a.safetensors", web, "it is a web page"),
        "git-lfs pointer": ("a.bin", pointer, "a pointer of git-lfs"),
        "git-lfs pointer, safetensors": ("a.safetensors", pointer, "a pointer of git-lfs"),
        "text": ("a.bin", b'{"error": "not found"}\n', "it is text"),
        "empty": ("a.bin", b"", "it is empty"),
        "zeros": ("a.bin", bytes(4096), "zeros: a download that was not finished"),
        "noise": ("a.bin", bytes(range(200, 256)) * 9, "neither .safetensors nor anything that PyTorch saves"),
        "evil archive": ("a.pt", (folder / "evil.bin").read_bytes(), "holds Python objects (posix.system)"),
        "evil old file": ("a.pt", (folder / "old.bin").read_bytes(), "holds Python objects (posix.system)"),
        "evil pickle": ("a.pt", pickle.dumps(Evil(folder / "executed")), "nothing was read|damaged"),
        "damaged pickle": ("a.pt", b"\x80\x02" + b"\xff" * 50, "damaged"),
        "zip of something else": ("a.pt", b"PK\x03\x04" + bytes(60), "damaged"),
    }


NOT_WEIGHTS = (
    "half an archive", "archive without its end", "half a safetensors", "start of a safetensors",
    "archive called safetensors", "safetensors called pt", "web page", "web page, safetensors", "git-lfs pointer",
    "git-lfs pointer, safetensors", "text", "empty", "zeros", "noise", "evil archive", "evil old file", "evil pickle",
    "damaged pickle", "zip of something else",
)  # fmt: skip


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_is_no_weight_file_is_told_in_one_line_and_never_executed(name, tmp_path):
    files = not_weights(tmp_path)
    assert set(files) == set(NOT_WEIGHTS)
    file, content, expected = files[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / file, tmp_path / "ours")
    message = str(caught.value)
    assert "\n" not in message and file in message
    assert any(part in message for part in expected.split("|")), message
    assert not (tmp_path / "executed").exists() and not (tmp_path / "ours").exists()
    # The files are what they are said to be: executing them does make the file.
    if name.startswith("evil"):
        torch.load(tmp_path / file, weights_only=False) if name != "evil pickle" else pickle.loads(content)
        assert (tmp_path / "executed").exists()


def holding_itself(state):
    held = dict(state)
    held["model"] = held
    return held


NOT_PLAIN = {
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "without memory": lambda: torch.empty(3, device="meta"),
    "shape (1000000, 10000000)": lambda: torch.zeros(1).expand(10**6, 10**7),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_tensor_whose_numbers_are_not_all_in_the_file_is_refused_by_name(kind, tmp_path):
    torch.save({"w": torch.zeros(2), "odd": NOT_PLAIN[kind]()}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"c\.pt: odd is not a plain tensor") as told:
        convert(tmp_path / "c.pt", tmp_path / "ours")
    assert kind in str(told.value)


def test_a_flipped_bit_of_a_weight_is_seen(tmp_path):
    """PyTorch does not look at the checksums of its archive."""
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "c.pt")
    content = bytearray((tmp_path / "c.pt").read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
    (tmp_path / "c.pt").write_bytes(content)
    assert torch.load(tmp_path / "c.pt")["w"].shape == (1000,)
    with pytest.raises(UserError, match=r"c\.pt: damaged"):
        convert(tmp_path / "c.pt", tmp_path / "ours")


@pytest.mark.parametrize("state", [{}, {"w": torch.zeros(2)}])
def test_a_checkpoint_that_holds_itself_is_refused(state, tmp_path):
    torch.save(holding_itself(state), tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"c\.pt: (over 8 entries in each other|no tensors by name)"):
        convert(tmp_path / "c.pt", tmp_path / "ours")
