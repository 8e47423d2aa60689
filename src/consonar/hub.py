"""Released models by name, and what an `hf:` name stands for: which file, and how it is fetched.

`hf:rar-b` is a published model by name (`consonar models`), `hf:owner/repository/path/to/file` any file that `convert`
recognises; `@384` behind either says the image size where shapes do not. A file that is put into the folder named in
the messages is taken instead of a download, so that all of this works without a network.

What stands in the table are facts from the authors' repositories and the pages of the files. `sha256` stands where a
page states it, and is checked after a download. `golden` and `manifest` name files of `tests/goldens`: arrays computed
by the official implementation, which ours reproduces, and the list of all keys and shapes at the real size, which the
converter takes. No released file was at hand when this was written.
"""

import logging
import re
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Literal

from consonar.errors import NotHere, UserError, unknown
from consonar.files.readers import beside, plain_name, read_json
from consonar.files.writers import cache_dir

PREFIX = "hf:"
APACHE, MIT = "Apache-2.0", "MIT"
GOOGLE_DRIVE = "Google Drive, linked from the README of github.com/ali-vilab/alitok"


@dataclass(frozen=True)
class Published:
    """One released model."""

    name: str
    """What `hf:NAME` calls it."""
    kind: str
    """Our kind of model."""
    _: KW_ONLY
    component: Literal["tokenizer", "generator"]
    parameters: int
    """Of our module; training heads and buffers of the file are not counted."""
    num_tokens: int
    """Per image."""
    vocab_size: int
    code_dim: int | None = None
    """Width of a code; None for generators."""
    licence: str
    """Of the file as its page states it, else of the authors' repository."""
    repository: str | None = None
    """On huggingface.co; None where it is published elsewhere."""
    file: str
    sha256: str | None = None
    elsewhere: str | None = None
    """Where, when not on huggingface.co."""
    image_size: int | None = None
    """For the conversion, where shapes do not say it."""
    tokenizer: str | None = None
    """Of a generator: its tokenizer, as `load_tokenizer` takes it."""
    words: str | None = None
    """File in the same place with the words of its prompts."""
    golden: str | None = None
    """A golden of its architecture, most at reduced size."""
    manifest: str | None = None

    @property
    def parity(self) -> str:
        """What was compared: "golden+manifest", "golden", "manifest" or "none"."""
        return "+".join(what for what in ("golden", "manifest") if getattr(self, what)) or "none"


tokenizer, generator = partial(Published, component="tokenizer"), partial(Published, component="generator")
LLAMAGEN_VQ = tokenizer(
    "llamagen-vq16-c2i", "vq", parameters=71883403, num_tokens=256, vocab_size=16384, code_dim=8, licence=MIT,
    repository="FoundationVision/LlamaGen", file="vq_ds16_c2i.pt", golden="llamagen_vq16_full",
    manifest="llamagen_vq-16",
)  # fmt: skip
MASKBIT = tokenizer(
    "maskbit-12bit", "vqgan-plus", parameters=54479247, num_tokens=256, vocab_size=4096, code_dim=12, licence=APACHE,
    repository="markweber/maskbit_tokenizer_12bit", file="maskbit_tokenizer_12bit.bin",
    sha256="3dde024443d68a10295a518d9e851f61e0527c85f1197aa41405237153182170",
)  # fmt: skip
TITOK = tokenizer(
    "titok-l32", "titok", parameters=641054735, num_tokens=32, vocab_size=4096, code_dim=12, licence=APACHE,
    repository="yucornetto/tokenizer_titok_l32_imagenet", file="model.safetensors", golden="titok_tiny_legacy",
    manifest="tokenizer_titok_l32",
)  # fmt: skip
TITOK_VQ = replace(TITOK, vocab_size=8192, code_dim=64, golden="titok_tiny_nolegacy")
REAR = generator(
    "rear-b", "rear", parameters=260923648, num_tokens=256, vocab_size=1024, licence=APACHE, repository="qyoo/reAR",
    file="reAR-B.safetensors", tokenizer="hf:maskgit-vq", golden="rear", manifest="rear_b",
)  # fmt: skip
RAR = generator(
    "rar-b", "rear", parameters=260923648, num_tokens=256, vocab_size=1024, licence=APACHE,
    repository="yucornetto/RAR", file="rar_b.bin", tokenizer="hf:maskgit-vq", golden="rar", manifest="rar_b",
    sha256="cbbf4b27dc36afae77fdb2fe0d6b9b5b7446eae45f1a9f91d442ab0b315b9ebf",
)  # fmt: skip
LLAMAGEN = generator(
    "llamagen-c2i-b-256", "llamagen", parameters=110888448, num_tokens=256, vocab_size=16384, licence=MIT,
    repository="FoundationVision/LlamaGen", file="c2i_B_256.pt", image_size=256, tokenizer="hf:llamagen-vq16-c2i",
    golden="llamagen_gpt_c2i", manifest="llamagen_gpt-b_c2i_256",
)  # fmt: skip
LLAMAGEN_384 = replace(LLAMAGEN, num_tokens=576, image_size=384, tokenizer="hf:llamagen-vq16-c2i@384")
LLAMAGEN_TEXT = replace(
    LLAMAGEN, name="llamagen-t2i-xl-256", parameters=777678080, repository="peizesun/llamagen_t2i",
    file="t2i_XL_stage1_256.pt", tokenizer="hf:llamagen-vq16-t2i", golden="llamagen_gpt_t2i",
    manifest="llamagen_gpt-xl_t2i_256",
)  # fmt: skip
ALITOK = generator(
    "alitok-b", "alitok-ar", parameters=177048064, num_tokens=273, vocab_size=4096, licence="not stated",
    elsewhere=GOOGLE_DRIVE, file="alitok_b.bin", golden="alitok_ar", manifest="alitok_ar_b",
)  # fmt: skip
JANUS = generator(
    "janus-pro-1b", "janus", parameters=1485053952, num_tokens=576, vocab_size=16384, licence=MIT,
    repository="deepseek-ai/Janus-Pro-1B", file="pytorch_model.bin", words="tokenizer.json", golden="janus_gen_parts",
)  # fmt: skip

TOKENIZERS = (
    LLAMAGEN_VQ,
    replace(LLAMAGEN_VQ, name="llamagen-vq8-c2i", parameters=70109835, num_tokens=1024, file="vq_ds8_c2i.pt",
            golden="llamagen_vq_tiny16", manifest="llamagen_vq-8"),
    replace(LLAMAGEN_VQ, name="llamagen-vq16-t2i", repository="peizesun/llamagen_t2i", file="vq_ds16_t2i.pt"),
    tokenizer("maskgit-vq", "maskgit-vq", parameters=54515587, num_tokens=256, vocab_size=1024, code_dim=256,
              licence=APACHE, repository="fun-research/TiTok", file="maskgit-vqgan-imagenet-f16-256.bin",
              golden="maskgit_vq_full", manifest="maskgit_vqgan_f16_256"),
    tokenizer("vqgan-plus-12bit", "vqgan-plus", parameters=55007683, num_tokens=256, vocab_size=4096, code_dim=64,
              licence=APACHE, repository="markweber/vqgan_plus_12bit", file="vqgan_plus_12bit.bin",
              golden="vqplus_tiny", manifest="vqplus"),
    MASKBIT,
    replace(MASKBIT, name="maskbit-14bit", parameters=54489489, vocab_size=2**14, code_dim=14,
            repository="markweber/maskbit_tokenizer_14bit", file="maskbit_tokenizer_14bit.bin",
            sha256="ca9209fbd55ec467c7151b1f863b99ba2675a5229f6f86f27cfe79152671f310"),
    replace(MASKBIT, name="maskbit-16bit", parameters=54499731, vocab_size=2**16, code_dim=16,
            repository="markweber/maskbit_tokenizer_16bit", file="maskbit_tokenizer_16bit.bin",
            sha256="44e3ff7c3bf15eda4e1e25586ff8f657be9291d5e2bf3b755505394e11765b06"),
    replace(MASKBIT, name="maskbit-18bit", parameters=54509973, vocab_size=2**18, code_dim=18,
            repository="markweber/maskbit_tokenizer_18bit", file="maskbit_tokenizer_18bit.bin",
            sha256="6c672c2508e14c4d7cd8621c1cb8939610478632725bb26521cf3c4bb6fc3f78"),
    TITOK,
    replace(TITOK, name="titok-b64", parameters=204814095, num_tokens=64,
            repository="yucornetto/tokenizer_titok_b64_imagenet", manifest="tokenizer_titok_b64"),
    replace(TITOK, name="titok-s128", parameters=83674639, num_tokens=128,
            repository="yucornetto/tokenizer_titok_s128_imagenet", manifest="tokenizer_titok_s128"),
    replace(TITOK_VQ, name="titok-bl64", parameters=390016148, num_tokens=64,
            repository="yucornetto/tokenizer_titok_bl64_vq8k_imagenet", manifest="tokenizer_titok_bl64_vq8k"),
    replace(TITOK_VQ, name="titok-bl128", parameters=390179988, num_tokens=128,
            repository="yucornetto/tokenizer_titok_bl128_vq8k_imagenet", manifest="tokenizer_titok_bl128_vq8k"),
    replace(TITOK_VQ, name="titok-sl256", parameters=330260884, num_tokens=256,
            repository="yucornetto/tokenizer_titok_sl256_vq8k_imagenet", manifest="tokenizer_titok_sl256_vq8k"),
    tokenizer("alitok", "alitok", parameters=389899308, num_tokens=273, vocab_size=4096, code_dim=32,
              licence="not stated", elsewhere=GOOGLE_DRIVE, file="AliTok.pth", golden="alitok_tokenizer",
              manifest="alitok_tokenizer"),
    tokenizer("janus-pro-vq", "vq", parameters=71883403, num_tokens=576, vocab_size=16384, code_dim=8, licence=MIT,
              repository="deepseek-ai/Janus-Pro-1B", file="pytorch_model.bin", words="tokenizer.json",
              golden="janus_vq_tiny", manifest="janus_vq16"),
)  # fmt: skip
GENERATORS = (
    replace(REAR, name="rear-s", parameters=218397184, file="reAR-S.safetensors", manifest="rear_s"),
    REAR,
    replace(REAR, name="rear-l", parameters=461668352, file="reAR-L.safetensors", manifest="rear_l"),
    RAR,
    replace(RAR, name="rar-l", parameters=461668352, file="rar_l.bin", manifest="rar_l",
            sha256="edad8e9905e20a5df14eeee0d5d04c1be48b16a7751b4b3f4954a6dec8ad87d5"),
    replace(RAR, name="rar-xl", parameters=955425024, file="rar_xl.bin", manifest="rar_xl",
            sha256="7b4cec5c76f18dc7a3ea055a6b0cc4c5748c533768eed71564a88d897c762bc8"),
    replace(RAR, name="rar-xxl", parameters=1498520704, file="rar_xxl.bin", manifest="rar_xxl",
            sha256="85aba44fef7aecfd879829077e541f09da4c29da3b1fd374837601d7322bf6ff"),
    LLAMAGEN,
    replace(LLAMAGEN_384, name="llamagen-c2i-b-384", file="c2i_B_384.pt", manifest="llamagen_gpt-b_c2i_384"),
    replace(LLAMAGEN, name="llamagen-c2i-l-256", parameters=342910976, file="c2i_L_256.pt",
            manifest="llamagen_gpt-l_c2i_256"),
    replace(LLAMAGEN_384, name="llamagen-c2i-l-384", parameters=342910976, file="c2i_L_384.pt",
            manifest="llamagen_gpt-l_c2i_384"),
    replace(LLAMAGEN_384, name="llamagen-c2i-xl-384", parameters=774699520, file="c2i_XL_384.pt",
            manifest="llamagen_gpt-xl_c2i_384"),
    replace(LLAMAGEN_384, name="llamagen-c2i-xxl-384", parameters=1410972672, file="c2i_XXL_384.pt",
            manifest="llamagen_gpt-xxl_c2i_384"),
    replace(LLAMAGEN_384, name="llamagen-c2i-3b-384", parameters=3096659200, file="c2i_3B_384.pt",
            manifest="llamagen_gpt-3b_c2i_384"),
    LLAMAGEN_TEXT,
    replace(LLAMAGEN_TEXT, name="llamagen-t2i-xl-512", num_tokens=1024, image_size=512, file="t2i_XL_stage2_512.pt",
            tokenizer="hf:llamagen-vq16-t2i@512", manifest="llamagen_gpt-xl_t2i_512"),
    ALITOK,
    replace(ALITOK, name="alitok-l", parameters=317851648, file="alitok_l.bin", manifest="alitok_ar_l"),
    replace(ALITOK, name="alitok-xl", parameters=662141696, file="alitok_xl.bin", manifest="alitok_ar_xl"),
    JANUS,
    replace(JANUS, name="janus-pro-7b", parameters=6591791104, repository="deepseek-ai/Janus-Pro-7B",
            file="pytorch_model.bin.index.json"),
)  # fmt: skip
PUBLISHED = {model.name: model for model in (*TOKENIZERS, *GENERATORS)}


@dataclass(frozen=True)
class Wanted:
    """What an `hf:` name stands for."""

    text: str
    file: str
    repository: str | None
    image_size: int | None
    published: Published | None = None

    @property
    def place(self) -> Path:
        """Where the released file may be put by hand."""
        folder = self.repository or (self.published.name if self.published else "")
        return cache_dir() / "released" / folder / self.file

    @property
    def converted(self) -> Path:
        name = f"{self.repository}/{self.file}" if self.repository or not self.published else self.published.name
        size = f"@{self.image_size}" if self.image_size else ""
        return cache_dir() / "converted" / f"{name.replace('/', '--')}{size}"


def read_name(text: str) -> Wanted:
    """What an `hf:` name stands for; `UserError` for a name that is neither published nor owner/repository/file."""
    rest, _, size = text.removeprefix(PREFIX).partition("@")
    if size and not re.fullmatch(r"[1-9]\d*", size):
        raise UserError(f"{text}: {size!r} behind @ is not an image size in pixels")
    known = PUBLISHED | {f"{model.repository}/{model.file}": model for model in PUBLISHED.values() if model.repository}
    if model := known.get(rest):
        return Wanted(text, model.file, model.repository, int(size) if size else model.image_size, model)
    parts = rest.split("/")
    # Plain names only: what stands here becomes a path below the cache folder.
    if len(parts) < 3 or not all(map(plain_name, parts)):
        raise unknown("hf: name", rest, [*PUBLISHED, "owner/repository/file"])
    return Wanted(text, "/".join(parts[2:]), "/".join(parts[:2]), int(size) if size else None)


def released_file(wanted: Wanted) -> Path:
    """The released file: put there by hand, or downloaded, with its words and the shards of an index beside it.
    `NotHere` says where to put one that cannot be had."""
    if wanted.place.is_file():
        return wanted.place
    if wanted.repository is None:
        where = wanted.published and wanted.published.elsewhere
        raise NotHere(f"{wanted.text}: not on the hub ({where}); put {wanted.file} at {wanted.place}")
    asked = wanted.file
    try:
        file = Path(download(wanted.repository, asked))
        shards = sorted(set(read_index(file).values())) if asked.endswith(".index.json") else []
        words = wanted.published and wanted.published.words
        for name in [*shards, words] if words else shards:
            asked = str(Path(wanted.file).with_name(name))
            download(wanted.repository, asked)
    except UserError:
        raise
    # No network, no such file, no permission, offline mode, a proxy's page: each library below has errors of its own.
    except Exception as error:
        cause = shorten(str(error), 240, placeholder=" ...") or type(error).__name__
        raise NotHere(
            f"{wanted.text}: cannot download {asked} of https://huggingface.co/{wanted.repository} ({cause}); "
            f"get it elsewhere and put it at {wanted.place.with_name(Path(asked).name)}"
        ) from error
    return file


def released_weights(repository: str, file: str) -> Path:
    """`file` of OWNER/NAME, or where it is published in shards, their index, beside which they are."""
    whole, index = (read_name(f"{PREFIX}{repository}/{name}") for name in (file, f"{file}.index.json"))
    try:
        return released_file(whole)
    except UserError:
        try:
            there = index.place.is_file() or download(repository, index.file)
        except Exception:  # as above
            there = ""
        if not there:
            raise
    return released_file(index)


def download(repository: str, file: str) -> str:
    """The path of a hub file on this machine; the only place that touches the network."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    told = logging.getLogger("huggingface_hub")  # of every attempt that failed; the last one is an error
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        try:
            get_hf_file_metadata(hf_hub_url(repository, file))
        except HfHubHTTPError:
            pass  # the hub answers; whether to ask again is for what follows to say
        except Exception:  # it is out of reach, where what follows would ask again for half a minute or more
            if isinstance(kept := try_to_load_from_cache(repository, file), str):
                return kept
            raise
        return hf_hub_download(repo_id=repository, filename=file)
    finally:
        told.setLevel(level)


def read_index(index: Path) -> dict[str, str]:
    """Which file beside it holds a key, for every key, of an index of shards."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: not an index of shards (a JSON object with weight_map)")
    return {key: beside(index, name) for key, name in places.items()}
