"""`ocrmem params`: how many parameters would learn, without loading a weight."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ocrmem.config.loader import nearest
from ocrmem.errors import ConfigError


def command(
    llm: Annotated[str, typer.Option(help="LLM preset, for example qwen3-8b.")] = "smollm2-135m",
    encoder: Annotated[str, typer.Option(help="Encoder: pp-ocr, deepseek-ocr or a registered one.")] = "pp-ocr",
    vision_embedding_size: Annotated[
        int | None,
        typer.Option(help="Feature width E; chooses the encoder's features. Default: the encoder's own."),
    ] = None,
    projection: Annotated[str, typer.Option(help="Kind of projection: mlp or attention.")] = "mlp",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count trainable and frozen parameters of an LLM, an encoder and a projection.

    Everything is built without memory for weights, so no network and no GPU is needed.
    """
    from ocrmem.config.encoder import EncoderSettings
    from ocrmem.config.mem import MEMConfig
    from ocrmem.config.memory import MemorySettings
    from ocrmem.config.projection import ProjectionSettings
    from ocrmem.encoders.registry import build_encoder
    from ocrmem.model.llm import empty_llm
    from ocrmem.model.mem_model import MEMModel
    from ocrmem.model.report import trainable_counts

    settings = EncoderSettings(name=encoder, settings=settings_for_width(encoder, vision_embedding_size))
    ocr_embed = build_encoder(settings, load_weights=False, device="meta")
    config = MEMConfig.from_settings(
        encoder=settings,
        page=ocr_embed.page,
        memory=MemorySettings(),
        projection=ProjectionSettings(kind=projection),  # type: ignore[arg-type]
        memory_token="",
        memory_token_id=0,
    )
    model = MEMModel(config, base_llm_model=empty_llm(llm), ocr_embed=ocr_embed, llm_name=llm)
    if not as_json:
        model.print_trainable_parameters()
        return
    counts = trainable_counts(model)
    parts = {
        part: sum(parameter.numel() for parameter in model.get_submodule(part).parameters())
        for part in ("base_llm_model", "ocr_embed", "proj")
    }
    print(
        json.dumps(
            {
                "llm": llm,
                "encoder": encoder,
                "vision_embedding_size": ocr_embed.feature_width,
                "tokens_per_page": ocr_embed.tokens_per_page,
                "trainable": counts["trainable"],
                "all": counts["all"],
                "trainable_percent": 100 * counts["trainable"] / counts["all"],
                "parts": parts,
            }
        )
    )


DEEPSEEK_FEATURES_OF_WIDTH = {512: "sam-mid", 1024: "sum", 2048: "concat"}
PP_OCR_STEP_WIDTH = 120


def settings_for_width(encoder: str, width: int | None) -> dict[str, Any]:
    """The encoder's settings that give features of this width.

    Raises:
        ConfigError: it has none of this width.
    """
    if width is None:
        return {}
    if encoder == "deepseek-ocr":
        if width not in DEEPSEEK_FEATURES_OF_WIDTH:
            raise ConfigError(
                f"--vision-embedding-size {width}: deepseek-ocr has features of 512 (sam-mid), 1024 (sam or sum) and "
                "2048 (concat)."
            )
        return {"features": DEEPSEEK_FEATURES_OF_WIDTH[width]}
    if encoder == "pp-ocr":
        if width % PP_OCR_STEP_WIDTH or width <= 0:
            raise ConfigError(
                f"--vision-embedding-size {width}: pp-ocr joins steps of {PP_OCR_STEP_WIDTH}, so give a multiple of "
                f"{PP_OCR_STEP_WIDTH}, for example 1920."
            )
        return {"steps_per_token": width // PP_OCR_STEP_WIDTH}
    raise ConfigError(
        f"--vision-embedding-size is known for pp-ocr and deepseek-ocr only, not for {encoder!r}. "
        + nearest(encoder, ("pp-ocr", "deepseek-ocr"))
    )
