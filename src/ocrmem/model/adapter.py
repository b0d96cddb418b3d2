"""The adapter folder: `adapter.safetensors` (proj alone), `config.json`, `README.md`. No pickle, no frozen weight."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ocrmem import __version__
from ocrmem.assets.fetch import resolve
from ocrmem.config.llm import LLMSettings
from ocrmem.config.loader import from_mapping
from ocrmem.config.mem import MEMConfig, RivalRecord
from ocrmem.encoders.base import OCREncoder
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import AssetError, CheckpointError
from ocrmem.files import write_files
from ocrmem.model import stored_matrices
from ocrmem.model.identity import EncoderIdentity, LLMIdentity, from_config
from ocrmem.model.llm import load_llm, load_tokenizer, usable_device
from ocrmem.model.stored_matrices import form

if TYPE_CHECKING:
    from ocrmem.model.mem_model import MEMModel
    from ocrmem.model.projection import Projection

log = logging.getLogger(__name__)

WEIGHTS_NAME = "adapter.safetensors"
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
MANIFEST_NAME = "training_manifest.json"

ModelT = TypeVar("ModelT", bound="MEMModel")


def save(
    model: MEMModel,
    folder: Path,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    model_card: str | None = None,
    manifest: dict[str, Any] | None = None,
    matrix_dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter folder; what stood there before stays whole until everything is written.

    Args:
        manifest: what it was trained on, written beside it (`read_manifest`).
        matrix_dtype: round weight matrices to this type: `torch.bfloat16` for half the size, `torch.int8` (with a
            scale for each row) for a quarter; None: float32.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written. Nothing there has changed.
        ConfigError: another `matrix_dtype`.
    """
    if state_dict is None:
        weights = model.proj.state_dict()
    else:
        weights = {key.removeprefix("proj."): value for key, value in state_dict.items() if key.startswith("proj.")}
    weights = {key: _full(value).detach().cpu().contiguous() for key, value in weights.items()}
    weights = stored_matrices.rounded(weights, matrix_dtype)
    model.config.ocrmem_version = __version__
    writers = {
        CONFIG_NAME: lambda path: path.write_text(model.config.to_json_string(), encoding="utf-8"),
        WEIGHTS_NAME: lambda path: save_file(weights, path, metadata={"format": "pt"}),
    }
    if manifest is not None:
        writers[MANIFEST_NAME] = lambda path: path.write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    if model_card is not None or not (folder / CARD_NAME).exists():
        card = model_card or default_card(model.config)
        writers[CARD_NAME] = lambda path: path.write_text(card, encoding="utf-8")
    try:
        write_files(folder, writers)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapter could not be saved to {str(folder)!r}: {error}. Nothing there was changed. Free some space "
            "or choose another folder, and save again."
        ) from error


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP2 may have sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load(
    cls: type[ModelT],
    folder: Path,
    *,
    base_llm_model: PreTrainedModel | None = None,
    ocr_embed: OCREncoder | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> ModelT:
    """Load an adapter folder and the frozen parts that it names, in eval mode.

    Args:
        base_llm_model: the LLM, if it is loaded already; None: loaded from where the adapter's config says.
        ocr_embed: the encoder, likewise.
        tokenizer: the LLM's, for an adapter that reads letters alone; None: from where the adapter's config says.
        dtype: type of the LLM's weights; `auto`: as stored.
        device: where everything goes.
        attn_implementation: attention kernel of the LLM, by its transformers name.

    Raises:
        CheckpointError: the folder or a file in it is missing, truncated, or does not fit; or it is a trained rival,
            which only an evaluation can use.
        AdapterMismatchError: the LLM or the encoder is not the one that the adapter was made for.
        ConfigError: the device cannot be used.
    """
    device = usable_device(device)
    folder = _find(folder)
    config = read_config(folder)
    if config.rival_record is not None and ocr_embed is None:
        kind = config.rival_record.kind
        raise CheckpointError(
            f"{str(folder)!r} is a trained rival of a memory ({kind}): it reads the text's own tokens, and no pages. "
            f"Load an adapter that reads pages; compare the two with `ocrmem eval ADAPTER --rival {kind}={folder}`."
        )
    wanted_llm: LLMIdentity = from_config(LLMIdentity, config.llm, where="llm")
    wanted_encoder: EncoderIdentity = from_config(EncoderIdentity, config.encoder_identity, where="encoder_identity")
    if ocr_embed is None:
        ocr_embed = build_encoder(config.encoder_settings, page=config.page_settings)
    wanted_encoder.check(EncoderIdentity.of(ocr_embed), adapter=str(folder))
    revision = "unknown"
    if base_llm_model is None:
        settings = from_mapping(
            LLMSettings,
            {"name": wanted_llm.name, "dtype": dtype, "attn_implementation": attn_implementation},
            where="llm",
        )
        base_llm_model, revision = load_llm(settings)
        name = wanted_llm.name
    else:
        name = base_llm_model.name_or_path or type(base_llm_model).__name__
    wanted_llm.check(LLMIdentity.of(base_llm_model, name=name, revision=revision), adapter=str(folder))
    if tokenizer is None and config.projection_settings.read_tokens:
        tokenizer = _tokenizer_of(name, wanted_llm.name)
    model = cls(
        config,
        base_llm_model=base_llm_model,
        ocr_embed=ocr_embed,
        llm_name=name,
        llm_revision=revision,
        tokenizer=tokenizer,
    )
    load_projection(model, folder)
    torch.nn.Module.to(model, device=device)
    return model.eval()


def _tokenizer_of(*names: str) -> PreTrainedTokenizerBase | None:
    """The first that is found; None: `PageReader.read` says what to do."""
    errors = []
    for name in dict.fromkeys(names):
        try:
            return load_tokenizer(name)
        except (OSError, ValueError) as error:
            errors.append(f"{name!r}: {error}")
    log.warning("the adapter reads letters, and no tokenizer was found: %s", "; ".join(errors))
    return None


def load_projection(
    model: MEMModel,
    folder: Path,
    *,
    put: Callable[[nn.Module, dict[str, torch.Tensor]], None] | None = None,
    start: bool = False,
) -> None:
    """Load `adapter.safetensors` into `model.proj`, strictly: same names, shapes and types, but that matrices may be
    stored in bfloat16 or int8.

    Args:
        start: take a file of fewer merged pieces, of fewer layers over text or memory tokens, or one that reads
            nothing, too, to start training from it. The layers and the matrices of pieces that it lacks add nothing at
            first, but where tokens are dealt out these matrices are as its last. Layers over pieces must be as many.
            From one that reads nothing, a projection begins to learn reading with these; the layers behind get text
            tokens in place of pieces, and have to learn them.
        put: puts checked weights into the projection, where several processes share it; None: `load_state_dict`.

    Raises:
        CheckpointError: the file is missing or truncated, or a tensor is missing, unexpected, reshaped or recast.
    """
    path = folder / WEIGHTS_NAME
    try:
        found = load_file(path)
    except FileNotFoundError:
        raise _missing(folder, WEIGHTS_NAME) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} is truncated or no safetensors file ({error}). Copy it again from where it was made, or "
            "go back to an earlier checkpoint of the run."
        ) from error
    found, wrong = stored_matrices.restored(found)
    # Under DeepSpeed's stage 3 a parameter is empty between its uses, and says its shape elsewhere.
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.proj.named_parameters()}
    wanted = {
        key: torch.empty(shapes.get(key, value.shape), dtype=value.dtype, device="meta")
        for key, value in model.proj.state_dict().items()
    }
    if start:
        theirs, ours = read_config(folder).projection_settings, model.config.projection_settings
        if theirs.num_layers != ours.num_layers:
            raise CheckpointError(
                f"adapter {str(folder)!r} has {theirs.num_layers} attention layers over pieces, and this projection "
                f"{ours.num_layers}. Set projection.num_layers={theirs.num_layers}, or start from another adapter."
            )
        if theirs.deal_tokens and not ours.deal_tokens:
            raise CheckpointError(
                f"adapter {str(folder)!r} deals out the tokens that it reads (projection.deal_tokens), and this "
                "projection merges pieces, whose matrices are others. Set projection.deal_tokens=true, or start from "
                "another adapter."
            )
        found = {**_begun(model.proj, found), **found}
    wrong += [f"missing {key}" for key in wanted.keys() - found.keys()]
    wrong += [f"unexpected {key}" for key in found.keys() - wanted.keys()]
    wrong += [
        f"{key} is {form(found[key])}, expected {form(wanted[key])}"
        for key in wanted.keys() & found.keys()
        if form(found[key]) != form(wanted[key])
    ]
    if wrong:
        raise CheckpointError(
            f"{str(path)!r} does not fit this projection: {'; '.join(sorted(wrong))}. The file and `{CONFIG_NAME}` "
            "beside it must come from the same run; build the model with the adapter's own config."
        )
    if put is None:
        model.proj.load_state_dict(found)
    else:
        put(model.proj, found)


def _begun(proj: Projection, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of what a smaller projection's file has none of: of further layers after reading what adds to their
    input is zero, and so are the matrices of further pieces, so that the projection begins as that one; but where
    tokens are dealt out, the matrices of further ones are as the file's last. The rest is as it is."""
    own, begun = proj.state_dict(), {}
    if "merge.0.weight" in found:
        pieces = sum(key.startswith("merge.") for key in found)
        last = found[max((key for key in found if key.startswith("merge.")), key=_merge_number)]
        more = last if proj.deal_tokens else torch.zeros(last.shape)
        begun = {key: more.clone() for key in own if _merge_number(key) >= pieces}
    there = {_part(key) for key in found}
    for key, value in own.items():
        part = _part(key)
        if part not in there and part[0] in ("text", "merged", "reader"):
            adds = part[0] != "reader" and key.split(".")[3] in ("out", "mlp2")
            begun[key] = torch.zeros(value.shape) if adds else value.detach().cpu().clone()
    return begun


def _part(key: str) -> tuple[str, ...]:
    """The layer that a weight belongs to (`text`, `layers`, `0`), or the part that is no stack of layers."""
    names = key.split(".")
    return tuple(names[:3]) if names[1:2] == ["layers"] else tuple(names[:1])


def _merge_number(key: str) -> int:
    kind, _, rest = key.partition(".")
    return int(rest.partition(".")[0]) if kind == "merge" else -1


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an adapter was trained on: `documents`, the first 16 hex digits of each document's hash, and `steps`.

    Empty where the folder has no manifest.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        documents, steps = values["documents"], values["steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is no training manifest ({type(error).__name__}: {error}). Without it nobody can tell what "
            "was held out; copy the adapter again from where it was made."
        ) from error
    return {**values, "documents": list(documents), "steps": int(steps)}


def read_config(folder: Path) -> MEMConfig:
    """The config of an adapter folder.

    Raises:
        CheckpointError: there is none, it is no JSON, or it belongs to another kind of model.
    """
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(folder, CONFIG_NAME) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not readable JSON ({error}); copy it again from where it was made."
        ) from error
    if not isinstance(values, dict) or values.get("model_type") != MEMConfig.model_type:
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(
            f"{str(path)!r} has model_type {kind!r}, expected {MEMConfig.model_type!r}: this is no "
            "ocrmem adapter folder."
        )
    return MEMConfig.from_dict(values)


def _find(folder: Path) -> Path:
    if folder.is_dir() or folder.is_absolute() or len(folder.parts) != 2:
        return folder
    try:  # `owner/name`: an adapter on the hub
        return resolve(os.fspath(folder))
    except AssetError as error:
        raise CheckpointError(
            f"adapter {str(folder)!r} is no folder here, and could not be had as a hub id either: {error}"
        ) from error


def _missing(folder: Path, name: str) -> CheckpointError:
    held = ", ".join(sorted(child.name for child in folder.iterdir())) or "nothing" if folder.is_dir() else None
    there = f"the folder holds {held}" if held else "there is no such folder"
    return CheckpointError(
        f"adapter {str(folder)!r} has no {name}: {there}. Expected {WEIGHTS_NAME} and {CONFIG_NAME}, as "
        "save_pretrained writes them; check the path."
    )


def default_card(config: MEMConfig) -> str:
    """A model card that says what the adapter is for, and that nothing was measured."""
    llm: dict[str, Any] = config.llm or {}
    encoder: dict[str, Any] = config.encoder_identity or {}
    if config.rival_record is not None:
        return _rival_card(llm, config.rival_record)
    return f"""---
library_name: ocrmem
base_model: {llm.get("name")}
---
# Visual memory for {llm.get("name")}

An [ocrmem] adapter: a projection from the features of the OCR encoder `{encoder.get("name")}`
({encoder.get("feature_width")} wide, {encoder.get("tokens_per_page")} tokens a page) to the embeddings of the frozen
LLM `{llm.get("name")}` (revision `{llm.get("revision")}`, width {llm.get("hidden_size")}).

```python
from ocrmem import MEMModel, MEMProcessor

model = MEMModel.from_pretrained("this folder")
processor = MEMProcessor.from_model(model)
```

Measured figures: none were recorded when this adapter was saved.

[ocrmem]: https://pypi.org/project/ocrmem/
"""


def _rival_card(llm: dict[str, Any], rival: RivalRecord) -> str:
    return f"""---
library_name: ocrmem
base_model: {llm.get("name")}
---
# Rival of a visual memory for {llm.get("name")}: {rival.kind}

A trained rival for `ocrmem eval ADAPTER --rival {rival.kind}="this folder"`: a projection from the text's own token
embeddings to {rival.tokens_per_page} memory tokens a page of the frozen LLM `{llm.get("name")}` (revision
`{llm.get("revision")}`, width {llm.get("hidden_size")}). It reads no pages.

Measured figures: none were recorded when this adapter was saved.
"""
