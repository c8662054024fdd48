"""CLIP's tokenizers and text encoders (Radford et al. 2021, arXiv:2103.00020), which several families have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.loading import BASE, part, weights

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def tokenize(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the tokens of the prompts by each tokenizer, int64 [B, T], on the CPU."""
    return tuple(
        tokenizer(
            list(prompts),
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in tokenizers
    )


def load_text_encoder(
    model: ModelConfig, token: str | None, cls: Any, dtype: torch.dtype, folder: str = "text_encoder"
) -> Any:
    """Load a text encoder of the base model on the CPU."""
    return weights(model, token, cls, dtype, folder, variant=model.variant)


def load_tokenizers(
    model: ModelConfig, token: str | None, text_encoders: Sequence[Any], folders: Sequence[str]
) -> tuple[CLIPTokenizer, ...]:
    """Load the tokenizers from folders of the base model, the first one from --tokenizer_name if it is given.

    Raises:
        UserError: if one is missing, or of another text encoder.
    """
    flags = ["tokenizer_name" if model.tokenizer_name else BASE, *[BASE] * len(folders)]
    found = zip(text_encoders, folders, flags, strict=False)
    return tuple(_load_tokenizer(model, token, *each) for each in found)


def _load_tokenizer(model: ModelConfig, token: str | None, text_encoder: Any, folder: str, flag: str) -> CLIPTokenizer:
    """Load a tokenizer from a folder of the base model, or from the model that the setting `flag` names."""
    from transformers import CLIPTokenizer

    place = {"subfolder": folder} if flag == BASE else {}
    tokenizer = part(model, token, CLIPTokenizer.from_pretrained, flag, **place)
    # Of a folder without a tokenizer, Transformers makes an empty one, of endless length.
    most = text_encoder.config.max_position_embeddings
    if tokenizer.model_max_length > most:
        raise UserError(
            f"--{flag}={getattr(model, flag)}: its {folder} is missing or of another model (model_max_length "
            f"{tokenizer.model_max_length:.4g}, the text encoder takes {most} tokens)"
        )
    return tokenizer
