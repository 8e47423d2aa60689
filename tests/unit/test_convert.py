"""Released files: every architecture there and back bit for bit; what shapes do not say; what is refused."""

import json

import pytest
import torch
from released_models import CASES, DEEP, USED, load, module_of, released, same

from consonar.cli import main
from consonar.components import load_generator, load_own_tokenizer, load_tokenizer, read_origin, save_generator
from consonar.convert import convert, to_official
from consonar.convert.layouts import OFFICIALS, janus
from consonar.convert.layouts.official import shapes_of
from consonar.errors import UserError
from consonar.files.weights import save_tensors
from consonar.files.writers import file_sha256
from consonar.origin import Origin
from consonar.tokenizers.vq import VQConfig
from consonar.types import Grid


@pytest.fixture
def bare(tmp_path):
    """A RAR file as published: a bare state dict."""
    torch.save(released("rar"), tmp_path / "rar.bin")
    return tmp_path / "rar.bin"


def test_every_record_has_a_case():
    assert {record.name for record, _, _ in CASES.values()} == {record.name for record in OFFICIALS}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_there_and_back_bit_for_bit(name, ending, tmp_path):
    record, config, unused = CASES[name]
    state = released(name)
    assert [r.name for r in OFFICIALS if r.recognises(shapes_of(state))] == [record.name]
    save_tensors(tmp_path / "released.safetensors", state)
    (made,) = convert(tmp_path / "released.safetensors", tmp_path / "ours")
    assert made.official.name == record.name and made.official.component == record.component
    num_parameters = sum(parameter.numel() for parameter in made.module.parameters())
    assert (made.module.vocab_size, num_parameters) == (
        config.vocab_size, sum(p.numel() for p in module_of(config).parameters()),
    )  # fmt: skip
    model = (load_tokenizer if record.component == "tokenizer" else load_generator)(tmp_path / "ours")
    ours, set_aside = record.to_ours(state, config)
    assert same(dict(model.state_dict()), ours) and set(unused) <= set(set_aside)
    assert (tmp_path / "ours" / "unused.safetensors").is_file() == bool(set_aside)
    assert to_official(tmp_path / "ours", tmp_path / f"back{ending}") == record.name
    assert same(load(tmp_path / f"back{ending}"), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_with_numbers_that_are_not_finite_is_refused_and_nothing_is_written(value, tmp_path):
    state = released("rar")
    state["lm_head.bias"] = state["lm_head.bias"].clone()
    state["lm_head.bias"][2] = value
    torch.save(state, tmp_path / "rar.bin")
    with pytest.raises(UserError, match=r"rar\.bin: lm_head\.bias holds numbers that are not finite"):
        convert(tmp_path / "rar.bin", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["rar.bin"]


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
    # 576 tokens at 384 pixels, as released: five resolutions.
    config = VQConfig(image_size=384, latent_channels=8, **DEEP)
    tokenizer = janus.OFFICIALS[2].to_official(module_of(config).state_dict(), USED, config)
    state = {**released("janus"), **tokenizer}
    torch.save(state, tmp_path / "pytorch_model.bin")
    made = convert(tmp_path / "pytorch_model.bin", tmp_path / "janus")
    assert [part.official.component for part in made] == ["tokenizer", "generator"]
    assert [part.folder for part in made] == [tmp_path / "janus" / "tokenizer", tmp_path / "janus" / "generator"]
    origin = read_origin(tmp_path / "janus" / "generator")
    own = load_tokenizer(origin.tokenizer)
    assert own.fingerprint == origin.tokenizer_fingerprint and own.name == "janus" and own.image_size == 384
    to_official(tmp_path / "janus", tmp_path / "back.bin")
    assert same(load(tmp_path / "back.bin"), state)
    with pytest.raises(UserError, match=r"--image-size, --tokenizer: .* has a tokenizer of its own"):
        convert(tmp_path / "pytorch_model.bin", tmp_path / "other", image_size=384)


def test_a_model_that_was_trained_here_gets_the_released_layout(tmp_path, tiny_generator):
    generator = tiny_generator()
    save_generator(generator, tmp_path / "run" / "model", Origin(tokenizer="openmoji-64"))
    assert to_official(tmp_path / "run", tmp_path / "mine.pt") == "reAR/RAR generator"
    assert same(load(tmp_path / "mine.pt"), dict(generator.state_dict()))


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
    with pytest.raises(UserError, match=r"--to: .*ours exists; choose another folder"):
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
    assert source["files"] == {"rar.bin": file_sha256(bare)}
    assert source["recognised_as"] == "reAR/RAR generator" and source["entry"] == []


@pytest.mark.parametrize(("file", "size", "expected"), [
    ("c2i_XL_256.pt", None, 16), ("c2i_XL_384.pt", None, 24), ("t2i_stage2_512.pt", None, 32), ("mine.pt", 320, 20),
    ("c2i_XL_384.pt", 256, 16), ("run1384.pt", None, 16),
])  # fmt: skip
def test_the_image_size_that_shapes_do_not_say(file, size, expected, tmp_path):
    torch.save({"model": released("llamagen, classes")}, tmp_path / file)
    (made,) = convert(tmp_path / file, tmp_path / "ours", image_size=size)
    config = load_generator(tmp_path / "ours").config
    assert config.grid == Grid(expected, expected) and made.module.num_tokens == config.num_tokens == expected**2
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
    # Convolutions serve any size: the fingerprint is that of the size which the generator needs.
    convert(tmp_path / "vq.pt", tmp_path / "larger", image_size=64)
    convert(tmp_path / "gpt.pt", tmp_path / "resized", tokenizer=str(tmp_path / "larger"))
    assert read_origin(tmp_path / "resized").tokenizer_fingerprint == origin.tokenizer_fingerprint
    torch.save(released("titok, pixels"), tmp_path / "titok.bin")
    convert(tmp_path / "titok.bin", tmp_path / "titok")
    with pytest.raises(UserError, match=r"titok has num_tokens 3, the generator 256"):
        convert(tmp_path / "gpt.pt", tmp_path / "other", tokenizer=str(tmp_path / "titok"))
    with pytest.raises(UserError, match="--tokenizer: for generators alone"):
        convert(tmp_path / "vq.pt", tmp_path / "other", tokenizer=str(tmp_path / "codes"))
    convert(tmp_path / "gpt.pt", tmp_path / "alone")
    with pytest.raises(UserError, match="does not say which it was trained with; name one"):
        load_own_tokenizer(tmp_path / "alone")


def test_a_damaged_source_file_is_told(bare, tmp_path):
    convert(bare, tmp_path / "ours")
    for text in ("{", "{}", '{"entry": 3, "recognised_as": 4}'):
        (tmp_path / "ours" / "source.json").write_text(text)
        with pytest.raises(UserError, match=r"source\.json: not .* damaged"):
            to_official(tmp_path / "ours", tmp_path / "back.pt")


def test_the_command_says_what_it_found(tmp_path, capsys):
    torch.save({"model": released("vq"), "steps": 3}, tmp_path / "vq.pt")
    main(["convert", str(tmp_path / "vq.pt"), "--to", str(tmp_path / "codes"), "--setting", "l2_normalize=false"])
    text = capsys.readouterr().out
    assert "LlamaGen VQ tokenizer: " in text and "M parameters, 16384 tokens, 16 codes of width 4" in text
    assert "left alone beside it: steps" in text and "set aside for the way back: 1 tensors" in text
    assert load_tokenizer(tmp_path / "codes").config.l2_normalize is False
    main(["convert", str(tmp_path / "codes"), "--to-official", str(tmp_path / "back.pt")])
    assert same(load(tmp_path / "back.pt")["model"], released("vq"))
    for arguments, message in (
        (["--setting", "l2"], "--setting: 'l2' is not of the form field=value"),
        ([], "give either --to FOLDER, or --to-official FILE"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(tmp_path / "vq.pt"), *(["--to", "x"] if arguments else []), *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err
