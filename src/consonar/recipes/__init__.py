"""Recipes, functions that return a complete `TrainConfig`, and configurations in files, YAML or JSON of its shape.

Variants use `dataclasses.replace`. Files are read strictly: unknown keys and wrong types are refused with the key's
path. A file may name a recipe with `base:` and give only what differs.
"""

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from types import FunctionType, ModuleType

import yaml

from consonar.config_io import from_dict, merge, to_dict
from consonar.errors import UserError, check_choice, reading
from consonar.files.readers import check_extent
from consonar.json_types import Json
from consonar.options import started_from
from consonar.recipes import cifar10, openmoji, published, scenes
from consonar.training.config import TrainConfig


def recipes_of(module: ModuleType) -> dict[str, Callable[[], TrainConfig]]:
    """The functions of a module by the names of their recipes, `rear-b` for `rear_b`."""
    own = [
        item for item in vars(module).values() if isinstance(item, FunctionType) and item.__module__ == module.__name__
    ]
    return {function.__name__.replace("_", "-"): function for function in own}


RECIPES = recipes_of(openmoji) | recipes_of(cifar10) | recipes_of(scenes) | recipes_of(published)


def find_recipe(name: str) -> TrainConfig:
    """The recipe called `name`; `UserError` lists the choices."""
    check_choice("recipe", name, RECIPES)
    return RECIPES[name]()


class ConfigLoader(yaml.SafeLoader):
    """Numbers as in JSON: 1e-4 is one, which YAML 1.1 takes for text, and 010 and 1:30 are none, which it takes for 8
    and 90. A key that a table has twice is refused.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key.value in [before.value for before in keys[:index]]:
                message = f"{key.value} is given twice in one table; keep one"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
        return super().construct_mapping(node, deep)


INTEGER, FLOAT, FIRST = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", list("-+0123456789")
ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != INTEGER]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
ConfigLoader.add_implicit_resolver(INTEGER, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), FIRST)
ConfigLoader.add_implicit_resolver(FLOAT, re.compile(r"[-+]?\d+[eE][-+]?\d+"), FIRST)


def read_table(path: Path) -> Json:
    """The table of keys that a YAML or JSON file holds."""
    with reading(path, "valid YAML"):
        values = yaml.load(path.read_text(encoding="utf-8"), ConfigLoader)
        check_extent(values)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a table of keys, got {type(values).__name__}")
    return values


def read_config(path: Path) -> TrainConfig:
    """A YAML or JSON file of a `TrainConfig`, of the changes to the recipe named under `base`, or the result of a cell
    of a sweep, whose training it records."""
    values = read_table(path)
    if isinstance(asked := values.get("asked"), dict) and isinstance(asked.get("config"), dict):
        values = asked["config"]
    if "base" not in values:
        return from_dict(values, str(path), TrainConfig)
    base = values.pop("base")
    if not isinstance(base, str):
        raise UserError(f"{path}: base: expected the name of a recipe, got {base!r}")
    check_choice(f"{path}: base: recipe", base, RECIPES)
    recipe = find_recipe(base)
    with started_from(recipe):
        return from_dict(merge(to_dict(recipe), {"recipe": path.stem, **values}), str(path), TrainConfig)
