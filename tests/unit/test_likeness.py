"""Captions and pictures by CLIP: what transformers computes, each caption read once, one line for what is missing."""

import pytest
import torch
import transformers
from conftest import save_clip
from torch.nn import functional

from consonar.errors import UserError
from consonar.networks.likeness import CaptionLikeness
from consonar.training.rewards import check_rewards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_clip(place, ["a", "dog", "cat", "red"])
    return place


def test_it_is_the_cosine_that_transformers_finds(folder, rng):
    images = torch.rand(3, 3, 32, 32, generator=rng) * 2 - 1
    captions = ["a dog", "a red cat", "a dog " * 9]
    likeness = CaptionLikeness(str(folder), "objective.clip", torch.device("cpu"))
    with pytest.warns(UserWarning, match="objective.clip: reads 8 tokens, and no more of 'a dog a") as said:
        found = likeness(images, captions)
        likeness(images, ["a dog", "a red cat", "a cat " * 9])
    assert len(said) == 1
    network = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(captions, padding=True, truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        both = network(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"],
            pixel_values=likeness.pictures.pixels(images),
        )  # fmt: skip
    assert torch.allclose(found, functional.cosine_similarity(both.image_embeds, both.text_embeds), atol=1e-5)
    assert found.std() > 0 and likeness.embedding.cache_info().misses == 4
    assert torch.equal(likeness(images, captions), found) and likeness.embedding.cache_info().misses == 4


def test_what_is_missing_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"objective.clip: no folder .*nowhere; choices: a folder, OWNER/NAME"):
        CaptionLikeness(str(tmp_path / "nowhere"), "objective.clip", torch.device("cpu"))
    with pytest.raises(UserError, match=r"objective.rewards: 'hpsv2' needs --objective.hpsv2"):
        check_rewards({"hpsv2": 1.0}, {"clip": "x", "hpsv2": None})
