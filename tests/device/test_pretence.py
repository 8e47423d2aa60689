"""The pretended device itself: it computes like the CPU, and refuses what CUDA refuses."""

from __future__ import annotations

import copy
from io import BytesIO

import pytest
import torch
from torch import nn

from consonar.seeding import generator


def test_it_computes_what_the_cpu_computes(cuda) -> None:
    rng = generator(0, "net")
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(32, 4))
    x = torch.rand(2, 3, 4, 4, generator=rng)
    moved = copy.deepcopy(net).to("cuda")
    assert {p.device.type for p in moved.parameters()} == {"cuda"} and all(p.is_leaf for p in moved.parameters())
    losses = []
    for model, images in ((net, x), (moved, x.to("cuda"))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 3], device=images.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    stored = BytesIO()
    torch.save(moved.state_dict(), stored)
    stored.seek(0)
    torch.testing.assert_close(torch.load(stored)["0.weight"], net[0].weight.data)


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_made_like_it_is_on_the_device(cuda, inference) -> None:
    with torch.inference_mode(inference):
        like = torch.zeros(2, 3).cuda()
        made = [torch.ones(2).to(like), like.new_zeros(2), torch.empty_like(like), torch.arange(2, device=like.device)]
        assert all(tensor.is_cuda and tensor.device == torch.device("cuda", 0) for tensor in made)
        assert not like.cpu().is_cuda and not like.to("cpu", torch.float64).is_cuda


def test_autocast_reaches_it(cuda) -> None:
    x = torch.rand(4, 4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrong",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: here[there.long().cuda()],
        lambda here, there: nn.functional.embedding(here.long(), there[:, None]),
        lambda here, there: there @ here,
        lambda here, there: there.numpy(),
        lambda here, there: there.long() @ there.long(),
        lambda here, there: there.uniform_(generator=generator(0, "x")),
        lambda here, there: torch.rand(3, device="cuda", generator=generator(0, "x")),
        lambda here, there: here.uniform_(generator=generator(0, "x", device="cuda")),
        lambda here, there: there.index_put_((there.long(),), here),
    ],
)
def test_it_refuses_what_cuda_refuses(cuda, wrong) -> None:
    here = torch.zeros(3)
    there = torch.zeros(3).cuda()
    with pytest.raises((RuntimeError, TypeError)):
        wrong(here, there)
    with torch.inference_mode(), pytest.raises((RuntimeError, TypeError)):
        wrong(torch.zeros(3), torch.zeros(3).cuda())


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).to("cuda"),
        lambda x: torch.ones(3).copy_(x),
        lambda x: float(x.sum()),
        lambda x: x.long().repeat_interleave(x.long()),
    ],
)
def test_it_counts_waits(cuda, waiting) -> None:
    x = torch.ones(3, device="cuda")
    cuda.clear()
    (x + 1).relu().view(3, 1).sum(0)
    torch.ones(3).to("cuda", non_blocking=True)
    assert sum(cuda.waits.values()) == 0 and sum(cuda.copies.values()) == 1
    waiting(x)
    assert sum(cuda.waits.values()) == 1


def test_after_it_there_is_no_device() -> None:
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != "a pretended device"
    assert torch.zeros(3).to(torch.float64).device.type == "cpu" and torch.Generator is torch._C.Generator
