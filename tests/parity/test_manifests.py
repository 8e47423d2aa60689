"""The converter against the key lists of every released model: recognised by one record alone, every key placed, and
the number of parameters that was stated.

The manifests hold no weights, so this runs on meta tensors.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from fill import GOLDENS

from consonar.convert import examine
from consonar.convert.layouts import OFFICIALS
from consonar.convert.layouts.official import State
from consonar.errors import UserError
from consonar.generators.rear import REAR_PRESETS

FOLDER = GOLDENS / "manifests"
# Networks that judge images: they have loaders of their own (test_lpips.py, test_inception.py).
NOT_CONVERTED = {"lpips_vgg_v0.1", "torchvision_vgg16", "pt_inception-2015-12-05"}
# Lists of the generation parts alone; no such file was released.
PARTS = {"janus_pro_1b_gen", "janus_pro_7b_gen"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
WHOLE = [name for name in NAMES if name not in NOT_CONVERTED | PARTS]


def manifest(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def released(name: str) -> State:
    """The state dict of the manifest, without memory."""
    return {key: torch.empty(shape, device="meta") for key, shape in manifest(name)["state_dict"].items()}


def count(state: State) -> int:
    return sum(value.numel() for value in state.values())


def test_every_released_model_is_listed():
    assert set(NAMES) >= NOT_CONVERTED | PARTS and len(WHOLE) >= 34


@pytest.mark.parametrize("name", WHOLE)
def test_the_converter_takes_exactly_these_keys(name):
    state, listed = released(name), manifest(name)
    found = examine(state, name)
    ours, unused = found.official.to_ours(state, found.config)
    assert {key: value.shape for key, value in found.module.state_dict().items()} == {
        k: v.shape for k, v in ours.items()
    }
    back = found.official.to_official(ours, unused, found.config)
    assert {key: list(value.shape) for key, value in back.items()} == listed["state_dict"]
    assert count(ours) + count(unused) == listed["total_state_dict_elements"]
    buffers = {key: state[key] for key in listed["buffers_in_state_dict"]}
    parameters = sum(parameter.numel() for parameter in found.module.parameters())
    not_ours = count({key: value for key, value in unused.items() if key not in buffers})
    assert parameters + not_ours == listed["total_parameters"] == count(state) - count(buffers)


@pytest.mark.parametrize("name", WHOLE)
def test_one_record_alone_recognises_it(name):
    shapes = {key: tuple(shape) for key, shape in manifest(name)["state_dict"].items()}
    assert sum(official.recognises(shapes) for official in OFFICIALS) == 1


@pytest.mark.parametrize("name", sorted(NOT_CONVERTED))
def test_networks_that_judge_images_are_not_taken_for_models(name):
    with pytest.raises(UserError, match="not a released model that is known here"):
        examine(released(name), name)


ONE_OF_EACH = (
    "llamagen_vq-16", "maskgit_vqgan_f16_256", "vqplus", "tokenizer_titok_b64", "tokenizer_titok_bl64_vq8k",
    "alitok_tokenizer", "rear_s", "rar_b", "llamagen_gpt-b_c2i_256", "llamagen_gpt-xl_t2i_256", "alitok_ar_b",
)  # fmt: skip


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_key_more_or_less_or_of_another_shape_is_named(name):
    state = released(name)
    last = list(state)[-1]
    with pytest.raises(UserError, match=r"unknown surprise\.weight"):
        examine({**state, "surprise.weight": torch.empty(1, device="meta")}, name)
    # A training head that is not whole is unknown as a whole.
    with pytest.raises(UserError, match=rf"missing {re.escape(last)}|unknown decode_align_mlp|not a released model"):
        examine({key: value for key, value in state.items() if key != last}, name)
    middle = list(state)[len(state) // 2]
    with pytest.raises(UserError, match=re.escape(f"{middle} is (7, 7, 7), the model has")):
        examine({**state, middle: torch.empty(7, 7, 7, device="meta")}, name)


@pytest.mark.parametrize(("name", "preset"), [("rear_s", "S"), ("rear_b", "B"), ("rear_l", "L")])
def test_presets_are_the_released_shapes(name, preset):
    found = examine(released(name), name)
    assert found.config == replace(REAR_PRESETS[preset].sized(1024, 256, 1000), dropout=found.config.dropout)
