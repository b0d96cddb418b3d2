"""Samples to packed rows: positions filled to the last, no sample seeing another, every row decided by its number.

Row i of a run depends on the seed and i alone, so a run that was killed goes on with the rows it would have had, and
any number of loader processes draws the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from ocrmem.config.objectives import TASKS, Features, ObjectiveSettings, Stage
from ocrmem.data.bank import Bank
from ocrmem.data.collator import splice_index
from ocrmem.errors import ConfigError, DataError
from ocrmem.model.label_loss import IGNORE_INDEX
from ocrmem.model.reader import LETTERS, NONE, cut_pages, letter_codes, page_cutter
from ocrmem.model.splice import positions_after
from ocrmem.training.tasks import Sample, TaskSampler

TOKENS_PER_SLOT = 8
"""Most text tokens under one memory token that are kept; what is beyond is left out."""
TOKENS_PER_PIECE = 2
"""The same for one piece, where a convolution has several to a memory token. It does not depend on their number, so
that a rival of more pieces goes on from one of fewer, as a memory does."""
TOO_LONG = 3
"""Samples that may fail to fit before a row is closed."""
ONE_POSITION = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
"""What stands for the LLM's row where it does not run."""
TEACHER_LENGTH = (4, 2048)
"""The teacher's row has a fourth of the positions of the student's, but no fewer than 2,048 where those have as many:
few samples are distilled, and what is left of a row of one fixed shape is run for nothing."""
LEAST_REST = 256
"""What is left of a row is cut into samples without labels, of so many positions or those of its longest sample: the
time of attention over a row goes up with its longest."""


class PackedRows(Dataset[dict[str, Any]]):
    """Packed training rows, one for each index; see `pack` for what a row holds.

    Args:
        samplers: by pieces to a memory token; the largest number is that of a stage which names none.
        rows_per_step: rows that one optimizer step takes over all processes; it tells the step, and so the stage.
        position_stride: positions of a memory token of the last stage; one of fewer pieces takes its share of them.
        reading_bank: one piece to a memory token, where the projection learns to read each piece; None: it does not.
        dealt: the projection deals out what it reads evenly, so that its memory tokens cover other text.
    """

    def __init__(
        self,
        samplers: Mapping[int, TaskSampler],
        settings: ObjectiveSettings,
        *,
        seed: int,
        rows_per_step: int,
        pad_token_id: int,
        position_stride: int = 1,
        reading_bank: Bank | None = None,
        dealt: bool = False,
    ) -> None:
        self.samplers, self.settings, self.seed = samplers, settings, seed
        self.reading_bank, self.dealt = reading_bank, dealt
        self.cutter = None if reading_bank is None else page_cutter(samplers[max(samplers)].frame.chat_format.tokenizer)
        self.position_stride = position_stride
        self.rows_per_step, self.pad_token_id = rows_per_step, pad_token_id
        self.whole = max(samplers)

    def __len__(self) -> int:
        return self.settings.total_steps * self.rows_per_step

    def __getitem__(self, index: int) -> dict[str, Any]:
        stage = self.settings.stage_at(index // self.rows_per_step)
        rng = np.random.default_rng([self.seed, index])
        drawn = stage or self.settings.stages[0]
        pieces = drawn.pieces or self.whole
        if stage is None:
            slots: Literal["pixels", "evenly"] = "evenly" if self.dealt else "pixels"
            memory = self._memory_alone(rng, drawn, self.settings.packed_length, slots)
            return {**memory, **ONE_POSITION, "warm_start": True}
        samples = fill(lambda: self.samplers[pieces].sample(rng, drawn), self.settings.packed_length)
        batch = self.pack(samples, pieces, shares=drawn.tasks)
        batch["distillation"] = stage.distillation
        if self.settings.reading_tokens and self.reading_bank is not None and pieces == self.whole:
            any_length = dataclasses.replace(drawn, min_units=1)
            batch["reading"] = self._memory_alone(rng, any_length, self.settings.reading_tokens, None)
            del batch["memory_letters"]  # of the LLM's own pages, whose features it does without
        return batch

    def checked_row(self) -> dict[str, Any]:
        """The first row of the stage with the most pieces to a memory token: every part of the projection takes part
        in it, as in the warm start and under fewer pieces it does not."""
        pieces = [stage.pieces or self.whole for stage in self.settings.stages]
        before = self.settings.stages[: pieces.index(max(pieces))]
        step = self.settings.warm_start_steps + sum(stage.steps for stage in before)
        return self[step * self.rows_per_step]

    def _memory_alone(
        self, rng: np.random.Generator, stage: Stage, length: int, slots: Literal["pixels", "evenly"] | None
    ) -> dict[str, Any]:
        """What a row says of a memory that no LLM reads: `length` memory tokens, and the rest of the last run of
        units; with the text tokens under each, as `slots` and to be made a memory of, if asked for."""
        pieces = stage.pieces or self.whole
        sampler = self.samplers[pieces]
        runs: list[list[int]] = []
        total = 0
        if not sampler.has("all", stage.min_units):
            raise DataError(
                f"no document of the corpora has {stage.min_units} units, the min_units of the first stage, which the "
                "warm start uses too. Lower it, or give longer documents."
            )
        lexicon = self.settings.warm_start_lexicon
        if lexicon and not sampler.has("shuffled", stage.min_units):
            raise DataError(
                f"objectives.warm_start_lexicon={lexicon}, and no document of the lexicon has {stage.min_units} units, "
                "the min_units of the first stage, which the warm start uses too. Lower min_units, or set it to 0."
            )
        while total < length:
            found = sampler.run(rng, stage, pool="shuffled" if lexicon and rng.random() < lexicon else "all")
            if found is not None:
                runs.append(sampler.units(*found))
                total += int(sampler.bank.unit_tokens_U[runs[-1]].sum())
        batch = memory_part(
            runs,
            sampler.bank,
            features=self.settings.features,
            pieces=pieces if self.whole > 1 else None,
            slots=slots,
            reading_bank=self.reading_bank,
            cutter=None if slots is None else self.cutter,
        )
        return {**batch, "pieces": pieces}

    def pack(
        self,
        samples: Sequence[Sample],
        pieces: int,
        *,
        shares: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """`pack` with this data set's settings, for samples of so many pieces to a memory token."""
        batch = pack(
            samples,
            self.samplers[pieces].bank,
            length=self.settings.packed_length,
            pad_token_id=self.pad_token_id,
            memory_token_id=self.samplers[pieces].memory_token_id,
            features=self.settings.features,
            pieces=pieces if self.whole > 1 else None,
            shares=shares,
            position_stride=max(1, self.position_stride * pieces // self.whole),
            reading_bank=self.reading_bank,
            cutter=self.cutter,
        )
        batch["pieces"] = pieces
        return batch


def teacher_length(length: int) -> int:
    """Positions of the teacher's row beside one of `length`."""
    share, least = TEACHER_LENGTH
    return min(length, max(length // share, least))


def fill(draw: Callable[[], Sample], length: int) -> list[Sample]:
    """Samples whose positions fit into `length`; those whose full text does not fit into what is left of the teacher's
    row are not distilled."""
    samples: list[Sample] = []
    left, teacher_left = length, teacher_length(length)
    failed = size = 0
    while failed < TOO_LONG:
        sample = draw()
        size = len(sample.input_ids_T)
        if size > left:
            failed += 1
            continue
        left -= size
        teacher = 0 if sample.teacher_ids_T is None else len(sample.teacher_ids_T)
        if teacher > teacher_left:
            sample = dataclasses.replace(sample, teacher_ids_T=None, teacher_labelled_T=None)
        else:
            teacher_left -= teacher
        samples.append(sample)
    if not samples:
        raise ConfigError(
            f"objectives.packed_length={length} is too short: the last sample drawn has {size} positions. Raise it, or "
            "lower max_units of the stages."
        )
    return samples


def pack(
    samples: Sequence[Sample],
    bank: Bank,
    *,
    length: int,
    pad_token_id: int,
    memory_token_id: int,
    features: Features = "ocr",
    pieces: int | None = None,
    shares: Mapping[str, float] | None = None,
    position_stride: int = 1,
    reading_bank: Bank | None = None,
    cutter: Tokenizer | None = None,
) -> dict[str, Any]:
    """One packed row.

    Args:
        memory_token_id: the placeholder's id.
        pieces: to a memory token of the bank, for `rival_slots`.
        shares: of the loss by task; None: every label weighs the same.
        position_stride: positions that a memory token takes.
        reading_bank, cutter: for `memory_part`.

    Returns:
        `input_ids`, `labels`, `position_ids` int64 [1, length]; `cu_seq_lens_q` int32; `max_length_q`;
        what `memory_part` gives; `placeholder_index`, `memory_index`, `target_index` and `target_weights` as
        `MEMModel.forward` takes them;
        `task_of_label` int64 [N], the index in `TASKS`; and where samples are distilled `teacher_…` of the same kind,
        with `distilled_index` int64, their labels among the N.

    Raises:
        SpliceError: the placeholders are not as many as the memory tokens.
    """
    row = _row(
        [(sample.input_ids_T, sample.labelled_T) for sample in samples],
        length,
        pad_token_id,
        memory_token_id=memory_token_id,
        position_stride=position_stride,
    )
    units = [sample.units for sample in samples]
    memory = memory_part(units, bank, features=features, pieces=pieces, reading_bank=reading_bank, cutter=cutter)
    tokens, width = memory["page_num_tokens"].tolist(), memory["units"].shape[1]
    tasks_N = np.concatenate([np.full(int(s.labelled_T[1:].sum()), TASKS.index(s.task)) for s in samples])  # pyright: ignore
    batch: dict[str, Any] = {
        **row,
        **memory,
        **splice_index(row["input_ids"], memory_token_id, tokens, width * bank.tokens_per_unit),
        "target_weights": torch.from_numpy(target_weights(tasks_N, shares)),
        "task_of_label": torch.from_numpy(tasks_N),
    }
    distilled = [s for s in samples if s.teacher_ids_T is not None]
    if distilled:
        teacher = _row(
            [(s.teacher_ids_T, s.teacher_labelled_T) for s in distilled],  # pyright: ignore
            teacher_length(length),
            pad_token_id,
            memory_token_id=memory_token_id,
        )
        batch.update({f"teacher_{name}": value for name, value in teacher.items()})
        taught = [np.full(int(s.labelled_T[1:].sum()), s.teacher_ids_T is not None) for s in samples]
        batch["distilled_index"] = torch.from_numpy(np.concatenate(taught).nonzero()[0])
    return batch


def memory_part(
    runs: Sequence[Sequence[int]],
    bank: Bank,
    *,
    features: Features,
    pieces: int | None,
    slots: Literal["pixels", "evenly"] | None = None,
    reading_bank: Bank | None = None,
    cutter: Tokenizer | None = None,
) -> dict[str, torch.Tensor]:
    """What a row says of its memory.

    Args:
        runs: the bank's units of each sample.
        pieces: to a memory token of the bank, for `rival_slots`.
        slots: give `slots` although the features are those of pages: the text tokens under each memory token's pixels,
            or a page's dealt out evenly.
        reading_bank: the same units with one piece to a memory token, for `memory_token_ids` and `memory_letters`;
            None: leave them out.
        cutter: the LLM's, by `page_cutter`, which cuts the pages as they are cut where they are read; None: leave
            `memory_token_ids` out.

    Returns:
        `page_num_tokens` [P] and `num_pages` [1]; `units` int64 [P, units of the fullest page], -1 where a page has
        none; for a rival `slots` int32 [P, V, tokens] as `rival_slots` gives them, and where asked for, as `slots`
        says; `memory_letters` int16 [P, V × pieces, `reader.LETTERS`], by `letter_codes`, and `memory_token_ids` int64
        of the same shape, the tokens that begin within each piece, by `cut_pages`.
    """
    pages = [list(page) for units in runs for page in bank.pages_of(units)]
    width = max(map(len, pages))
    units_PU = np.array([page + [-1] * (width - len(page)) for page in pages], dtype=np.int64)
    batch = {
        "page_num_tokens": torch.tensor([bank.tokens_on(page) for page in pages]),
        "num_pages": torch.tensor([len(pages)]),
        "units": torch.from_numpy(units_PU),
    }
    if features != "ocr":
        batch["slots"] = torch.from_numpy(rival_slots(bank, units_PU, features, pieces=pieces))
    elif slots is not None:
        batch["slots"] = torch.from_numpy(token_slots(bank, units_PU, evenly=slots == "evenly"))
    if reading_bank is not None:
        letters_PVL = piece_letters(reading_bank, units_PU)
        batch["memory_letters"] = torch.from_numpy(letters_PVL)
        if cutter is not None:
            batch["memory_token_ids"] = torch.from_numpy(cut_pages(letters_PVL, cutter))
    return batch


def target_weights(tasks_N: np.ndarray, shares: Mapping[str, float] | None) -> np.ndarray:
    """Weight of each label's loss, float32 [N], adding up to 1: a task's share dealt out over its labels in the row,
    so that a task of short answers is not drowned by one of long ones. None: the same for all."""
    if shares is None:
        return np.full(len(tasks_N), 1 / max(1, len(tasks_N)), dtype=np.float32)
    counts = np.bincount(tasks_N, minlength=len(TASKS))
    weights = np.array([shares.get(task, 0.0) for task in TASKS]) / counts.clip(min=1)
    weights_N = weights[tasks_N]
    return (weights_N / weights_N.sum()).astype(np.float32)


def _row(
    pieces: Sequence[tuple[np.ndarray, np.ndarray]],
    length: int,
    pad_token_id: int,
    *,
    memory_token_id: int,
    position_stride: int = 1,
) -> dict[str, Any]:
    """`pieces` are ids and whether each is a label, sample by sample."""
    input_ids = np.full(length, pad_token_id, dtype=np.int64)
    label_ids = np.full(length, IGNORE_INDEX, dtype=np.int64)
    positions = np.zeros(length, dtype=np.int64)
    edges = [0]
    for ids_T, labelled_T in pieces:
        begin, end = edges[-1], edges[-1] + len(ids_T)
        input_ids[begin:end] = ids_T
        label_ids[begin:end][labelled_T] = ids_T[labelled_T]
        positions[begin:end] = positions_after(torch.from_numpy(ids_T == memory_token_id), position_stride).numpy()
        edges.append(end)
    rest = max([LEAST_REST, *np.diff(edges).tolist()])
    while edges[-1] < length:
        begin, end = edges[-1], min(length, edges[-1] + rest)
        positions[begin:end] = np.arange(end - begin)
        edges.append(end)
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "labels": torch.from_numpy(label_ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": torch.tensor(edges, dtype=torch.int32),
        "max_length_q": int(np.diff(edges).max()),
        "target_index": torch.from_numpy((label_ids[1:] != IGNORE_INDEX).nonzero()[0]),
    }


def rival_slots(bank: Bank, units_PU: np.ndarray, kind: Features, *, pieces: int | None) -> np.ndarray:
    """Token ids that a trained rival reads for each memory token, int32 [P, V, tokens], -1 where there is none.

    The text tokens of a page are dealt out evenly, in order: by `mean-pooling` over its memory tokens, by
    `convolution` over their pieces, those of a piece side by side, so that tokens = pieces × `TOKENS_PER_PIECE`.

    Args:
        bank: at the stage's granularity.
        pieces: to one of the bank's memory tokens; None: the projection knows no pieces.
    """
    if kind == "mean-pooling" or pieces is None:
        return token_slots(bank, units_PU, evenly=True)
    return token_slots(bank, units_PU, evenly=True, pieces=pieces, tokens_per_piece=TOKENS_PER_PIECE)


def rival_tokens(kind: Features, pieces: int) -> int:
    """How many token embeddings side by side a rival's projection of so many pieces reads for each memory token."""
    if kind == "mean-pooling":
        return 1
    return TOKENS_PER_SLOT if pieces == 1 else pieces * TOKENS_PER_PIECE


def token_slots(
    bank: Bank, units_PU: np.ndarray, *, evenly: bool, pieces: int = 1, tokens_per_piece: int = TOKENS_PER_SLOT
) -> np.ndarray:
    """Token ids under each memory token, int32 [P, V, `pieces` × `tokens_per_piece`], -1 where there is none.

    Args:
        evenly: deal the text tokens of a page out evenly, in order, over the pieces of its memory tokens, as a rival
            does; otherwise each goes to the memory token under whose pixels it begins.
        pieces: to a memory token; more than 1 with `evenly` alone.
        tokens_per_piece: most of each piece; what is beyond is left out.
    """
    pages, per_page = units_PU.shape
    per_unit = bank.tokens_per_unit * pieces
    slots = np.full((pages, per_page * per_unit, tokens_per_piece), -1, dtype=np.int32)
    documents = np.searchsorted(bank.first_unit_K, units_PU, side="right") - 1
    for page, units in enumerate(units_PU):
        found: list[np.ndarray] = []
        under: list[np.ndarray] = []
        for number, unit in enumerate(units[units >= 0]):
            document = int(documents[page, number])
            begin, end = bank.token_range(document, int(bank.unit_start_U[unit]), int(bank.unit_end_U[unit]))
            found.append(bank.token_ids_T[begin:end])
            firsts = bank.slot_chars_UV[unit, : int(bank.unit_tokens_U[unit])]
            slot = np.searchsorted(firsts, bank.token_starts_T[begin:end], side="right").clip(min=1) - 1
            under.append(slot + number * per_unit)
        ids, slot = np.concatenate(found), np.concatenate(under)
        if evenly:
            used = bank.tokens_on(units[units >= 0]) * pieces
            slot = np.arange(len(ids)) * used // max(1, len(ids))
        place = np.arange(len(ids)) - np.searchsorted(slot, slot)
        kept = place < tokens_per_piece
        slots[page, slot[kept], place[kept]] = ids[kept]
    return slots.reshape(pages, per_page * bank.tokens_per_unit, pieces * tokens_per_piece)


def piece_letters(bank: Bank, units_PU: np.ndarray) -> np.ndarray:
    """Letters drawn within each piece of a bank of one piece to a memory token, int16 [P, V, `LETTERS`], by
    `letter_codes`, then `NONE`; what is beyond so many is left out."""
    pages, per_page = units_PU.shape
    letters = np.full((pages, per_page, bank.tokens_per_unit, LETTERS), NONE, dtype=np.int16)
    documents = np.searchsorted(bank.first_unit_K, units_PU, side="right") - 1
    ahead_L = np.arange(LETTERS)
    for page, place in zip(*(units_PU >= 0).nonzero(), strict=True):
        unit = units_PU[page, place]
        begin, end = int(bank.unit_start_U[unit]), int(bank.unit_end_U[unit])
        used = int(bank.unit_tokens_U[unit])
        codes = letter_codes(bank.documents[documents[page, place]].text[begin:end])
        edges = np.append(bank.slot_chars_UV[unit, :used], end) - begin
        at_VL = edges[:-1, None] + ahead_L
        inside_VL = at_VL < edges[1:, None]
        found_VL = codes[np.minimum(at_VL, len(codes) - 1)] if len(codes) else np.full_like(at_VL, NONE)
        letters[page, place, :used] = np.where(inside_VL, found_VL, NONE)
    return letters.reshape(pages, per_page * bank.tokens_per_unit, LETTERS)


def unpacked(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The collator of packed rows: a step's batch is one row as it is."""
    assert len(rows) == 1, f"{len(rows)} rows for one forward; packed rows go one at a time"
    return rows[0]
