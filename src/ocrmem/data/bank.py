"""A corpus drawn, encoded and tokenised ahead, so that a training step only gathers.

```
documents ─▶ render ─▶ units (what the encoder encodes alone) ─▶ features_UVE   float16, one file
         └─▶ tokenizer ─▶ token ids with their places in the text
```

A history for training is a run of units of one document. PP-OCR encodes every line alone, so a unit is a line, and
histories of any number of lines come from features computed once; for an encoder of whole pages a unit is a page.
A conversation's history ends where a turn ends, inside a line: the shorter line that this makes is a unit of its own,
its tail.

Letters besides those of `types`: U units in the bank, T text tokens, K documents.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset

from ocrmem.data.documents import document_hash
from ocrmem.encoders.base import OCREncoder
from ocrmem.files import fsync
from ocrmem.render.renderer import Renderer, render_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BANK_VERSION = 2
"""Part of every bank's name; raise it when what its files mean changes."""
ENCODE_BATCH = {"cuda": 32, "cpu": 2}
"""Pages that the encoder is given at once, by device."""


@dataclass(frozen=True)
class BankDocument:
    """One text of a bank, and where histories in it may end besides at the end of a unit."""

    id: str
    text: str
    cuts: tuple[int, ...] = ()
    """Characters, each one past the last of a history."""
    turns: tuple[tuple[str, int, int], ...] = ()
    """Conversations: role, first character of the turn's content, one past its last."""
    shuffled: bool = False
    """Its words are in no order, so that nothing but their reading can be asked for."""
    copied: bool = False
    """A part of another document, which is in the bank too."""


@dataclass(frozen=True, eq=False)
class Bank:
    """Features and tokens of documents.

    The units of document k are the `num_units_K[k]` from `first_unit_K[k]`, in reading order; its tails are looked up
    by (document, character). Arrays are memory-mapped or in memory; nothing is copied until it is gathered.
    """

    documents: list[BankDocument]
    features_UVE: torch.Tensor
    """float16 [U, tokens per unit, E]."""
    first_unit_K: np.ndarray
    num_units_K: np.ndarray
    """Without its tails."""
    unit_start_U: np.ndarray
    unit_end_U: np.ndarray
    unit_tokens_U: np.ndarray
    """Memory tokens in use; fewer than a full unit's where the text or its page ends."""
    slot_chars_UV: np.ndarray
    """First character under each memory token of a unit; the unit's end where there is none."""
    tails: dict[tuple[int, int], tuple[int, int]]
    """(document, cut) to (units of the document before the tail, the tail's unit or -1 where none is needed)."""
    token_ids_T: np.ndarray
    token_starts_T: np.ndarray
    first_token_K: np.ndarray
    units_per_page: int

    @property
    def tokens_per_unit(self) -> int:
        """Memory tokens of one full unit."""
        return self.features_UVE.shape[1]

    def pages_of(self, units: Sequence[int]) -> list[Sequence[int]]:
        """Units one after the other as they fill pages."""
        size = self.units_per_page
        return [units[begin : begin + size] for begin in range(0, len(units), size)]

    def tokens_on(self, page: Sequence[int]) -> int:
        """Memory tokens in use on a page of these units: of the last one its own, of those before it all, since what a
        shorter one leaves blank is on the page too."""
        return (len(page) - 1) * self.tokens_per_unit + int(self.unit_tokens_U[page[-1]])

    def num_tokens(self, units: Sequence[int]) -> int:
        """Memory tokens of a memory of these units."""
        return sum(map(self.tokens_on, self.pages_of(units)))

    def joined(self, pieces: int) -> Bank:
        """The same bank with every `pieces` neighbouring memory tokens as one."""
        if pieces == 1:
            return self
        units, tokens, width = self.features_UVE.shape
        return dataclasses.replace(
            self,
            features_UVE=self.features_UVE.reshape(units, tokens // pieces, width * pieces),
            unit_tokens_U=-(-self.unit_tokens_U // pieces),
            slot_chars_UV=self.slot_chars_UV[:, ::pieces],
        )

    def hashes(self) -> list[str]:
        """`document_hash` of every document that is no part of another."""
        return [document_hash(document.text) for document in self.documents if not document.copied]

    def token_range(self, document: int, start: int, end: int) -> tuple[int, int]:
        """Tokens that begin within the characters [start, end)."""
        first, last = self.first_token_K[document], self.first_token_K[document + 1]
        begin, stop = np.searchsorted(self.token_starts_T[first:last], [start, end])
        return int(first + begin), int(first + stop)


def build_bank(
    documents: Sequence[BankDocument],
    *,
    encoder: OCREncoder,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    encode: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Bank:
    """Draw, encode and tokenise documents, or load what an earlier call kept in `folder`.

    Args:
        folder: banks are kept in a subfolder named by all that decides them; written aside and renamed, so that a
            killed build leaves nothing that looks whole.
        device: where the encoder is; from a GPU, copies of it work on every other GPU that the process sees.
        num_workers: processes that draw and tokenise.
        encode: False: the features are not needed, as for rivals that read tokens; they are left empty
            [U, tokens per unit, 0] where no earlier call kept them.
        progress: called with documents done and documents in all.
    """
    encoded, empty = (
        Path(folder) / bank_key(documents, encoder, identity, tokenizer)
        for identity in (encoder.identity(), f"none {encoder.tokens_per_page}")
    )
    target = encoded if encode or encoded.exists() else empty
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # another process that wants the same waits for it
        if not target.exists():
            aside = target.with_name(f"{target.name}.incomplete")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            _write(documents, encoder, tokenizer, aside, torch.device(device), num_workers, encode, progress)
            for path in aside.iterdir():
                fsync(path)
            aside.rename(target)
    return _load(list(documents), target)


def bank_key(
    documents: Sequence[BankDocument], encoder: OCREncoder, encoder_identity: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Hex digest of everything that decides a bank."""
    total = hashlib.sha256(json.dumps([BANK_VERSION, encoder_identity, render_identity(encoder.page)]).encode())
    total.update(json.dumps([tokenizer.name_or_path and type(tokenizer).__name__, len(tokenizer)]).encode())
    total.update(json.dumps(tokenizer("Identity 1234 of a\ttokenizer…")["input_ids"]).encode())
    for document in documents:
        total.update(json.dumps([document.id, document_hash(document.text), document.cuts]).encode())
    return total.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class _Drawn:
    """One document, drawn and tokenised by a worker."""

    images_UHW: torch.Tensor
    """uint8; a tensor, because those come from worker processes through shared memory."""
    spans_U2: np.ndarray
    tokens_U: np.ndarray
    slot_chars_UV: np.ndarray
    tails: list[tuple[int, int, int]]
    """(cut, the document's units before it, the tail's own unit or -1 where the cut is at the end of a unit)."""
    num_units: int
    """The document's own; the units of its tails follow them."""
    token_ids: np.ndarray
    token_starts: np.ndarray


class _Drawer(Dataset[_Drawn]):
    def __init__(
        self, documents: Sequence[BankDocument], encoder: OCREncoder, tokenizer: PreTrainedTokenizerBase, pixels: bool
    ) -> None:
        self.documents, self.tokenizer, self.pixels = documents, tokenizer, pixels
        self.page, self.lines = encoder.page, encoder.lines_per_unit
        self.token_spans = encoder.token_spans
        self.per_unit = encoder.tokens_per_unit
        self.renderer: Renderer | None = None

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> _Drawn:
        if self.renderer is None:
            self.renderer = Renderer(self.page)
        document = self.documents[index]
        images, spans, slots = self._units(document.text, 0)
        starts = [start for start, _ in spans]
        tails: list[tuple[int, int, int]] = []
        own = len(spans)
        for cut in document.cuts:
            before = int(np.searchsorted(starts, cut)) - 1
            if before < 0 or spans[before][1] <= cut:
                tails.append((cut, before + 1, -1))
                continue
            tail_images, tail_spans, tail_slots = self._units(document.text[:cut], spans[before][0])
            if len(tail_spans) != 1:  # a cut that moves the break before it: rare, and not needed
                continue
            tails.append((cut, before, len(spans)))
            images, spans, slots = images + tail_images, spans + tail_spans, slots + tail_slots
        encoding = self.tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
        height = self.page.line_height * self.lines
        return _Drawn(
            images_UHW=torch.from_numpy(
                np.stack(images) if images else np.zeros((0, height, self.page.page_width), np.uint8)
            ),
            spans_U2=np.array(spans, dtype=np.int32).reshape(-1, 2),
            tokens_U=np.array([len(unit) for unit in slots], dtype=np.int16),
            slot_chars_UV=np.array(
                [unit + [end] * (self.per_unit - len(unit)) for unit, (_, end) in zip(slots, spans, strict=True)],
                dtype=np.int32,
            ).reshape(-1, self.per_unit),
            tails=tails,
            num_units=own,
            token_ids=np.array(encoding["input_ids"], dtype=np.int32),
            token_starts=_starts(document.text, encoding["offset_mapping"]),
        )

    def _units(self, text: str, start: int) -> tuple[list[np.ndarray], list[tuple[int, int]], list[list[int]]]:
        assert self.renderer is not None
        page_settings, images, spans, slots = self.page, [], [], []
        height = page_settings.line_height * self.lines
        for page in self.renderer.iter_pages(text, start=start):
            tops = page.glyph_boxes_N4[:, 1]
            units = -(-page.num_lines // self.lines)
            edges = np.searchsorted(tops, page_settings.margin_top + height * np.arange(units))
            begins = [int(page.glyph_offsets_N[edge]) if edge < len(tops) else page.text_end for edge in edges]
            begins[0] = page.text_start
            chars, following = [], page.text_end
            for span in reversed(self.token_spans(page)):  # a token without text begins where the next one does
                following = span[0][0] if span else following
                chars.append(following)
            chars.reverse()
            for unit in range(units):
                top = page_settings.margin_top * (self.lines == 1) + unit * height
                whole = self.lines == page_settings.lines_per_page
                image = page.image_HW if whole else page.image_HW[top : top + height]
                images.append(image if self.pixels else image[:0])
                spans.append((begins[unit], begins[unit + 1] if unit + 1 < units else page.text_end))
                slots.append(chars[unit * self.per_unit : (unit + 1) * self.per_unit])
        return images, spans, slots


def _starts(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Where each token's text begins, the space in front of it left out: a line begins with a word, and the space
    before that word hangs at the end of the line above."""
    starts = [
        start + (end - start - len(text[start:end].lstrip()) if text[start:end].strip() else 0)
        for start, end in offsets
    ]
    return np.array(starts, dtype=np.int32)


def _write(
    documents: Sequence[BankDocument],
    encoder: OCREncoder,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    device: torch.device,
    num_workers: int,
    encode: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    drawer = _Drawer(documents, encoder, tokenizer, pixels=encode)
    loader = DataLoader(
        drawer,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=16 if num_workers else None,
        collate_fn=_itself,
    )
    per_page = encoder.page.lines_per_page // encoder.lines_per_unit
    batch = ENCODE_BATCH.get(device.type, 8)
    encoders = on_every_gpu(encoder, device) if encode else [encoder]
    waiting: list[np.ndarray] = []
    encoding: deque[Future[np.ndarray]] = deque()
    spans, tokens, slots, ids, starts = [], [], [], [], []
    tails: list[tuple[int, int, int, int]] = []
    first_unit, own_units, first_token = [0], [], [0]
    with (folder / "features.bin").open("wb") as file, ThreadPoolExecutor(len(encoders)) as pool:

        def flush(everything: bool) -> None:
            units = np.concatenate(waiting) if waiting else np.zeros((0,))
            size = batch * per_page
            while len(units) >= size or (everything and len(units)):
                part, units = units[:size], units[size:]
                encoding.append(pool.submit(_encode, encoders[0], part, per_page))
                encoders.append(encoders.pop(0))
            waiting[:] = [units] if len(units) else []
            while len(encoding) > (0 if everything else len(encoders)):
                file.write(encoding.popleft().result().tobytes())

        for index, drawn in enumerate(loader):
            tails += [
                (index, cut, before, -1 if unit < 0 else first_unit[-1] + unit) for cut, before, unit in drawn.tails
            ]
            spans.append(drawn.spans_U2)
            tokens.append(drawn.tokens_U)
            slots.append(drawn.slot_chars_UV)
            ids.append(drawn.token_ids)
            starts.append(drawn.token_starts)
            own_units.append(drawn.num_units)
            first_unit.append(first_unit[-1] + len(drawn.spans_U2))
            first_token.append(first_token[-1] + len(drawn.token_ids))
            if encode:
                waiting.append(drawn.images_UHW.numpy())
                if sum(map(len, waiting)) >= batch * per_page:
                    flush(False)
            if progress is not None:
                progress(index + 1, len(documents))
        flush(True)
    if device.type == "cuda":  # what the encoders worked in belongs to the training, also on other processes' GPUs
        torch.cuda.empty_cache()
    np.savez(
        folder / "index.npz",
        spans_U2=np.concatenate(spans),
        tokens_U=np.concatenate(tokens),
        slot_chars_UV=np.concatenate(slots),
        token_ids_T=np.concatenate(ids),
        token_starts_T=np.concatenate(starts),
        tails_N4=np.array(tails, dtype=np.int64).reshape(-1, 4),
        first_unit_K=np.array(first_unit[:-1]),
        num_units_K=np.array(own_units),
        first_token_K=np.array(first_token),
        shape=np.array([first_unit[-1], drawer.per_unit, encoder.feature_width if encode else 0, per_page]),
    )


def _itself(item: Any) -> Any:
    return item


def on_every_gpu(encoder: OCREncoder, device: torch.device) -> list[OCREncoder]:
    """The encoder, and where it is on a GPU a copy of it on every other one that this process sees."""
    if device.type != "cuda":
        return [encoder]
    here = next(encoder.parameters()).device
    others = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return [encoder, *(copy.deepcopy(encoder).to(other) for other in others if other != here)]


@torch.no_grad()
def _encode(encoder: OCREncoder, units_UHW: np.ndarray, per_page: int) -> np.ndarray:
    device = next(encoder.parameters()).device
    count = len(units_UHW)
    pages = -(-count // per_page)
    height, width = encoder.page.page_height, encoder.page.page_width
    pages_PHW = np.full((pages, height, width), encoder.page.background, dtype=np.uint8)
    rows = units_UHW.shape[1] * per_page
    flat = np.full((pages * per_page, *units_UHW.shape[1:]), encoder.page.background, dtype=np.uint8)
    flat[:count] = units_UHW
    pages_PHW[:, :rows] = flat.reshape(pages, rows, width)
    features = encoder(torch.from_numpy(pages_PHW).to(device))
    return features.to(torch.float16).reshape(pages * per_page, -1, features.shape[-1])[:count].cpu().numpy()


def _load(documents: list[BankDocument], folder: Path) -> Bank:
    with np.load(folder / "index.npz") as index:
        arrays = {name: index[name] for name in index.files}
    units, per_unit, width, per_page = (int(n) for n in arrays["shape"])
    if width:
        mapped = np.memmap(folder / "features.bin", dtype=np.float16, mode="c", shape=(units, per_unit, width))
        features = torch.from_numpy(mapped)
    else:
        features = torch.zeros(units, per_unit, 0, dtype=torch.float16)
    return Bank(
        documents=documents,
        features_UVE=features,
        first_unit_K=arrays["first_unit_K"],
        num_units_K=arrays["num_units_K"],
        unit_start_U=arrays["spans_U2"][:, 0],
        unit_end_U=arrays["spans_U2"][:, 1],
        unit_tokens_U=arrays["tokens_U"],
        slot_chars_UV=arrays["slot_chars_UV"],
        tails={(k, cut): (before, unit) for k, cut, before, unit in arrays["tails_N4"].tolist()},
        token_ids_T=arrays["token_ids_T"],
        token_starts_T=arrays["token_starts_T"],
        first_token_K=arrays["first_token_K"],
        units_per_page=per_page,
    )
