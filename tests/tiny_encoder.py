"""A text encoder for tests."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from consonar.data.scenes import COLOURS, NUMBERS, OBJECTS, RELATIONS, plural

WORDS = ["[PAD]", "[UNK]", "a", "an", "and", "of", *NUMBERS[1:], *COLOURS, *OBJECTS, *map(plural, OBJECTS)]


def save_encoder(folder: Path, seed: int = 0) -> None:
    """A tiny random BERT that knows the words of scenes."""
    torch.manual_seed(seed)
    vocabulary = list(dict.fromkeys([*WORDS, *" ".join(RELATIONS).split(), "small", "large"]))
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(**shape, vocab_size=len(vocabulary), max_position_embeddings=40)
    transformers.BertModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
