"""What is loaded is what was made: tokens as they were written, pictures from the tokenizer that a generator knows."""

import json

import pytest
from conftest import Pictures

import consonar
from consonar.components import save_generator
from consonar.data.store_format import METADATA_FILE, TOKENS_FILE
from consonar.data.tokenizing import write_token_store
from consonar.data.tokens import TokenStore
from consonar.errors import UserError
from consonar.origin import Origin
from consonar.tokenizers.vq import VQTokenizer
from consonar.training.build import open_store


@pytest.fixture
def store(tokenizer, tmp_path):
    return write_token_store(tmp_path / "s", Pictures(6), tokenizer)


@pytest.mark.parametrize("column", ["tokens", "label"])
def test_tokens_that_were_changed_on_disk_are_refused_before_training(column, store, tokenizer):
    assert len(open_store(str(store.path), "data.tokens", tokenizer.name)) == 6
    path, values = store.path / TOKENS_FILE, store.table.column(column).chunk(0)
    buffer = (values.flatten() if column == "tokens" else values).buffers()[1].to_pybytes()
    data = bytearray(path.read_bytes())
    place = data.find(buffer)
    data[place] = (data[place] + 1) % 2  # another token of the vocabulary, another class
    del store, values
    path.unlink()  # a mapped file must not change under those that still read it
    path.write_bytes(data)
    with pytest.raises(UserError, match="holds other items than were written"):
        open_store(str(path.parent), "data.tokens", tokenizer.name)


def test_a_store_without_a_hash_is_opened_and_one_with_no_text_for_it_is_refused(store, tokenizer):
    path = store.path / METADATA_FILE
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in stored.items() if key != "content_sha256"}))
    assert len(open_store(str(store.path), "data.tokens", tokenizer.name)) == 6
    path.write_text(json.dumps(stored | {"content_sha256": 5}))
    with pytest.raises(UserError, match="content_sha256: input should be a valid string, got 5"):
        TokenStore.open(store.path)


def test_sample_refuses_a_tokenizer_that_the_generator_was_not_trained_with(tiny_generator, tokenizer, tmp_path):
    made = Origin(tokenizer=tokenizer.name, tokenizer_fingerprint=tokenizer.fingerprint)
    save_generator(tiny_generator(), tmp_path / "g", made)
    generator = consonar.load_generator(tmp_path / "g")
    assert len(consonar.sample(generator, tokenizer, [0]).images) == 1
    other = VQTokenizer(tokenizer.config, name="other").eval()
    assert other.fingerprint != tokenizer.fingerprint
    with pytest.raises(UserError, match=r"the tokenizer is 'other'.* its codes mean something else"):
        consonar.sample(generator, other, [0])
