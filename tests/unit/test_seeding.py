import torch

from consonar.seeding import derive_seed, generator


def test_seeds_are_the_same_on_every_machine():
    """SHA-256 of "0/noise/7", first 63 bits."""
    assert derive_seed(0, "noise", 7) == 4578217800377160657


def test_every_part_counts():
    seeds = {
        derive_seed(0, "noise", 7), derive_seed(1, "noise", 7), derive_seed(0, "init", 7), derive_seed(0, "noise", 8),
        derive_seed(0, "noise"), derive_seed(0),
    }  # fmt: skip
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_independent_of_each_other_and_of_the_global_one():
    torch.manual_seed(1)
    first = torch.rand(3, generator=generator(0, "a"))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(torch.rand(3, generator=generator(0, "a")), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(torch.rand(3, generator=generator(0, "b")), first)
