"""What the cells of a sweep need is looked for before there is work to lose."""

import itertools

from consonar.components import load_tokenizer
from consonar.distributed import pick_device
from consonar.errors import begins
from consonar.evaluation.inputs import open_reference
from consonar.networks import load_feature_network
from consonar.sweeps.contents import NETWORK, REFERENCE, tokenizer_of
from consonar.sweeps.plan import Cell
from consonar.training.build import open_store


def check_inputs(cells: list[Cell], where: str) -> None:
    """Raises `UserError` for what the cells of the file `where` need and what is not there: token stores, models,
    references, networks."""
    generators = [(cell.config.data, tokenizer_of(cell)) for cell in cells if cell.config.run == "generator"]
    for tokens, views, tokenizer in {(data.tokens, data.views, tokenizer) for data, tokenizer in generators}:
        with begins(f"{where}: "):
            open_store(tokens, "data.tokens", tokenizer, views)
    references = {(one.reference, one.settings.validation_split) for one in (cell.evaluated for cell in cells)}
    for (reference, split), tokenizer in itertools.product(references, set(map(tokenizer_of, cells))):
        image_size = load_tokenizer(tokenizer).image_size
        with begins(f"{where}: {REFERENCE}: "):
            open_reference(reference, image_size, validation_split=split)
    for network, device in {(cell.evaluated.feature_network, cell.config.loop.device) for cell in cells}:
        chosen = str(pick_device(device, "loop.device"))
        with begins(f"{where}: {NETWORK}: ", instead_of="feature_network: "):
            load_feature_network(network, chosen)
