"""Hugging Face ids: the snapshot folder in the Hugging Face cache."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from ocrmem.errors import AssetError

PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
"""What is fetched of a repository: weights as safetensors, tokenizers, texts. No pickle, and no code."""


def snapshot(repo_id: str, *, offline: bool, assets: Iterable[str]) -> Path:
    """The local folder of a hub repository, downloaded if need be.

    Args:
        offline: look into the Hugging Face cache only.
        assets: known asset names, offered where the id leads nowhere.

    Raises:
        AssetError: the id is malformed, or the repository is neither in the cache nor to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise AssetError(
            f"{repo_id!r} is no asset, no existing file or folder, and no Hugging Face id (owner/name). "
            f"{_offer(repo_id, assets)}"
        ) from None
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(PATTERNS), local_files_only=offline))
    except Exception as error:  # the hub's errors share no base: its own, the HTTP client's, the transfer library's
        why = "it is not in the Hugging Face cache, and offline was asked for" if offline else _first_line(error)
        raise AssetError(
            f"{repo_id!r} is no asset and no existing file or folder, and as a Hugging Face id it could not "
            f"be had: {why}. {_offer(repo_id, assets)}"
        ) from error


def _offer(name: str, assets: Iterable[str]) -> str:
    ranked = sorted(assets, key=lambda asset: -difflib.SequenceMatcher(None, name, asset).ratio())
    return f"Known assets, nearest first: {', '.join(ranked)}. Give one of them, or the path of a local folder."


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].removeprefix("Got: ").rstrip(".")
