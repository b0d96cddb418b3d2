"""Time to first token on a long history: as memory, against the full text through the same LLM."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ocrmem.data.processor import stack_pages
from ocrmem.encoders.deepseek_ocr import DeepSeekOCREncoder
from ocrmem.encoders.graphs import PLAIN_RUNS
from ocrmem.evaluation.bench.models import (
    bench_encoder_of,
    memory_model,
    placeholder_id,
    random_ids,
    random_llm,
)
from ocrmem.evaluation.bench.render import random_text
from ocrmem.evaluation.bench.sizes import Sizes
from ocrmem.evaluation.bench.timing import Results, measure
from ocrmem.memory.features import FeatureStore, encode_pages
from ocrmem.model.mem_model import MEMModel
from ocrmem.render.renderer import Renderer

FULL = "full text"


def bench_prefill(results: Results, sizes: Sizes, device: torch.device, tflops: float) -> None:
    """Fill in the rows and ratios of the part."""
    encoder = bench_encoder_of(sizes, device)
    model = memory_model(random_llm(sizes, device), encoder, sizes).eval()
    memory = sizes.history_tokens // sizes.ratio
    num_pages = memory // encoder.tokens_per_page
    text, renderer = history(sizes, encoder, num_pages)
    pages = renderer.pages(text)
    pages_PHW = stack_pages(pages, encoder)
    results.head |= {
        "llm": sizes.llm_name, "weights": "random", "dtype": str(sizes.dtype)[6:],
        "history_tokens": sizes.history_tokens, "question_tokens": sizes.question_tokens, "memory_tokens": memory,
        "ratio": sizes.ratio, "pages": num_pages, "characters": len(text),
        "legibility": "not measured: the weights are random, so only the time is real",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    question = random_ids(sizes, sizes.question_tokens, generator)
    full = torch.cat([random_ids(sizes, sizes.history_tokens, generator), question])[None]
    short = torch.cat([torch.full((memory,), placeholder_id(sizes)), question])[None]
    counts = torch.full((num_pages,), encoder.tokens_per_page)

    def first_token(features_PVE: torch.Tensor) -> int:
        batch = {"input_ids": short, "page_num_tokens": counts, "num_pages": torch.tensor([num_pages])}
        batch = {name: value.to(device) for name, value in batch.items()}
        output = model(**batch, features=features_PVE, logits_to_keep=1, use_cache=True)
        return int(output.logits[0, -1].argmax())

    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder))
        keys = [f"{number:064d}" for number in range(num_pages)]

        def encoded(store: FeatureStore | None) -> torch.Tensor:
            return encode_pages(encoder, pages_PHW, keys, store=store, dtype=sizes.dtype, device=device)

        def rendered() -> torch.Tensor:
            return encode_pages(
                encoder,
                stack_pages(renderer.pages(text), encoder),
                keys,
                store=None,
                dtype=sizes.dtype,
                device=device,
            )

        kept_PVE = encoded(store)
        ways: dict[str, Callable[[], int]] = {
            FULL: lambda: first_of_full_text(model, full.to(device)),
            "memory, features on the GPU": lambda: first_token(kept_PVE),
            "memory, pages cached": lambda: first_token(encoded(store)),
            "memory, encode": lambda: first_token(encoded(None)),
            "memory, render and encode": lambda: first_token(rendered()),
        }
        for name, run in ways.items():
            with results.row(name, device) as row, torch.no_grad():
                results.check_time()
                row |= measure(run, device, repeats=7, warm_up=PLAIN_RUNS + 1, seconds=8)
    with results.row("render alone", device) as row:
        results.check_time()
        row |= measure(lambda: renderer.pages(text), torch.device("cpu"), repeats=5)
    full_ms = results.find(FULL, "ms")
    for name in ways:
        if name != FULL:
            results.ratio(f"time to first token: {name}", full_ms, results.find(name, "ms"))
            results.ratio(f"peak memory: {name}", results.find(name, "peak_gb"), results.find(FULL, "peak_gb"))


def first_of_full_text(model: MEMModel, input_ids: torch.Tensor) -> int:
    """The first token after a text, by the LLM alone."""
    output: Any = model.base_llm_model(input_ids=input_ids, logits_to_keep=1, use_cache=True)
    return int(output.logits[0, -1].argmax())


def history(sizes: Sizes, encoder: DeepSeekOCREncoder, num_pages: int) -> tuple[str, Renderer]:
    """A text of the history's tokens that takes just so many pages, and its renderer.

    Raises:
        AssertionError: it does not fit on them at the encoder's own page settings.
    """
    renderer = Renderer(encoder.page)
    text = random_text(round(sizes.history_tokens * sizes.chars_per_token))
    pages = renderer.pages(text)
    assert len(pages) <= num_pages, f"{len(text)} characters take {len(pages)} pages, more than {num_pages}"
    while len(pages) < num_pages:  # so much text as fills the memory's pages: not less work than there would be
        text += "\n" + random_text(len(text) // len(pages))
        pages = renderer.pages(text)
    return text[: pages[num_pages - 1].text_end], renderer
