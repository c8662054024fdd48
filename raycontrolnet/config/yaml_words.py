"""Words of YAML files that YAML 1.1 reads as booleans: `mixed_precision: no` means the word."""

from __future__ import annotations

from typing import Any

_TRUTH = {"yes": True, "on": True, "no": False, "off": False}


class Word(str):
    """One of yes, on, no and off without quotes, as it was written: a text or a boolean, as the setting's type is."""

    __slots__ = ()

    @property
    def truth(self) -> bool:
        return _TRUTH[self.lower()]


def value_meant(value: Any, kind: Any) -> Any:
    """Return a `Word` as a boolean if `kind` is bool, else as a text; other values as they are."""
    if not isinstance(value, Word):
        return value
    return value.truth if kind is bool else str(value)


def load_yaml(text: str) -> Any:
    """Return the content of a YAML file as `yaml.safe_load` does, but with each such word as a `Word`.

    Raises:
        yaml.YAMLError: if the text is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def read_bool(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Word | bool:
        word = str(loader.construct_scalar(node))
        return Word(word) if word.lower() in _TRUTH else bool(loader.construct_yaml_bool(node))

    Loader.add_constructor("tag:yaml.org,2002:bool", read_bool)
    return yaml.load(text, Loader)
