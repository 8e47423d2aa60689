"""Codes read as what the tokenizer means by them: the bound embedding that reAR's article compares with (arXiv
2510.04450, Table 3, which gives no more than the name)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consonar.errors import UserError


class TiedEmbedding(nn.Embedding):
    """Rows for (B, n) ids. Of a code, 0 <= id < V, a projection of the tokenizer's embedding of it, (V, C), which is
    not trained and lies beside the weights; the `others` behind the codes are rows of its own."""

    codebook: Tensor

    def __init__(self, vocab_size: int, code_dim: int, others: int, width: int):
        super().__init__(others, width)
        self.register_buffer("codebook", torch.zeros(vocab_size, code_dim))
        self.projection = nn.Linear(code_dim, width)

    def tie(self, codebook: Tensor) -> None:
        """Takes the tokenizer's embeddings (V, C). `UserError` for those of another width."""
        if codebook.shape != self.codebook.shape:
            ours, theirs = self.codebook.shape[1], codebook.shape[1]
            raise UserError(
                f"model.tied_code_dim: {ours}, but the tokenizer's embeddings have {theirs}; set it to that"
            )
        self.codebook.copy_(codebook)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, n, D) <- (B, n)."""
        return F.embedding(ids, torch.cat([self.projection(self.codebook), self.weight]))


def embedding_of(vocab_size: int, others: int, width: int, code_dim: int = 0) -> nn.Embedding:
    """Rows for codes and `others` behind them, tied if `code_dim`, the width of the tokenizer's embeddings, is set."""
    return TiedEmbedding(vocab_size, code_dim, others, width) if code_dim else nn.Embedding(vocab_size + others, width)
