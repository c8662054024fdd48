"""From a sample as it travels to one as it is used: the last part of loading, in the worker's threads."""

from __future__ import annotations

from raycontrolnet.data.records import PreparedRow, StoredRow
from raycontrolnet.data.transforms import decode_conditioning, mirrored
from raycontrolnet.errors import DataError
from raycontrolnet.text import error_message


def prepared(row: StoredRow | PreparedRow) -> PreparedRow:
    """Return the sample with its images decoded; one from pixels is already.

    Raises:
        DataError: naming the file, if the control image in the latent cache is damaged.
    """
    if isinstance(row, PreparedRow):
        return row
    try:
        conditioning_image = decode_conditioning(row.conditioning_png)
    except Exception as error:  # noqa: BLE001 - as in `decode_rgb`, decoders raise errors of many kinds
        raise damaged_shard(row.place, f"a control image: {error_message(error, 200)}") from None
    return PreparedRow(
        sample_index=row.sample_index,
        image=None,
        conditioning_image=mirrored(conditioning_image) if row.flipped else conditioning_image,
        prompt=row.prompt,
        posterior=row.posterior,
        size_conditions=row.size_conditions,
    )


def damaged_shard(path: str, reason: str) -> DataError:
    """Return the error that names a damaged file of the latent cache."""
    return DataError(
        f"{path}: this part of the latent cache is damaged ({reason}). Delete it and run `raycontrolnet prepare` with "
        "the settings of the run: only this part is made again"
    )
