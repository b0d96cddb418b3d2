"""How many parameters learn, and where."""

from __future__ import annotations

from torch import nn


def num_trainable(module: nn.Module) -> int:
    """Parameters of `module` that require grad."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def trainable_counts(model: nn.Module) -> dict[str, int]:
    """The figures of the report, by name: `trainable`, `all` and one `<part>` for each of the three."""
    return {
        "trainable": num_trainable(model),
        "all": sum(parameter.numel() for parameter in model.parameters()),
        **{part: num_trainable(model.get_submodule(part)) for part in ("base_llm_model", "ocr_embed", "proj")},
    }


def trainable_report(model: nn.Module) -> str:
    """The totals line, the breakdown of the three parts, and a warning for each frozen part that would learn."""
    counts = trainable_counts(model)
    lines = [
        f"trainable params: {counts['trainable']:,} || all params: {counts['all']:,} || "
        f"trainable%: {100 * counts['trainable'] / counts['all']:.4f}%",
        "",
        "Detailed breakdown:",
        f"  base_llm_model trainable params: {counts['base_llm_model']:,} (should be 0)",
        f"  ocr_embed trainable params: {counts['ocr_embed']:,} (should be 0)",
        f"  proj trainable params: {counts['proj']:,}",
    ]
    lines += [
        f"  ⚠️ WARNING: {part} should be frozen but has {counts[part]:,} trainable params!"
        for part in ("base_llm_model", "ocr_embed")
        if counts[part] > 0
    ]
    return "\n".join(lines)
