"""Released files: every architecture there and back bit for bit, every container, and what is no weight file."""

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from consonar import checkpoint
from consonar.cli import main
from consonar.convert import convert, janus, rear, to_official, vq
from consonar.convert.registry import officials, shapes_of
from consonar.errors import UserError
from consonar.generators import GENERATORS, load_generator, read_origin, save_generator
from consonar.generators import alitok as alitok_ar
from consonar.generators import llamagen as llamagen_module
from consonar.generators.alitok import AliTokARConfig
from consonar.generators.janus import JanusConfig
from consonar.generators.llamagen import LlamaGenConfig
from consonar.generators.rear import ReARConfig
from consonar.seeding import generator as seeded
from consonar.tokenizers import TOKENIZERS, alitok, load_tokenizer, maskgit, titok, vqgan_plus
from consonar.tokenizers.alitok import AliTokConfig
from consonar.tokenizers.maskgit import MaskGITConfig
from consonar.tokenizers.titok import TiTokConfig
from consonar.tokenizers.vit import TransformerConfig
from consonar.tokenizers.vq import VQConfig
from consonar.tokenizers.vqgan_plus import VQGANPlusConfig
from consonar.types import Grid

CONV = {"vocab_size": 16, "code_dim": 4, "base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1}
DEEP = CONV | {"channel_multipliers": (1, 1, 1, 1, 1)}
SIDE = TransformerConfig(width=64, num_layers=1, num_heads=1, patch_size=16)
VIT = {"image_size": 32, "vocab_size": 16, "code_dim": 4, "encoder": SIDE, "decoder": SIDE}
ROTARY = {"width": 64, "num_layers": 2, "vocab_size": 16}
VQ = VQConfig(image_size=256, latent_channels=8, **CONV)
LLAMAGEN = LlamaGenConfig(**ROTARY, num_heads=1, num_tokens=256, num_classes=3, grid=Grid(16, 16))
JANUS = JanusConfig(
    width=128, num_layers=2, num_heads=1, mlp_width=48, text_vocab_size=100003, code_dim=4, head_width=24,
    vocab_size=16, num_tokens=576,
)  # fmt: skip
USED = {vq.UNUSED: torch.arange(9.0)}
HEADS = {key: torch.randn(3, generator=seeded(0, key)) for head in rear.HEADS for key in sorted(head)}
REAR = ReARConfig(width=32, num_layers=2, num_heads=4, vocab_size=16, num_tokens=4, num_classes=3)
KV_CACHE = {"layers.1.attention.kv_cache.k_cache": torch.zeros(2, 1, 5, 64)}
# Record, our configuration, and what the released file holds besides.
CASES = {
    "vq": (vq.OFFICIAL, VQ, USED),
    "maskgit": (maskgit.OFFICIAL, MaskGITConfig(**CONV), {}),
    "vqgan+": (vqgan_plus.OFFICIAL, VQGANPlusConfig(**CONV), {}),
    "maskbit": (vqgan_plus.OFFICIAL, VQGANPlusConfig(**CONV, quantizer="lookup-free"), {}),
    "titok, proxy codes": (
        titok.OFFICIAL, TiTokConfig(**VIT, num_tokens=3, pixel_decoder=MaskGITConfig(image_size=32, **DEEP)), {}
    ),
    "titok, pixels": (
        titok.OFFICIAL, TiTokConfig(**VIT, num_tokens=3, pixel_decoder=None, l2_normalize=False), {}
    ),
    "alitok": (alitok.OFFICIAL, AliTokConfig(**VIT), {}),
    "rear": (rear.OFFICIAL, REAR, HEADS),
    "rar": (rear.OFFICIAL, REAR, {}),
    "llamagen, classes": (llamagen_module.OFFICIAL, LLAMAGEN, {}),
    "llamagen, captions, sampled from": (
        llamagen_module.OFFICIAL,
        LlamaGenConfig(**ROTARY, num_heads=1, num_tokens=256, condition="text", num_condition_tokens=4, caption_dim=6,
                       grid=Grid(16, 16)),
        KV_CACHE,
    ),
    "alitok-ar": (
        alitok_ar.OFFICIAL,
        AliTokARConfig(**ROTARY, num_heads=4, num_tokens=273, num_classes=3, grid=Grid(16, 16, prefix=17)), {},
    ),
    "janus": (janus.OFFICIALS[0], JANUS, {"language_model.lm_head.weight": torch.ones(2), "aligner.a": torch.ones(1)}),
    "janus, transformers": (janus.OFFICIALS[1], JANUS, {"lm_head.weight": torch.ones(2)}),
    "janus vq": (janus.OFFICIALS[2], VQ, USED),
    "janus vq, transformers": (janus.OFFICIALS[3], VQ, {}),
}  # fmt: skip


def module_of(config):
    kinds = TOKENIZERS if config.kind in TOKENIZERS else GENERATORS
    return kinds[config.kind][1](config)


def released(name: str) -> dict[str, torch.Tensor]:
    """A released state dict of tiny size, every value drawn."""
    record, config, unused = CASES[name]
    rng = seeded(0, name)
    ours = {key: torch.randn(value.shape, generator=rng) for key, value in module_of(config).state_dict().items()}
    return record.to_official(ours, unused, config)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def load(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.fixture
def bare(tmp_path) -> Path:
    """A RAR file as published: a bare state dict."""
    torch.save(released("rar"), tmp_path / "rar.bin")
    return tmp_path / "rar.bin"


def test_every_record_has_a_case():
    assert {record.name for record, _, _ in CASES.values()} == {record.name for record in officials()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_there_and_back_bit_for_bit(name, ending, tmp_path):
    if "janus" in name:
        pytest.importorskip("transformers")
    record, config, unused = CASES[name]
    state = released(name)
    assert [r.name for r in officials() if r.recognises(shapes_of(state))] == [record.name]
    checkpoint.save_tensors(tmp_path / "released.safetensors", state)
    (made,) = convert(tmp_path / "released.safetensors", tmp_path / "ours")
    assert made.recognised_as == record.name and made.component == record.component
    assert (made.vocab_size, made.num_parameters) == (
        config.vocab_size, sum(p.numel() for p in module_of(config).parameters()),
    )  # fmt: skip
    model = (load_tokenizer if record.component == "tokenizer" else load_generator)(tmp_path / "ours")
    ours, set_aside = record.to_ours(state, config)
    assert same(dict(model.state_dict()), ours) and set(unused) <= set(set_aside)
    assert (tmp_path / "ours" / "unused.safetensors").is_file() == bool(set_aside)
    assert to_official(tmp_path / "ours", tmp_path / f"back{ending}") == record.name
    assert same(load(tmp_path / f"back{ending}"), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_the_file_and_is_float32_in_the_model(dtype, tmp_path):
    state = {key: value.to(dtype) for key, value in released("rar").items()}
    torch.save(state, tmp_path / "half.pt")
    convert(tmp_path / "half.pt", tmp_path / "ours")
    weights = load_generator(tmp_path / "ours").state_dict()
    assert all(torch.equal(weights[key], value.float()) for key, value in state.items())
    to_official(tmp_path / "ours", tmp_path / "back.pt")
    assert same(load(tmp_path / "back.pt"), state)


def test_a_file_with_both_halves_becomes_two_folders_and_one_file_again(tmp_path):
    pytest.importorskip("transformers")
    # 576 tokens at 384 pixels, as released: five resolutions.
    config = VQConfig(image_size=384, latent_channels=8, **DEEP)
    tokenizer = janus.OFFICIALS[2].to_official(module_of(config).state_dict(), USED, config)
    state = {**released("janus"), **tokenizer}
    torch.save(state, tmp_path / "pytorch_model.bin")
    made = convert(tmp_path / "pytorch_model.bin", tmp_path / "janus")
    assert [part.component for part in made] == ["tokenizer", "generator"]
    assert [part.folder for part in made] == [tmp_path / "janus" / "tokenizer", tmp_path / "janus" / "generator"]
    origin = read_origin(tmp_path / "janus" / "generator")
    own = load_tokenizer(origin.tokenizer)
    assert own.fingerprint == origin.tokenizer_fingerprint and own.name == "janus" and own.image_size == 384
    to_official(tmp_path / "janus", tmp_path / "back.bin")
    assert same(load(tmp_path / "back.bin"), state)
    with pytest.raises(UserError, match=r"--image-size, --tokenizer: .* has a tokenizer of its own"):
        convert(tmp_path / "pytorch_model.bin", tmp_path / "other", image_size=384)


def test_a_model_that_was_trained_here_gets_the_released_layout(tmp_path, tiny_generator):
    from consonar.generators import Origin

    generator = tiny_generator()
    save_generator(generator, tmp_path / "run" / "model", Origin(tokenizer="openmoji-64"))
    assert to_official(tmp_path / "run", tmp_path / "mine.pt") == "reAR/RAR generator"
    assert same(load(tmp_path / "mine.pt"), dict(generator.state_dict()))


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
    "parameters": lambda s: {key: torch.nn.Parameter(value) for key, value in s.items()},
}  # fmt: skip


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
        checkpoint.save_tensors(tmp_path / name, part) if ending == "safetensors" else torch.save(part, tmp_path / name)
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


def test_nothing_is_written_unless_every_key_fits(bare, tmp_path):
    state = released("rar")
    for change, message in (
        ({"surprise.weight": torch.ones(1)}, r"looks like reAR/RAR generator: .*unknown surprise\.weight"),
        ({"lm_head.bias": None}, r"missing lm_head\.bias"),
        ({"lm_head.bias": torch.ones(3)}, r"lm_head\.bias is \(3,\), the model has \(16,\)"),
        ({"lm_head.weight": None}, r"looks like reAR/RAR generator, but lm_head\.weight is missing"),
        ({f"x{i:02}": torch.ones(1) for i in range(11)}, r"unknown x00, .*x07 and 3 more"),
    ):
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        torch.save(changed, bare)
        with pytest.raises(UserError, match=message):
            convert(bare, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["rar.bin"]


def test_an_unknown_model_is_told_with_what_is_known(tmp_path):
    torch.save({"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"LlamaGen VQ tokenizer, .*its first keys: conv1\.weight, fc\.bias"):
        convert(tmp_path / "resnet.pth", tmp_path / "ours")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list, expected tensors by name"):
        convert(tmp_path / "list.pth", tmp_path / "ours")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="no tensors by name in it; it holds 'epoch'"):
        convert(tmp_path / "none.pth", tmp_path / "ours")


def test_nothing_is_overwritten(bare, tmp_path):
    convert(bare, tmp_path / "ours")
    with pytest.raises(UserError, match=r"--out: .*ours exists; choose another folder"):
        convert(bare, tmp_path / "ours")
    with pytest.raises(UserError, match=r"--to-official: .*rar\.bin exists"):
        to_official(tmp_path / "ours", bare)
    with pytest.raises(UserError, match="converted already; the way back is --to-official"):
        convert(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(UserError, match=r"ends in '\.npz'; choose \.safetensors or \.pt"):
        to_official(tmp_path / "ours", tmp_path / "back.npz")


def test_the_source_is_written_down(bare, tmp_path):
    convert(bare, tmp_path / "ours")
    source = json.loads((tmp_path / "ours" / "source.json").read_text())
    assert source["files"] == {"rar.bin": checkpoint.file_sha256(bare)}
    assert source["recognised_as"] == "reAR/RAR generator" and source["entry"] == []


@pytest.mark.parametrize(("file", "size", "expected"), [
    ("c2i_XL_256.pt", None, 16), ("c2i_XL_384.pt", None, 24), ("t2i_stage2_512.pt", None, 32), ("mine.pt", 320, 20),
    ("c2i_XL_384.pt", 256, 16), ("run1384.pt", None, 16),
])  # fmt: skip
def test_the_image_size_that_shapes_do_not_say(file, size, expected, tmp_path):
    torch.save({"model": released("llamagen, classes")}, tmp_path / file)
    (made,) = convert(tmp_path / file, tmp_path / "ours", image_size=size)
    config = load_generator(tmp_path / "ours").config
    assert config.grid == Grid(expected, expected) and made.num_tokens == config.num_tokens == expected**2
    assert any("the file's name says so" in note for note in made.notes) == (size is None and expected > 16)


def test_image_sizes_and_settings_of_other_models(bare, tmp_path):
    with pytest.raises(UserError, match=r"--image-size: the shapes of .* say how many tokens"):
        convert(bare, tmp_path / "ours", image_size=384)
    torch.save(released("vq"), tmp_path / "vq.pt")
    convert(tmp_path / "vq.pt", tmp_path / "large", image_size=384, settings={"l2_normalize": False})
    tokenizer = load_tokenizer(tmp_path / "large")
    assert tokenizer.image_size == 384 and not tokenizer.config.l2_normalize and tokenizer.name == "large"
    with pytest.raises(UserError, match=r"l2_norm: unknown .*'l2_normalize'"):
        convert(tmp_path / "vq.pt", tmp_path / "other", settings={"l2_norm": False})


def test_a_generator_keeps_its_tokenizer_if_the_sizes_agree(tmp_path):
    torch.save(released("vq"), tmp_path / "vq.pt")
    torch.save(released("llamagen, classes"), tmp_path / "gpt.pt")
    convert(tmp_path / "vq.pt", tmp_path / "codes", image_size=32)
    convert(tmp_path / "gpt.pt", tmp_path / "gpt", tokenizer=str(tmp_path / "codes"))
    origin = read_origin(tmp_path / "gpt")
    assert origin.tokenizer == str(tmp_path / "codes")
    assert origin.tokenizer_fingerprint == load_tokenizer(tmp_path / "codes").fingerprint
    convert(tmp_path / "vq.pt", tmp_path / "larger", image_size=64)
    with pytest.raises(UserError, match=r"larger has num_tokens 1024, the generator 256"):
        convert(tmp_path / "gpt.pt", tmp_path / "other", tokenizer=str(tmp_path / "larger"))
    with pytest.raises(UserError, match="--tokenizer: for generators alone"):
        convert(tmp_path / "vq.pt", tmp_path / "other", tokenizer=str(tmp_path / "codes"))
    convert(tmp_path / "gpt.pt", tmp_path / "alone")
    from consonar.generators import load_own_tokenizer

    with pytest.raises(UserError, match="does not say which it was trained with; name one"):
        load_own_tokenizer(tmp_path / "alone")


def test_the_command_says_what_it_found(tmp_path, capsys):
    torch.save({"model": released("vq"), "steps": 3}, tmp_path / "vq.pt")
    main(["convert", str(tmp_path / "vq.pt"), "--out", str(tmp_path / "codes"), "--setting", "l2_normalize=false"])
    text = capsys.readouterr().out
    assert "LlamaGen VQ tokenizer: " in text and "M parameters, 16384 tokens, 16 codes of width 4" in text
    assert "left alone beside it: steps" in text and "set aside for the way back: 1 tensors" in text
    assert load_tokenizer(tmp_path / "codes").config.l2_normalize is False
    main(["convert", str(tmp_path / "codes"), "--to-official", str(tmp_path / "back.pt")])
    assert same(load(tmp_path / "back.pt")["model"], released("vq"))
    for arguments, message in (
        (["--setting", "l2"], "--setting: 'l2' is not of the form field=value"),
        ([], "give either --out FOLDER, or --to-official FILE"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(tmp_path / "vq.pt"), *(["--out", "x"] if arguments else []), *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err
