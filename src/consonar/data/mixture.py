"""Several token stores as one: `A,B` names two."""

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consonar.data.tokens import TokenStore
from consonar.errors import UserError
from consonar.files.readers import home_expanded
from consonar.origin import MEANING, Origin, check
from consonar.types import Tokenizer


def store_paths(words: str) -> list[str]:
    """The paths that `A,B` names; a folder that is called so is one."""
    return [words] if home_expanded(words).exists() else [word.strip() for word in words.split(",")]


class TokenStores:
    """The items of all, one store after the other, with the methods of a `TokenStore`.

    Raises `UserError`, which names both, for two stores of other tokenizers, classes or numbers of tokens.
    """

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        self.stores, first = stores, stores[0]
        for store in stores[1:]:
            where, remedy = f"data.tokens: {store.path}", "tokenize all with one tokenizer and one list of classes"
            check(where, store.origin, first.origin, str(first.path), remedy, MEANING)
            for key in ("num_tokens", "vocab_size"):
                if (ours := getattr(store, key)) != (theirs := getattr(first, key)):
                    raise UserError(f"{where}: {key} is {ours}, in {first.path} it is {theirs}; {remedy}")
            if bool(store.num_classes) != bool(first.num_classes):
                bare, other = (first, store) if store.num_classes else (store, first)
                raise UserError(f"data.tokens: {bare.path} has no classes, and {other.path} has; {remedy}")
        self.path = Path(",".join(str(store.path) for store in stores))
        self.fingerprint, self.vocab_size, self.num_tokens = first.fingerprint, first.vocab_size, first.num_tokens
        self.num_classes, self.class_names = max(store.num_classes for store in stores), first.class_names
        self.num_views = math.lcm(*(store.num_views for store in stores))
        """A view that is drawn among so many is drawn evenly among those of each store."""
        self.sizes = [len(store) for store in stores]
        self.first_rows = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def read(self, rows: Tensor, views: Tensor) -> Tensor:
        """Tokens (B, N) of items `rows` (B,) in views (B,) below `num_views`, all int64."""
        tokens = torch.empty(len(rows), self.num_tokens, dtype=torch.int64)
        owner = np.searchsorted(self.first_rows, rows.numpy(), side="right") - 1
        for index in np.unique(owner):
            store, of_it = self.stores[index], torch.from_numpy(owner == index)
            tokens[of_it] = store.read(rows[of_it] - int(self.first_rows[index]), views[of_it] % store.num_views)
        return tokens

    @cached_property
    def labels(self) -> Tensor:
        """(len,) int64, see `TokenStore.labels`."""
        return torch.cat([store.labels for store in self.stores])

    @property
    def captions(self) -> list[str | None]:
        """Of all items."""
        return [caption for store in self.stores for caption in store.captions]

    @property
    def origin(self) -> Origin:
        """What they have in common, and the hash of all."""
        hashes = [store.origin.data_sha256 for store in self.stores]
        content = None if None in hashes else hashlib.sha256(" ".join(map(str, hashes)).encode()).hexdigest()
        pictures = {store.metadata.source_sha256 for store in self.stores}
        first = self.stores[0].origin
        return Origin(
            tokenizer=first.tokenizer, tokenizer_fingerprint=first.tokenizer_fingerprint, class_names=self.class_names,
            data=", ".join(store.source for store in self.stores), data_sha256=content,
            pictures_sha256=pictures.pop() if len(pictures) == 1 else None,
        )  # fmt: skip

    def describe(self) -> str:
        return "; ".join(f"{store.name}: {store.describe()}" for store in self.stores)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """`UserError` unless this tokenizer made them."""
        self.stores[0].check_tokenizer(tokenizer)


def as_one(stores: Sequence[TokenStore]) -> TokenStore | TokenStores:
    """The stores as one; of one itself."""
    return stores[0] if len(stores) == 1 else TokenStores(stores)
