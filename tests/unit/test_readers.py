"""Files from outside that are not what they should be: one line with the name of the file; nothing is executed."""

import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from consonar.convert.containers import read_weights
from consonar.data.upstream import import_llamagen_npy, import_rar_jsonl
from consonar.errors import UserError, reading
from consonar.evaluation.inputs import load_samples, open_reference
from consonar.files.readers import read_json, read_npy, read_npz
from consonar.files.weights import save_tensors
from consonar.files.writers import cache_dir
from consonar.hub import read_name
from consonar.report import load_runs
from consonar.training.tracking import read_metrics, read_metrics_line

IMAGES = np.zeros((3, 8, 8, 3), np.uint8)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def member(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def archive(path, **members: bytes):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def refused(read, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments)
    message = str(caught.value)
    assert "\n" not in message and message.encode()
    return message


def stream(path) -> None:
    for _ in open_reference(path, 8).images["reference"].stream(2):
        pass


def test_members_of_an_npz_that_are_no_arrays_are_named(tmp_path):
    for key in ("labels", "tokens", "seeds", "settings"):
        path = archive(tmp_path / "a.npz", arr_0=member(IMAGES), **{key: b"no array at all"})
        assert "a.npz: " + key in refused(load_samples, path)
    for read in (load_samples, stream):
        assert "a.npz: arr_0: not an array" in refused(read, archive(tmp_path / "a.npz", arr_0=b"no array"))
    for key in ("mu", "sigma"):
        arrays = {"mu": member(np.zeros(4)), "sigma": member(np.eye(4))} | {key: b"no array at all"}
        assert f"a.npz: {key}: not an array" in refused(open_reference, archive(tmp_path / "a.npz", **arrays), 8)


def test_a_pickle_in_an_array_file_is_never_executed(tmp_path):
    evil = member(np.array([Evil(tmp_path / "made")], dtype=object))
    (tmp_path / "0.npy").write_bytes(evil)
    assert "Python objects" in refused(read_npy, tmp_path / "0.npy")
    for key in ("settings", "labels"):
        assert "Python objects" in refused(
            load_samples, archive(tmp_path / "a.npz", arr_0=member(IMAGES), **{key: evil})
        )
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    assert "raw.npy: not a .npy file" in refused(read_npy, tmp_path / "raw.npy")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("settings", ["{", "[1, 2]", "null", '"text"', "\x00", '{"x": NaN}', '{"x": 1e999}'])
def test_settings_of_samples_that_are_no_json_object_are_named(tmp_path, settings):
    path = archive(tmp_path / "a.npz", arr_0=member(IMAGES), settings=member(np.array(settings)))
    assert "a.npz: settings" in refused(load_samples, path)


@pytest.mark.parametrize(
    "mu, sigma",
    [
        (np.eye(4), np.zeros(4)),
        (np.zeros(4), np.eye(5)),
        (np.zeros(4, np.int64), np.eye(4)),
        (np.zeros(4), np.full((4, 4), np.nan)),
        (np.zeros(0), np.zeros((0, 0))),
        (np.array(["a"]), np.eye(1)),
        (np.zeros(4, complex), np.eye(4)),
    ],
)
def test_statistics_of_other_shapes_or_types_are_named(tmp_path, mu, sigma):
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma)
    assert refused(open_reference, tmp_path / "a.npz", 8).startswith(str(tmp_path / "a.npz"))


def test_an_array_that_claims_more_than_is_there_takes_no_memory(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": (2**40, 2**20), "fortran_order": False, "descr": "<f8"})
    archive(tmp_path / "a.npz", mu=header.getvalue() + bytes(64), sigma=member(np.eye(4)))
    assert "a.npz: mu: not an array" in refused(open_reference, tmp_path / "a.npz", 8)
    (tmp_path / "0.npy").write_bytes(header.getvalue() + bytes(64))
    assert "0.npy: not a .npy file" in refused(read_npy, tmp_path / "0.npy")


def test_an_npz_that_is_called_npy_is_refused(tmp_path, tokenizer):
    for name in ("codes", "labels"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "0.npy").open("wb") as file:
            np.savez(file, a=np.zeros(3))
    message = refused(import_llamagen_npy, tmp_path / "codes", tmp_path / "labels", tmp_path / "out", tokenizer)
    assert "0.npy: not a .npy file" in message


def test_arrays_are_read_as_they_were_written(tmp_path):
    arrays = {
        "c": np.arange(24.0).reshape(2, 3, 4), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array(["a", "longer"]), "scalar": np.array(7), "empty": np.zeros((0, 3)), "yes": np.array([True]),
    }  # fmt: skip
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    read = read_npz(tmp_path / "a.npz")
    assert set(read) == set(arrays)
    for key, array in arrays.items():
        assert read[key].dtype == array.dtype and np.array_equal(read[key], array)
        np.save(tmp_path / "a.npy", array)
        assert np.array_equal(read_npy(tmp_path / "a.npy"), array)


@pytest.mark.parametrize("second", ["blocks.0._orig_mod.w", "module.blocks.0.w", "blocks.0.module.w"])
def test_one_weight_with_two_values_is_refused_and_both_keys_are_named(tmp_path, second):
    save_tensors(tmp_path / "a.safetensors", {"blocks.0.w": torch.zeros(3), second: torch.ones(3)})
    message = refused(read_weights, tmp_path / "a.safetensors")
    assert "'blocks.0.w'" in message and f"'{second}'" in message
    save_tensors(tmp_path / "a.safetensors", {"blocks.0.w": torch.ones(3), second: torch.ones(3)})
    assert set(read_weights(tmp_path / "a.safetensors").tensors) == {"blocks.0.w"}


@pytest.mark.parametrize(
    "name",
    [
        "o/r//etc/hostname",
        "o/r/../../x",
        "../r/x",
        "o/../x",
        "./r/x",
        "o/r/a\\b",
        "o/r/c:x",
        "o/r/a\0b",
        "/o/r/x",
        "o/r/x/",
    ],
)
def test_an_hf_name_never_leads_out_of_the_cache_folder(name):
    assert "unknown" in refused(read_name, f"hf:{name}")


def test_an_hf_name_with_folders_is_a_place_in_the_cache_folder():
    assert read_name("hf:o/r/deep/x.safetensors").place == cache_dir() / "released/o/r/deep/x.safetensors"


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/hostname", "..", "", 3, None, "deep/a.safetensors"])
def test_an_index_of_shards_names_files_beside_it_only(tmp_path, shard):
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    assert f"x.index.json: names {shard!r}" in refused(read_weights, tmp_path / "x.index.json")


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff"])
def test_an_index_that_is_none_is_named(tmp_path, content):
    (tmp_path / "x.index.json").write_bytes(content.encode("latin-1"))
    assert "x.index.json: " in refused(read_weights, tmp_path / "x.index.json")


def test_weights_have_the_mode_of_any_new_file(tmp_path):
    tmp_path.chmod(0o700)
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


LINES = b'{"step": 1, "train/x": 1.5}\n{"step": 2, "train/x": null}\n'


@pytest.mark.parametrize(
    "damage",
    [
        b"{\n",
        b"[]\n",
        b'{"step": "1"}\n',
        b'{"step": 1, "x": "text"}\n',
        b'{"step": 1, "x": NaN}\n',
        b"\xff\n",
        b"{}\n",
    ],
)
def test_a_damaged_line_of_metrics_is_named_wherever_they_are_read(tmp_path, damage):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_bytes(LINES + damage + LINES)
    for read in (lambda: load_runs([tmp_path]), lambda: read_metrics(tmp_path / "metrics.jsonl")):
        assert "metrics.jsonl" in refused(read)


def test_a_resumed_run_leaves_out_the_line_that_was_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(LINES + b'{"step": 3, "tr')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_the_boundary_passes_on_what_is_no_fault_of_the_file():
    with pytest.raises(KeyboardInterrupt), reading("x", "a file"):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"^as it was$"), reading("x", "a file"):
        raise UserError("as it was")


def test_a_key_that_json_has_twice_is_refused_wherever_it_is_read(tmp_path, tokenizer):
    twice = '{"step": 1, "step": 2}'
    (tmp_path / "a.json").write_text(twice)
    with pytest.raises(UserError, match=r"a\.json: .*'step' is given twice"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"line 3: .*'step' is given twice"):
        read_metrics_line(twice, "line 3")
    tokens = [0] * tokenizer.num_tokens
    (tmp_path / "a.jsonl").write_text(f'{{"class_id": 0, "class_id": 1, "tokens": {tokens}}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*'class_id' is given twice"):
        import_rar_jsonl(tmp_path / "a.jsonl", tmp_path / "store", tokenizer)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_token_file_whose_name_is_not_utf8_is_imported(tmp_path, tokenizer):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    path.write_text(json.dumps({"class_id": 0, "tokens": [0] * tokenizer.num_tokens}) + "\n")
    assert len(import_rar_jsonl(path, tmp_path / "store", tokenizer)) == 1
