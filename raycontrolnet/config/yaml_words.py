"""Words of YAML files that YAML 1.1 reads as booleans: `mixed_precision: no` means the word."""

from __future__ import annotations

from typing import Any


class Word(str):
    """A boolean of YAML 1.1, as it was written: yes, on, true, no, off or false, without quotes."""

    __slots__ = ()

    @property
    def truth(self) -> bool:
        return self.lower() in ("yes", "on", "true")


def value_meant(value: Any, kind: Any) -> Any:
    """Return a `Word` as a boolean if `kind` is bool, else as a text; other values as they are."""
    if not isinstance(value, Word):
        return value
    return value.truth if kind is bool else str(value)


def load_yaml(text: str) -> Any:
    """Return the content of a YAML file as `yaml.safe_load` does, but with each boolean as a `Word`.

    Raises:
        yaml.YAMLError: if the text is not YAML, or has a key twice in a mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":  # which merges, also several times
                    line, name = key.start_mark.line + 1, (key.tag, key.value)
                    if before := lines.get(name):
                        where = f"in lines {before} and {line}" if line > before else f"in line {line}"
                        raise yaml.YAMLError(f"{key.value} is there twice, {where}; keep one")
                    lines[name] = line
            return node

    def read_bool(loader: Any, node: Any) -> str:
        word = str(loader.construct_scalar(node))
        return Word(word) if word.lower() in Loader.bool_values else word  # else as in `!!bool 3`

    Loader.add_constructor("tag:yaml.org,2002:bool", read_bool)
    return yaml.load(text, Loader)
