"""Names that could mean two things: classes that differ in case alone, numbers, folders called as what is shipped."""

import json
from pathlib import Path

import pytest

from consonar.cli.sample import class_list
from consonar.components import load_generator, load_tokenizer, save_generator, save_tokenizer
from consonar.errors import UserError
from consonar.origin import Origin


@pytest.mark.parametrize(("word", "label"), [("Cat", 0), ("cat", 1), ("DOG", 2), ("Cat,cat", [0, 1])])
def test_a_class_is_found_by_its_exact_name_first(word, label):
    expected = label if isinstance(label, list) else [label]
    assert class_list(word, None, 3, ("Cat", "cat", "Dog")).tolist() == expected


def test_a_class_name_in_a_case_that_fits_two_is_refused():
    with pytest.raises(UserError, match="--classes: unknown 'CAT'"):
        class_list("CAT", None, 3, ("Cat", "cat", "Dog"))


def test_a_number_that_is_an_id_and_the_name_of_another_class_is_said_to_be_the_id(capsys):
    assert class_list("2", None, 5, ("0", "1", "10", "11", "2")).tolist() == [2]
    assert "2 is the id of '10' here; the class '2' has the id 4" in capsys.readouterr().out
    assert class_list("0", None, 5, ("0", "1", "10", "11", "2")).tolist() == [0]
    assert capsys.readouterr().out == ""


def test_a_path_is_a_folder_though_something_shipped_has_its_name(tiny_generator, tokenizer, tmp_path, monkeypatch):
    """`consonar evaluate ./openmoji` measured the shipped generator and wrote the results into the user's run."""
    monkeypatch.chdir(tmp_path)
    generator = tiny_generator()
    save_generator(generator, Path("openmoji"), Origin())
    save_tokenizer(tokenizer, Path("openmoji-64"))
    assert load_generator(Path("./openmoji")).num_tokens == generator.num_tokens
    assert load_tokenizer(Path("./openmoji-64")).fingerprint == tokenizer.fingerprint
    assert load_generator("openmoji").num_tokens != generator.num_tokens


@pytest.mark.parametrize("names", [["a", "b", "c", "d"], ["a", "a", "b"], ["caf\u00e9", "cafe\u0301", "b"]])
def test_class_names_that_no_generator_has_are_refused(names, tiny_generator, tmp_path):
    save_generator(tiny_generator(), tmp_path / "g", Origin(class_names=("a", "b", "c")))
    config = tmp_path / "g/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"class_names": names}))
    with pytest.raises(UserError, match=r"class_names are 4 for 3 classes|two classes are called"):
        load_generator(tmp_path / "g")


@pytest.mark.parametrize("name", [7, "", None, ["a"]])
def test_a_tokenizer_whose_name_is_no_text_is_refused_before_it_makes_anything(name, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "t")
    config = tmp_path / "t/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"name": name}))
    with pytest.raises(UserError, match=r"config\.json: name is"):
        load_tokenizer(tmp_path / "t")
