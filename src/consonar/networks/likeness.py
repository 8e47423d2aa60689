"""How well a caption fits a picture, by a CLIP that transformers reads (extra `text`), trained as released or on
preferences of people: PickScore, and HPSv2 (arXiv 2306.09341) once its checkpoint of open_clip is converted."""

import importlib
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from consonar.errors import UserError, needs, reading
from consonar.files.readers import read_json
from consonar.networks.released import WEIGHTS, find_folder, read_network
from consonar.networks.vision_transformers import load_vision_transformer


class CaptionLikeness:
    """Cosine of a picture's and its caption's embedding, from a folder as transformers saves it, or OWNER/NAME.

    The pictures go the way of `vision_transformers`; captions are cut at the tokens that the network has places for (77
    as released), and the first such is warned of. `UserError`, about `key`, where files are missing or of another
    network.
    """

    def __init__(self, place: str, key: str, device: torch.device) -> None:
        self.folder = find_folder(place, key, ("config.json", WEIGHTS, "tokenizer.json"))
        if not (self.folder / "tokenizer.json").is_file():
            raise UserError(f"{key}: {self.folder} has no tokenizer.json; save its tokenizer there with transformers")
        self.pictures = load_vision_transformer(f"clip:{self.folder}", str(device))
        config = read_json(self.folder / "config.json")
        given = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
        self.words = read_network("CLIPTextModelWithProjection", self.folder, key, **given).to(device)
        with needs(key, "text"), reading(f"{key}: {self.folder}", "a tokenizer that transformers saved"):
            auto = importlib.import_module("transformers").AutoTokenizer
            self.tokenizer = auto.from_pretrained(self.folder, local_files_only=True)
        self.key, self.warned = key, False
        self.embedding = lru_cache(maxsize=50_000)(self.embed)

    @torch.inference_mode()
    def embed(self, caption: str) -> Tensor:
        """(F,) of length 1."""
        most = self.words.config.max_position_embeddings
        if not self.warned and len(self.tokenizer(caption, truncation=True, max_length=most + 1)["input_ids"]) > most:
            self.warned = True
            warnings.warn(f"{self.key}: reads {most} tokens, and no more of {caption[:60]!r}", stacklevel=2)
        given = self.tokenizer(caption, truncation=True, max_length=most, return_tensors="pt").to(self.words.device)
        found = self.words(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).text_embeds[0]
        return functional.normalize(found.float(), dim=0)

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """(B,) from -1 to 1 <- images (B, 3, H, W) in [-1, 1], clamped, and a caption for each."""
        embeddings = torch.stack([self.embedding(caption) for caption in captions])
        return functional.cosine_similarity(self.pictures(images.clamp(-1, 1)), embeddings, dim=1)
