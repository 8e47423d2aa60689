"""What the VQ tokenizer's options mean; the official values are in `golden_vq.py`."""

import torch
from fill import GOLDENS
from golden import Golden
from golden_vq import filled
from torch.nn import functional as F


def test_codes_are_on_the_sphere_only_with_l2_normalize():
    normalised, raw = (filled(Golden(name, GOLDENS)) for name in ("llamagen_vq_tiny16", "llamagen_vq_tiny8_nol2"))
    torch.testing.assert_close(normalised.codebook.norm(dim=1), torch.ones(60))
    weight = raw.quantize.embedding.weight
    assert torch.equal(raw.codebook, weight)
    torch.testing.assert_close(F.normalize(weight, dim=1).norm(dim=1), torch.ones(60))
    assert not torch.isclose(weight.norm(dim=1), torch.ones(60)).all()


@torch.inference_mode()
def test_the_margin_excuses_few_indices():
    """The goldens let an index differ where best and second best are close: that must be the exception."""
    for name in ("llamagen_vq_tiny16", "llamagen_vq_tiny8_nol2", "llamagen_vq16_full"):
        assert (Golden(name, GOLDENS).arrays["index_margin"] > 1e-4).mean() > 0.9
