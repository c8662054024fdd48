"""The schema of KubeRay's RayCluster and RayJob, as strict JSON schema: what is not in it is an error.

kuberay_schema.json.gz holds `spec` of both, of KubeRay 1.7.0 (commit 59d663aeec13760646da3db9c1cf8cfe883e30b7). From a
checkout of another version, it is made anew by

    python tests/kuberay_schema.py CHECKOUT
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

FILE = Path(__file__).with_name("kuberay_schema.json.gz")
CRDS = "ray-operator/config/crd/bases/ray.io_{}.yaml"
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}
NOT_JSON_SCHEMA = ("default", "description", "example", "format", "nullable")
"""Keywords of OpenAPI that say nothing, or something else, in JSON schema; those with `x-kubernetes-` neither."""


def load(kind: str) -> dict[str, Any]:
    """Return the schema of an object of KubeRay's API version v1."""
    with gzip.open(FILE, "rt", encoding="utf-8") as file:
        spec = json.load(file)[kind]
    metadata = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    properties = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": metadata, "spec": spec}
    return {"type": "object", "required": list(properties), "properties": properties, "additionalProperties": False}


def strict(schema: Any, *, is_names: bool = False) -> Any:
    """Return an OpenAPI schema as JSON schema that refuses properties which it does not name.

    Args:
        is_names: `schema` maps names of properties to schemas, and may have any keys.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if is_names:
        return {name: strict(each) for name, each in schema.items()}
    kept = {
        word: strict(value, is_names=word == "properties")
        for word, value in schema.items()
        if word not in NOT_JSON_SCHEMA and not word.startswith("x-kubernetes-")
    }
    if schema.get("nullable"):
        kept["type"] = [schema["type"], "null"]
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", False)
    return kept


def spec_schema(crd: Path) -> dict[str, Any]:
    """Return the strict schema of `spec` in API version v1 of a CRD's file."""
    (version,) = (
        each for each in yaml.safe_load(crd.read_text(encoding="utf-8"))["spec"]["versions"] if each["name"] == "v1"
    )
    schema: dict[str, Any] = strict(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    return schema


if __name__ == "__main__":
    schemas = {kind: spec_schema(Path(sys.argv[1]) / CRDS.format(name)) for kind, name in KINDS.items()}
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    text = json.dumps(schemas, separators=(",", ":"), sort_keys=True).encode()
    FILE.write_bytes(gzip.compress(text, mtime=0))
