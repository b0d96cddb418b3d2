"""A tiny LLM with a real tokenizer, and the config of a run of a memory or a rival on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tiny import tiny_llm

from ocrmem.config.train import TrainConfig, load_train_config
from ocrmem.model.llm import load_tokenizer

PIECES = 4
TOKENS_PER_PAGE = 80


def save_llm(folder: Path, *, seed: int = 0) -> Path:
    """Write a random LLM of two layers, 32 wide, with SmolLM2's tokenizer. Its weights are large enough that the
    memory reaches its logits."""
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    llm = tiny_llm(
        "llama",
        seed=seed,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_config(
    folder: Path, llm: Path, *, corpus: Path, features: str, steps: int = 12, **sections: Any
) -> TrainConfig:
    """A run over stages of 1, 2 and 4 pieces; `sections` replace those of the config."""
    values = {
        "output_dir": str(folder / "run"),
        "feature_cache": str(folder / "features"),
        "llm": {"name": str(llm)},
        "encoder": {"name": "pp-ocr", "settings": {"steps_per_token": 20}},
        "page": {"page_width": 1600, "page_height": 384},
        "memory": {"header": ""},
        "projection": {"kind": "attention", "num_layers": 1, "num_heads": 4, "pieces": PIECES, "gain": True},
        "optimizer": "muon",
        "objectives": {
            "corpora": [str(corpus)],
            "eval_corpora": [str(corpus)],
            "warm_start_steps": 1,
            "packed_length": 512,
            "features": features,
            "stages": [{"steps": steps, "max_units": 1, "pieces": pieces} for pieces in (1, 2, PIECES)],
        },
        "training": {
            "learning_rate": 0.02, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1,
            "eval_steps": 3 * steps + 1, "save_steps": 3 * steps + 1, "seed": 0, "disable_tqdm": True,
        },
        **sections,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_train_config(path)
