"""Component folders and resume files: round trip, damage, full disk."""

import errno
import io
import json
import os
import signal
import tempfile

import pytest
import safetensors.torch
import torch
from forked import Child
from torch import nn

from consonar.components import load_generator, load_tokenizer, read_origin, save_generator
from consonar.errors import UserError
from consonar.files.lock import HALF
from consonar.files.weights import component_fingerprint, finish_save, is_component, load_weights, save_tensors
from consonar.files.writers import check_writable, halves, write_atomically
from consonar.origin import Origin
from consonar.report import check_page
from consonar.training.checkpoints import State, list_resume, load_resume, save_resume


@pytest.fixture
def folder(tmp_path, tiny_generator):
    save_generator(tiny_generator(), tmp_path / "model", Origin(tokenizer="tiny-vq"))
    return tmp_path / "model"


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_fingerprint_depends_on_names_shapes_values_and_config():
    state = {"a": torch.arange(4.0), "b": torch.ones(2)}
    base = component_fingerprint({"x": 1}, state)
    assert component_fingerprint({"x": 1}, dict(reversed(state.items()))) == base
    others = [
        component_fingerprint({"x": 2}, state),
        component_fingerprint({"x": 1}, state | {"a": torch.arange(4.0).view(2, 2)}),
        component_fingerprint({"x": 1}, {"a": state["a"], "c": state["b"]}),
        component_fingerprint({"x": 1}, state | {"b": torch.tensor([1.0, 1.0001])}),
    ]
    assert len({base, *others}) == 5
    half = {key: value.half() for key, value in state.items()}
    assert component_fingerprint({"x": 1}, half) == base  # values count, not their type


def test_missing_files(folder, tmp_path):
    with pytest.raises(UserError, match=r"^generator: no folder .*nowhere; choices: openmoji, a run"):
        load_generator(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors; a model folder holds"):
        load_generator(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_generator(folder)


def test_whole_numbers_are_not_taken_for_weights(folder):
    """Those of a quantized file mean nothing without their scale."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    key = next(iter(state))
    safetensors.torch.save_file({**state, key: state[key].int()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"not the weights of this model: {key} is torch.int32, the model has torch"):
        load_generator(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 4000])
def test_cut_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: not .* damaged or cut short") as caught:
        load_generator(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json: not valid JSON"),
        ("[]", r"config\.json: not valid JSON with named entries.*it holds a list"),
        ("{}", r"config\.json: format_version None; this consonar reads 1"),
    ],
)
def test_damaged_config(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_generator(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"format_version 2; this consonar reads 1"),
        ({"component": "tokenizer"}, r"not a generator folder"),
        ({"kind": "gpt"}, r"kind: unknown 'gpt'; choices: rear"),
        ({"widht": 3}, r"config\.json: widht: unknown .*'width'"),
        ({"num_layers": 3}, r"not the weights of this model: missing blocks\.2\."),
        ({"num_layers": 1}, r"unknown blocks\.1\."),
        ({"vocab_size": 31}, r"embeddings\.weight is \(37, 32\), the model has \(36, 32\)"),
    ],
)
def test_configs_of_another_model(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_generator(folder)
    assert "\n" not in str(caught.value)


def test_a_generator_is_no_tokenizer(folder):
    with pytest.raises(UserError, match="not a tokenizer folder"):
        load_tokenizer(folder)


FULL, TOO_LARGE = "the disk is full", r"files may not be so large here \(ulimit -f\)"
NO_ROOM = [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FULL),
    (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), TOO_LARGE),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the disk quota is used up"),
    (safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL),
    (safetensors.SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), TOO_LARGE),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), f"{FULL}, or {TOO_LARGE}"),
    (RuntimeError("basic_ios::clear: iostream error"), f"{FULL}, or {TOO_LARGE}"),
]


@pytest.mark.parametrize(("error", "why"), NO_ROOM)
def test_a_full_disk_leaves_the_old_files(folder, error, why, monkeypatch, tiny_generator):
    """The write stops half way: the old file is as it was, and the half-written one is gone."""

    def cut_short(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(safetensors.torch, "save_file", cut_short)
    with pytest.raises(UserError, match=rf"model\.safetensors: {why} \(\d+ MB free\); nothing was replaced"):
        save_generator(tiny_generator(seed=1), folder, Origin(tokenizer="tiny-vq"))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_other_write_errors_are_not_called_a_full_disk(folder):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        write_atomically(folder / "config.json", forbidden)
    assert json.loads((folder / "config.json").read_text())["component"] == "generator"


def test_a_full_disk_keeps_the_resume_files(tmp_path, monkeypatch):
    save_resume(tmp_path, 1, {"a": torch.ones(2)}, keep=1)

    def full(payload, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"step_00000002\.pt: the disk is full"):
            save_resume(tmp_path, 2, {}, keep=1)
    (kept,) = tmp_path.iterdir()
    assert load_resume(kept)["step"] == 1


def test_resume_files(tmp_path):
    for step in (1, 20, 300):
        save_resume(tmp_path, step, {"a": torch.full((2,), float(step))}, keep=2)
    (tmp_path / "step_1.pt").touch()  # not one of ours
    assert [path.name for path in list_resume(tmp_path)] == ["step_00000020.pt", "step_00000300.pt"]
    assert load_resume(tmp_path / "step_00000300.pt")["a"].tolist() == [300, 300]


class Evil:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.mark.parametrize("content", [b"", b"abc", "cut", "flipped", "evil", "other", "list"])
def test_resume_files_that_are_refused(content, tmp_path):
    """Damaged, of another version, or with code in them: nothing of it runs."""
    path = tmp_path / "step_00000001.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        numbers = torch.arange(99.0)
        payload = {
            "cut": {"a": numbers},
            "flipped": {"format_version": 1, "step": 1, "a": numbers},
            "evil": {"a": Evil()},
            "other": {"format_version": 0},
            "list": [1],
        }
        torch.save(payload[content], path)
        if content == "cut":
            path.write_bytes(path.read_bytes()[:-50])
        if content == "flipped":
            held = bytearray(path.read_bytes())
            held[held.index(numbers.numpy().tobytes()) + 7] ^= 1
            path.write_bytes(held)
    with pytest.raises(UserError, match=rf"{path.name}: (damaged|not a resume file)"):
        load_resume(path)


def test_load_weights_converts_types_and_refuses_shapes():
    layer = nn.Linear(2, 1)
    load_weights(layer, {"weight": torch.ones(1, 2).half(), "bias": torch.zeros(1).half()}, "here")
    assert layer.weight.dtype == torch.float32 and layer.weight.tolist() == [[1, 1]]
    with pytest.raises(UserError, match=r"here: not the weights .*: missing bias; weight is \(2,\), the model"):
        load_weights(layer, {"weight": torch.ones(2)}, "here")
    assert layer.weight.tolist() == [[1, 1]]


def test_files_of_two_saves_are_no_pair(folder, tmp_path, tiny_generator):
    save_generator(tiny_generator(seed=1), tmp_path / "other", Origin(tokenizer="tiny-vq"))
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"config\.json and model\.safetensors are from different saves") as caught:
        load_generator(folder)
    assert "\n" not in str(caught.value) and not is_component(folder)


def test_a_save_that_was_ended_between_its_files_is_completed(folder, monkeypatch, tiny_generator):
    newer = tiny_generator(seed=1)

    def end(*arguments):
        save_tensors(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("consonar.files.weights.save_tensors", end)
    with pytest.raises(KeyboardInterrupt):
        save_generator(newer, folder, Origin(tokenizer="another"))
    with pytest.raises(UserError, match="different saves"):
        read_origin(folder)
    finish_save(folder)
    assert read_origin(folder) == Origin(tokenizer="another")
    assert torch.equal(load_generator(folder).lm_head.weight, newer.lm_head.weight)
    before = (folder / "config.json").read_bytes()
    finish_save(folder)
    assert (folder / "config.json").read_bytes() == before and is_component(folder)


def test_a_model_folder_without_its_last_file_is_an_unfinished_run(folder, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert load_generator(tmp_path).vocab_size == 32
    (folder / "config.json").unlink()
    for load in (load_generator, load_tokenizer):
        with pytest.raises(UserError, match=r"the run in .* has not finished .*--resume"):
            load(tmp_path)


def test_two_processes_of_the_same_number_write_one_file(tmp_path):
    """Containers that share a cache folder: each begins to count at 1."""
    path = tmp_path / "file"

    def outer(partial):
        partial.write_text("outer")
        write_atomically(path, lambda other: other.write_text("inner"))
        assert path.read_text() == "inner" and partial.read_text() == "outer"

    write_atomically(path, outer)
    assert path.read_text() == "outer" and list(tmp_path.iterdir()) == [path]


def moving(average: bool = True) -> State:
    model = nn.Linear(3, 2)
    kept = {key: value.detach().clone() for key, value in model.state_dict().items()} if average else None
    return State(model, torch.optim.AdamW(model.parameters()), kept, step=4)


PARTS = {
    "model": [
        None,
        [],
        {},
        {"weight": 1, "bias": 2},
        {"weight": torch.zeros(2, 3).to_sparse(), "bias": torch.zeros(2)},
    ],
    "optimizer": [None, {}, {"state": {}, "param_groups": []}],
    "average": [None, {}, {"weight": torch.zeros(1)}],
    "step": [None, "4", -1, 5, True],
}


@pytest.mark.parametrize(("part", "value"), [(part, value) for part in PARTS for value in PARTS[part]])
def test_a_resume_file_with_a_part_that_is_something_else_is_refused_by_name(part, value, tmp_path):
    path = save_resume(tmp_path, 4, moving().payload(), keep=1)
    moving().restore(load_resume(path), str(path))
    torch.save(torch.load(path, weights_only=True) | {part: value}, path)
    with pytest.raises(UserError, match=r"step_00000004\.pt: "):
        moving().restore(load_resume(path), str(path))


def killed_while_it_saves(path):
    def save_file(tensors, partial, metadata):
        for file in (
            partial,
            partial.with_name(".tmp2MzBrg"),
        ):  # safetensors 0.8 makes its own first
            file.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = save_file
    save_tensors(path, {"weight": torch.ones(2)})


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_of_outputs_named_alike(tmp_path):
    assert Child(killed_while_it_saves, tmp_path / "s[1]").end().code == -signal.SIGKILL
    (half,) = tmp_path.iterdir()
    assert half.match(HALF)
    others = [
        ".s[1].npz.12-abcdef.partial",
        ".s[1].flip.partial",
        ".s1.12-abcdef.partial",
        ".s[1].12-abcdef.partial.npz",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    save_tensors(tmp_path / "s[1]", {"weight": torch.ones(2)})
    assert {path.name for path in tmp_path.iterdir()} == {*others, "s[1]"}


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    page, link = tmp_path / "public" / "page.html", tmp_path / "latest.html"
    page.parent.mkdir()
    page.write_text("old")
    page.chmod(0o640)
    link.symlink_to(page)
    write_atomically(link, lambda partial: partial.write_text("new"))
    assert link.is_symlink() and page.read_text() == "new" and page.stat().st_mode & 0o777 == 0o640
    assert {path.name for path in (*tmp_path.iterdir(), *page.parent.iterdir())} == {"public", page.name, link.name}


def test_a_link_is_tried_where_it_points_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "public").mkdir()
    (tmp_path / "r.json").symlink_to(tmp_path / "public" / "r.json")
    tried = []
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: tried.append(dir) or io.BytesIO())
    check_writable(tmp_path / "r.json", "--out")
    check_writable(tmp_path / "new" / "r.json", "--out")
    assert tried == [tmp_path / "public", tmp_path]


@pytest.mark.parametrize("letter", ["n", "é"])
def test_the_longest_name_that_there_can_be_is_written_and_its_halves_are_found(tmp_path, letter):
    path = tmp_path / (letter * (250 // len(letter.encode())) + ".json")
    seen = []
    write_atomically(path, lambda partial: (partial.write_text("{}"), seen.extend(halves(path))))
    assert len(seen) == 1 and os.listdir(tmp_path) == [path.name]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "page.html")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"--out: .*page.html is a pipe or a device; name a file, such as report"):
            check_page(tmp_path / "page.html", overwrite=overwrite)
