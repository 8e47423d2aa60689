"""`hf:` names: which file they mean, conversion once, and one line when a file cannot be had. Nothing is downloaded."""

import json
import logging
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consonar import components, hub
from consonar.cli import main
from consonar.components import fetch_component, load_generator, load_own_tokenizer, load_tokenizer
from consonar.convert import examine
from consonar.convert.layouts import OFFICIALS
from consonar.errors import UserError
from consonar.files.writers import file_sha256
from consonar.generators import GENERATORS
from consonar.generators.llamagen import LlamaGenConfig, LlamaGenGenerator
from consonar.hub import PUBLISHED, read_name
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.tokenizers.vqgan import VQGANPlusConfig, VQGANPlusTokenizer
from consonar.types import Grid

GOLDENS = Path(__file__).parents[1] / "goldens"
VQ = VQConfig(
    image_size=256, vocab_size=16, code_dim=4, base_channels=32, channel_multipliers=(1,) * 5, num_res_blocks=1,
    latent_channels=8,
)  # fmt: skip
LLAMAGEN = LlamaGenConfig(
    width=64, num_layers=2, num_heads=1, vocab_size=16, num_tokens=256, num_classes=3, grid=Grid(16, 16)
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub_files(tmp_path, cache, monkeypatch):
    """A hub in a folder: the one function that touches the network copies from it instead; `asked` lists the calls."""
    root, asked = tmp_path / "hub", []

    def download(repository: str, file: str) -> str:
        asked.append(f"{repository}/{file}")
        if not (root / repository / file).is_file():
            raise ConnectionError("Max retries exceeded\nwith url: ...")
        return str(root / repository / file)

    def put(path: str, state: object) -> Path:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, root / path)
        return root / path

    monkeypatch.setattr(hub, "download", download)
    put.asked = asked
    return put


def tiny_tokenizer():
    return VQTokenizer(VQ).state_dict()


@pytest.mark.parametrize(("name", "repository", "file", "size"), [
    ("hf:rar-b", "yucornetto/RAR", "rar_b.bin", None),
    ("hf:llamagen-c2i-l-384", "FoundationVision/LlamaGen", "c2i_L_384.pt", 384),
    ("hf:FoundationVision/LlamaGen/c2i_L_384.pt", "FoundationVision/LlamaGen", "c2i_L_384.pt", 384),
    ("hf:llamagen-vq16-c2i", "FoundationVision/LlamaGen", "vq_ds16_c2i.pt", None),
    ("hf:llamagen-vq16-c2i@384", "FoundationVision/LlamaGen", "vq_ds16_c2i.pt", 384),
    ("hf:someone/else/sub/folder/model.safetensors", "someone/else", "sub/folder/model.safetensors", None),
    ("hf:alitok", None, "AliTok.pth", None),
])  # fmt: skip
def test_what_a_name_means(name, repository, file, size, cache):
    wanted = read_name(name)
    assert (wanted.repository, wanted.file, wanted.image_size) == (repository, file, size)


def test_names_of_one_file_share_a_folder(cache):
    same = ("hf:rar-b", "hf:yucornetto/RAR/rar_b.bin")
    assert len({read_name(name).converted for name in same}) == 1
    halves = ("hf:janus-pro-1b", "hf:janus-pro-vq")
    assert len({read_name(name).converted for name in halves}) == 1
    sizes = ("hf:llamagen-vq16-c2i", "hf:llamagen-vq16-c2i@384")
    assert len({read_name(name).converted for name in sizes}) == 2


@pytest.mark.parametrize("name", ["hf:rar-bb", "hf:owner/file.pt", "hf:owner//file.pt", "hf:a/b/../../c", "hf:"])
def test_names_that_mean_nothing(name, cache):
    with pytest.raises(UserError, match=r"hf: name: unknown .*choices: llamagen-vq16-c2i, .*owner/repository/file"):
        load_tokenizer(name)
    with pytest.raises(UserError, match="'big' behind @ is not an image size"):
        load_tokenizer("hf:rar-b@big")


def test_a_hub_out_of_reach_is_asked_once_and_told_in_one_line(cache, monkeypatch, caplog):
    asked = []

    def fail(*given: str, **_: str) -> str:
        asked.append(given)
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    with pytest.raises(UserError, match=r"cannot download rar_b\.bin of https.*\(no network\); get it elsewhere"):
        load_generator("hf:rar-b")
    assert not caplog.records and len(asked) == 1
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: f"{repository}/{file}")
    assert hub.download("owner/name", "downloaded.bin") == "owner/name/downloaded.bin"


def test_a_file_is_downloaded_and_converted_once(hub_files, cache):
    state = tiny_tokenizer()
    hub_files("someone/codes/vq.pt", {"model": state})
    first = load_tokenizer("hf:someone/codes/vq.pt")
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
    again = load_tokenizer("hf:someone/codes/vq.pt")
    assert again.fingerprint == first.fingerprint and hub_files.asked == ["someone/codes/vq.pt"]
    assert load_tokenizer("hf:someone/codes/vq.pt@128").image_size == 128
    assert (cache / "converted" / "someone--codes--vq.pt" / "source.json").is_file()


def test_a_published_generator_brings_its_tokenizer_and_size(hub_files, cache):
    hub_files("FoundationVision/LlamaGen/c2i_B_384.pt", {"model": LlamaGenGenerator(LLAMAGEN).state_dict()})
    hub_files("FoundationVision/LlamaGen/vq_ds16_c2i.pt", {"model": tiny_tokenizer()})
    generator = load_generator("hf:llamagen-c2i-b-384")
    tokenizer = load_own_tokenizer("hf:llamagen-c2i-b-384")
    assert generator.num_tokens == tokenizer.num_tokens == 576 and tokenizer.image_size == 384


def test_a_sample_from_names_alone(hub_files, cache, tmp_path):
    """The whole way of a user: two names, one command."""
    hub_files("FoundationVision/LlamaGen/c2i_B_256.pt", {"model": LlamaGenGenerator(LLAMAGEN).state_dict()})
    hub_files("FoundationVision/LlamaGen/vq_ds16_c2i.pt", {"model": tiny_tokenizer()})
    main(["sample", "hf:llamagen-c2i-b-256", "--classes", "0", "--out", str(tmp_path / "samples.npz")])
    assert (tmp_path / "samples.npz").is_file()


def test_a_file_that_was_put_there_by_hand_needs_no_network(hub_files, cache):
    torch.save({"model": tiny_tokenizer()}, path := cache.parent / "vq.pt")
    place = cache / "released" / "someone" / "codes" / "vq.pt"
    place.parent.mkdir(parents=True)
    shutil.copy(path, place)
    assert load_tokenizer("hf:someone/codes/vq.pt").vocab_size == 16
    assert hub_files.asked == []


@pytest.mark.parametrize(("name", "missing"), [
    ("hf:rar-b", "rar_b.bin"), ("hf:someone/codes/sub/vq.pt", "sub/vq.pt"),
    ("hf:janus-pro-7b", "pytorch_model.bin.index.json"),
])  # fmt: skip
def test_a_file_that_cannot_be_had_is_told_in_one_line(name, missing, hub_files, cache):
    with pytest.raises(UserError) as caught:
        load_generator(name)
    message = str(caught.value)
    assert "\n" not in message and "Max retries exceeded with url" in message
    assert f"put it at {cache / 'released' / read_name(name).repository / missing}" in message
    assert not (cache / "converted").exists()


def test_a_model_that_is_on_no_hub_says_where_it_is(hub_files, cache):
    place = cache / "released" / "alitok-b" / "alitok_b.bin"
    with pytest.raises(UserError, match=rf"not on the hub \(Google Drive, .*\); put alitok_b\.bin at {place}"):
        load_generator("hf:alitok-b")
    assert hub_files.asked == []


def test_every_shard_of_an_index_is_fetched(hub_files, cache):
    state = tiny_tokenizer()
    names = {key: f"part-{i % 2}.bin" for i, key in enumerate(state)}
    for name in set(names.values()):
        file = hub_files(f"someone/codes/{name}", {key: state[key] for key in state if names[key] == name})
    index = file.with_name("pytorch_model.bin.index.json")
    index.write_text(json.dumps({"weight_map": names}))
    assert load_tokenizer("hf:someone/codes/pytorch_model.bin.index.json").vocab_size == 16
    assert len(hub_files.asked) == 3


def test_another_file_than_the_published_one_is_refused(hub_files, cache, monkeypatch):
    file = hub_files("markweber/maskbit_tokenizer_12bit/maskbit_tokenizer_12bit.bin", {"a": torch.ones(1)})
    with pytest.raises(UserError, match=r"is not the published file \(its SHA-256 is not 3dde024443d6"):
        load_tokenizer("hf:maskbit-12bit")
    hub_files("markweber/maskbit_tokenizer_12bit/maskbit_tokenizer_12bit.bin", {"model": tiny_tokenizer()})
    mine = replace(PUBLISHED["maskbit-12bit"], sha256=file_sha256(file))
    monkeypatch.setitem(hub.PUBLISHED, "maskbit-12bit", mine)
    assert load_tokenizer("hf:maskbit-12bit").vocab_size == 16


def test_a_tokenizer_is_no_generator(hub_files, cache):
    hub_files("someone/codes/vq.pt", tiny_tokenizer())
    with pytest.raises(UserError, match=r"hf:someone/codes/vq\.pt: holds no generator"):
        load_generator("hf:someone/codes/vq.pt")


def test_processes_that_want_one_file_convert_it_once(hub_files, cache, monkeypatch):
    """The second waits for the first, as ranks of one job do."""
    hub_files("someone/codes/vq.pt", tiny_tokenizer())
    convert_file, converted, found = components.convert_file, [], []

    def slow(wanted, folder):
        time.sleep(0.1)
        convert_file(wanted, folder)
        converted.append(folder)

    monkeypatch.setattr(components, "convert_file", slow)

    def fetch():
        found.append(fetch_component("hf:someone/codes/vq.pt", "tokenizer"))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(converted) == 1 and found == converted * 2
    assert not list((cache / "converted").rglob("*.partial")) and load_tokenizer(found[0]).vocab_size == 16


def test_a_file_that_was_replaced_is_converted_again(cache):
    place = cache / "released" / "someone" / "codes" / "vq.pt"
    place.parent.mkdir(parents=True)
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(weights := tiny_tokenizer(), place)
        assert all(torch.equal(v, weights[k]) for k, v in load_tokenizer("hf:someone/codes/vq.pt").state_dict().items())
    written = (cache / "converted" / "someone--codes--vq.pt" / "model.safetensors").stat().st_mtime_ns
    load_tokenizer("hf:someone/codes/vq.pt")
    assert (cache / "converted" / "someone--codes--vq.pt" / "model.safetensors").stat().st_mtime_ns == written


def test_half_a_conversion_is_made_again(hub_files, cache):
    hub_files("someone/codes/vq.pt", tiny_tokenizer())
    (cache / "converted" / "someone--codes--vq.pt").mkdir(parents=True)
    assert load_tokenizer("hf:someone/codes/vq.pt").vocab_size == 16


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_says_what_is_so(name):
    """Goldens and manifests that it names exist; parameters, tokens and codes are those of the manifest's model."""
    model = PUBLISHED[name]
    assert model.kind in {"tokenizer": TOKENIZERS, "generator": GENERATORS}[model.component]
    assert (model.repository is None) == (model.elsewhere is not None)
    assert model.sha256 is None or len(model.sha256) == 64
    assert (model.code_dim is None) == (model.component == "generator")
    if model.golden:
        assert (GOLDENS / f"{model.golden}.npz").is_file()
    if model.tokenizer:
        codes = PUBLISHED[model.tokenizer.removeprefix("hf:").partition("@")[0]]
        assert codes.vocab_size == model.vocab_size
    if model.manifest:
        keys = json.loads((GOLDENS / "manifests" / f"{model.manifest}.json").read_text())["state_dict"]
        size = 384 if name == "janus-pro-vq" else model.image_size
        found = examine({key: torch.empty(shape, device="meta") for key, shape in keys.items()}, name, image_size=size)
        made = found.module
        assert found.official in OFFICIALS and found.config.kind == model.kind
        ours = (made.num_tokens, made.vocab_size, sum(parameter.numel() for parameter in made.parameters()))
        assert ours == (model.num_tokens, model.vocab_size, model.parameters)
        assert getattr(made, "code_dim", None) == model.code_dim or model.component == "generator"


@pytest.mark.parametrize("bits", [12, 14, 16, 18])
def test_the_size_of_maskbit_tokenizers(bits):
    model = PUBLISHED[f"maskbit-{bits}bit"]
    config = VQGANPlusConfig(quantizer="lookup-free", code_dim=bits, vocab_size=2**bits)
    with torch.device("meta"):
        made = VQGANPlusTokenizer(config)
    assert sum(parameter.numel() for parameter in made.parameters()) == model.parameters
    assert (made.num_tokens, made.vocab_size, made.code_dim) == (model.num_tokens, model.vocab_size, model.code_dim)


def test_the_table_of_models_has_a_line_for_each(capsys):
    """What is piped is not folded: name, kind, licence and place stand in one line."""
    main(["models"])
    lines = capsys.readouterr().out.splitlines()
    for name, model in PUBLISHED.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert all(word in line for word in (model.kind, model.licence, model.parity, model.repository or "Google"))
    main(["models", "rar-xl"])
    text = capsys.readouterr().out
    assert "yucornetto/RAR" in text and str(PUBLISHED["rar-xl"].sha256) in text and "hf:maskgit-vq" in text
    with pytest.raises(SystemExit) as stop:
        main(["models", "rar-x"])
    assert stop.value.code == 2 and "did you mean 'rar-xl'" in capsys.readouterr().err
