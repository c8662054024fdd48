"""Images in the columns of a `datasets.Dataset`: embedded ones, and paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycontrolnet.data.paths import Root, file_identity

if TYPE_CHECKING:
    import pyarrow as pa


def value_type(feature: Any) -> str:
    """Return the name of the type of a feature's values; empty for those with fields."""
    return str(getattr(feature, "dtype", "")).removeprefix("large_")


def holds_images(feature: Any) -> bool:
    """Check for images; true also for their fields in a parquet file that does not say that it holds images."""
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))


def image_identity(cell: pa.Scalar, folder: Root) -> tuple[str | None, int | None]:
    """Return (name, bytes) of an image in an Arrow column of images or texts."""
    import pyarrow as pa

    path = cell.get("path").as_py() if isinstance(cell, pa.StructScalar) else None
    data = cell.get("bytes") if isinstance(cell, pa.StructScalar) else cell
    if isinstance(data, (pa.BinaryScalar, pa.LargeBinaryScalar)) and data.is_valid:
        return path and Path(path).name, len(data.as_buffer())
    path = path if isinstance(cell, pa.StructScalar) else cell.as_py()
    name, num_bytes = file_identity(folder, path or "")
    return name and Path(name).name, num_bytes


def paths_in(column: Any) -> Iterator[str]:
    """Yield the paths in an Arrow column of images or texts; "" for embedded images."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for chunk in column.chunks:
        if pa.types.is_struct(chunk.type):
            embedded = pc.is_valid(chunk.field("bytes"))
            chunk = pc.if_else(embedded, "", pc.cast(chunk.field("path"), pa.large_string()))
        elif not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
            continue
        for path in chunk.to_pylist():
            yield path or ""
