"""The files of a sample: which of them is the image, the conditioning image and the caption, by their extensions."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from raycontrolnet.config.data_sources import SourceConfig
from raycontrolnet.data.columns import MissingColumn
from raycontrolnet.data.paired_folder import CONDITIONING_FOLDERS
from raycontrolnet.data.tar_index import Member
from raycontrolnet.data.transforms import IMAGE_FORMATS, MAX_IMAGE_BYTES
from raycontrolnet.text import file_size, first_of

_IMAGE_FORMATS = frozenset(
    suffix.removeprefix(".") for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS
)
_DEFAULT_NAMES = {
    "image": frozenset(("", "image", "target")),
    "conditioning_image": frozenset((*CONDITIONING_FOLDERS, "control", "control_image", "hint", "source")),
}
"""Names before the format in the extensions of images, if the user names none."""
_DEFAULT_CAPTIONS = ("txt", "caption", "text", "caption.txt", "text.txt", "json")
_EXAMPLES = {"image": "jpg", "conditioning_image": "conditioning_image.png", "caption": "txt"}
_SHOWN_EXTENSIONS = 6
_LONGEST_EXTENSION = 24


@dataclass(frozen=True)
class SampleFiles:
    """Extensions of a sample's three files."""

    image: str
    """As the user gave it, with or without a format; empty by default."""
    conditioning_image: str
    """The same."""
    captions: tuple[str, ...]
    """In the order of preference."""
    json_caption: str
    """Value of `--caption_column` for captions in JSON."""

    @staticmethod
    def of(data: SourceConfig) -> SampleFiles:
        """Return those that `data` asks for."""
        image, conditioning_image, caption = (
            "" if getattr(data, name) == getattr(SourceConfig, name) else getattr(data, name).lower().removeprefix(".")
            for name in ("image_column", "conditioning_image_column", "caption_column")
        )
        captions: tuple[str, ...] = _DEFAULT_CAPTIONS
        json_caption = data.caption_column
        if is_json(caption):
            captions, json_caption = (caption,), SourceConfig.caption_column
        elif caption:
            captions = (caption, f"{caption}.txt", *(("json",) if caption.rpartition(".")[2] != "txt" else ()))
        return SampleFiles(image, conditioning_image, captions, json_caption)

    def is_sample(self, members: Sequence[Member]) -> bool:
        """Check whether files of one key are to be a row: one of them is an image or a conditioning image."""
        extensions = [member.extension for member in members]
        return any(self._is("image", each) or self._is("conditioning_image", each) for each in extensions)

    def find(self, members: Sequence[Member]) -> tuple[Member, Member, Member]:
        """Return image, conditioning image and caption.

        Raises:
            ValueError: if one of them is missing, is there several times, or cannot be read.
        """
        image, conditioning_image, caption = (self._find(name, members) for name in _EXAMPLES)
        return image, conditioning_image, caption

    def missing(self, extensions: Sequence[str], shown: str) -> list[MissingColumn]:
        """Return each of the three files that is nowhere among `extensions`, those of all samples."""
        missing = []
        for name in _EXAMPLES:
            setting = f"{name}_column"
            if not any(self._is(name, extension) for extension in extensions):
                asked = self._asked(name)
                near = difflib.get_close_matches(asked, extensions, n=1) if asked else []
                reason = (
                    f"no file in {shown} has such an extension, as {self._example(name)}; "
                    f"there are: {_listed(extensions)}"
                )
                missing.append(
                    MissingColumn(
                        setting,
                        asked or getattr(SourceConfig, setting),
                        reason,
                        near=near[0] if near else None,
                        advice=f"name one with --{setting}",
                    )
                )
        return missing

    def unused(self, extensions: Sequence[str]) -> list[str]:
        """Return those of `extensions` that are none of the three files."""
        return [extension for extension in extensions if not any(self._is(name, extension) for name in _EXAMPLES)]

    def _find(self, name: str, members: Sequence[Member]) -> Member:
        found = [member for member in members if self._is(name, member.extension)]
        if name == "caption" and found:
            best = min((member.extension for member in found), key=self.captions.index)
            found = [member for member in found if member.extension == best]
        extensions = [member.extension for member in found]
        if not found:
            has = _listed([member.extension for member in members])
            raise ValueError(f"has no {name.replace('_', ' ')}, as {self._example(name)}; it has: {has}")
        if len(found) > 1:
            way_out = f"name one with --{name}_column" if len(set(extensions)) == len(found) else "leave one of them"
            raise ValueError(f"has several files for its {name.replace('_', ' ')}, {_listed(extensions)}; {way_out}")
        if fault := found[0].fault or _too_large(found[0]):
            raise ValueError(f"its {found[0].extension} {fault}")
        return found[0]

    def _is(self, name: str, extension: str) -> bool:
        if name == "caption":
            return extension in self.captions
        asked = self._asked(name)
        before, _, image_format = extension.rpartition(".")
        if image_format not in _IMAGE_FORMATS:
            return bool(asked) and extension == asked
        return asked in (extension, before) if asked else before in _DEFAULT_NAMES[name]

    def _asked(self, name: str) -> str:
        """Return the extension that the user named; empty by default."""
        if name == "caption":
            return "" if self.captions == _DEFAULT_CAPTIONS else self.captions[0]
        return self.image if name == "image" else self.conditioning_image

    def _example(self, name: str) -> str:
        asked = self._asked(name)
        whole = not asked or name == "caption" or asked.rpartition(".")[2] in _IMAGE_FORMATS
        return f"KEY.{(asked or _EXAMPLES[name]) if whole else f'{asked}.png'}"


def is_json(extension: str) -> bool:
    """Check whether a caption is a column of a JSON file."""
    return extension.rpartition(".")[2] == "json"


def _listed(extensions: Sequence[str]) -> str:
    return first_of([extension[:_LONGEST_EXTENSION] for extension in extensions], _SHOWN_EXTENSIONS)


def _too_large(member: Member) -> str:
    if member.size <= MAX_IMAGE_BYTES:
        return ""
    return f"has {file_size(member.size)}, more than the {file_size(MAX_IMAGE_BYTES)} that an image may have"
