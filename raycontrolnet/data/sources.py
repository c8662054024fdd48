"""Sources of rows. A source is opened once, checked, and sent to the loading tasks, which read single rows."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from raycontrolnet.cluster.shared_files import SharedFiles
from raycontrolnet.config.data_sources import COLUMNS, SourceConfig, sources_of
from raycontrolnet.config.settings import DataConfig
from raycontrolnet.data.columns import MissingColumns
from raycontrolnet.data.folder_source import has_metadata, open_folder
from raycontrolnet.data.hub_source import is_remote_table, open_dataset
from raycontrolnet.data.joined_source import JoinedSource, named_sources
from raycontrolnet.data.metadata_file import METADATA_FILES
from raycontrolnet.data.paired_folder import CONDITIONING_FOLDERS, IMAGES, conditioning_folder, open_pairs
from raycontrolnet.data.paths import ARCHIVES, kind_of_file
from raycontrolnet.data.remote_path import AnyPath, RemotePath, check_uri, data_path, forget_listings, listed
from raycontrolnet.data.source import Source
from raycontrolnet.data.tar_index import shard_files
from raycontrolnet.data.tar_source import open_tars
from raycontrolnet.errors import DataError
from raycontrolnet.storage.uri import ACCESS, as_path, is_uri
from raycontrolnet.text import error_message, first_of

logger = logging.getLogger(__name__)

_DATASETS_FILES = ("*.parquet", "*/*.parquet", "*.arrow", "state.json", "dataset_dict.json")
"""Files of a folder that `datasets` reads, other than a metadata file."""
_SPLITS_NOT_TRAINED_ON = frozenset(("val", "valid", "validation", "dev", "eval", "test", "testing"))
_SHOWN_ENTRIES = 5
LOOKED_AT_ROWS = 32
"""Rows, about, whose files are looked for on the nodes of a cluster."""


def open_source(
    data: DataConfig, *, cache_dir: str | None = None, token: str | None = None, skip_bad: bool = False
) -> Source:
    """Open the source that `data` asks for, and check it with `Source.problems`; several become one, in their order.

    A folder with a metadata file, with images that pair by name, or with tars is read in the same way whichever flag
    names it, by path or URI; so are folders of folders with metadata files, and a tar by itself. `datasets` reads the
    rest.

    Args:
        token: for private data sets on the Hub, if this machine is not logged in.
        skip_bad: whether rows that cannot be read are allowed.

    Raises:
        DataError: with all problems that can be seen without opening images, one per line.
    """
    configs = sources_of(data)
    if not configs:
        raise DataError("--train_data_dir, --dataset_name: give one of them")
    opened, missing = [], {}
    problems: list[str] = []
    try:
        for index, config in enumerate(configs):
            try:
                opened.append(_open_one(config, cache_dir, token, skip_bad=skip_bad))
            except MissingColumns as error:
                missing[index] = error
                problems += error.others if len(configs) > 1 else [str(error)]
            except DataError as error:
                problems.append(str(error))
    finally:
        forget_listings()
    if len(configs) > 1:
        problems += _different_columns(configs, missing)
    if problems:
        raise DataError("\n".join(problems))
    return opened[0] if len(opened) == 1 else JoinedSource(tuple(opened), named=True)


def _open_one(config: SourceConfig, cache_dir: str | None, token: str | None, *, skip_bad: bool) -> Source:
    """Open one source; see `open_source`."""
    name = config.name
    try:
        if is_uri(name):
            check_uri(name)
        source = _open(config, cache_dir, token)
        problems = [] if skip_bad and len(source) else list(source.problems())
    except OSError as error:
        if not is_uri(name):
            raise
        raise DataError(f"{config.shown}: cannot be read ({error_message(error)}); {ACCESS}") from None
    if problems:
        if len(source):
            problems.append("fix the data, or skip such rows with --on_bad_sample skip")
        raise DataError("\n".join(problems))
    return source


def _different_columns(configs: Sequence[SourceConfig], missing: Mapping[int, MissingColumns]) -> Iterator[str]:
    """Yield a line for each column that some of several sources lack, with an example of what helps.

    Args:
        missing: index of a source -> the columns that it lacks.
    """
    for name in COLUMNS:
        lacking = {index: each for index, error in missing.items() for each in error.missing if each.setting == name}
        if lacking:
            asked = " ".join(dict.fromkeys(each.asked for each in lacking.values()))
            reasons = "; ".join(each.reason for each in lacking.values())
            example = [
                missing[index].guesses[name] if index in lacking else getattr(config, name)
                for index, config in enumerate(configs)
            ]
            advice = f"give one for each source, such as --{name} {shlex.join(example)}"
            yield f"--{name}={asked}: {reasons}; {advice}"


def shared_files(source: Source, data: DataConfig) -> SharedFiles:
    """Return files of `source`, those of a few rows, that every machine must see that loads its rows."""
    configs, paths = sources_of(data), []
    for config, part in zip(configs, named_sources(source), strict=True):
        rows = range(0, len(part), -(-len(part) * len(configs) // LOOKED_AT_ROWS))
        found = [] if part.remote else [path for row in rows for path in part.files(row)]
        paths += [config.name, *found] if found else []
    return SharedFiles.of(" ".join(f"--{config.flag}={config.name}" for config in configs), paths)


def _open(config: SourceConfig, cache_dir: str | None, token: str | None) -> Source:
    name, shown = config.name, config.shown
    path = data_path(name)
    is_place = config.train_data_dir is not None or isinstance(path, RemotePath)  # else it may be a Hub id
    if is_place and not (path.is_dir() or shard_files(path) or is_remote_table(path)):
        is_file = path.exists()
        raise DataError(f"{shown}: {'is a file; name the folder that it is in' if is_file else 'no such folder'}")
    by_datasets = config.train_data_dir is None and config.dataset_config_name is not None
    if not by_datasets and (source := _open_files(path, config)) is not None:
        return source
    if is_place and path.is_dir() and not any(any(path.glob(pattern)) for pattern in _DATASETS_FILES):
        raise DataError(f"{shown}: {_what_is_expected(path)}")
    return open_dataset(shown, path if isinstance(path, RemotePath) else as_path(name), config, cache_dir, token)


def _open_files(folder: AnyPath, data: SourceConfig) -> Source | None:
    """Open the images and texts of `folder`; None if it has none in a layout that is read without `datasets`."""
    if has_metadata(folder):
        return open_folder(folder, data)
    if folder.is_file() and (shards := shard_files(folder)):
        return open_tars(str(folder), shards, data)
    if not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _DATASETS_FILES):
        return None
    if conditioning_folder(folder):
        return open_pairs(folder)
    parts = [entry for entry in listed(folder) if entry.is_dir() and has_metadata(entry)]
    if held_back := [part.name for part in parts if part.name.lower() in _SPLITS_NOT_TRAINED_ON]:
        logger.warning("%s: %s is not trained on, by its name", folder, " and ".join(held_back))
    parts = [part for part in parts if part.name not in held_back]
    if not parts:
        shards = _trained_on(folder, shard_files(folder))
        return open_tars(str(folder), shards, data) if shards else None
    logger.info("%s: the rows of %s", folder, ", ".join(part.name for part in parts))
    return JoinedSource(tuple(open_folder(part, data) for part in parts))


def _trained_on(folder: AnyPath, shards: list[AnyPath]) -> list[AnyPath]:
    """Return the tars that are not named after another split, as val-0001.tar; all if no other is left."""
    held_back = [shard for shard in shards if set(re.split(r"[^a-z]+", shard.name.lower())) & _SPLITS_NOT_TRAINED_ON]
    if len(held_back) in (0, len(shards)):
        return shards
    names = " and ".join(shard.name for shard in held_back[:_SHOWN_ENTRIES])
    more = f" and {len(held_back) - _SHOWN_ENTRIES:,} more" if len(held_back) > _SHOWN_ENTRIES else ""
    logger.warning("%s: %s%s are not trained on, by their names", folder, names, more)
    return [shard for shard in shards if shard not in held_back]


def _what_is_expected(folder: AnyPath) -> str:
    entries = listed(folder)
    holds = first_of([entry.name for entry in entries], _SHOWN_ENTRIES) or "nothing"
    archive = next((entry for entry in entries if entry.suffix in ARCHIVES), None)
    advice = f". {archive.name} is an archive: unpack it there" if archive else ""
    if odd := next((entry for entry in entries if entry.name in METADATA_FILES and entry.exists()), None):
        advice += f". {odd.name} is {kind_of_file(odd.stat().st_mode)}, not a file"
    return (
        f"has no {METADATA_FILES[0]}, one line per image such as "
        '{"image": "images/1.png", "conditioning_image": "edges/1.png", "text": "a caption"}; '
        f"also read are {', '.join(METADATA_FILES[1:])}, data sets in parquet, WebDataset tars, and {IMAGES}/ and "
        f"{CONDITIONING_FOLDERS[0]}/ whose files pair by name, with captions in {IMAGES}/NAME.txt. "
        f"It holds: {holds}{advice}"
    )
