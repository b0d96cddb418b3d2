"""`ocrmem encode`: the pages that a training config will ask for, encoded ahead into shards of the feature cache.

```
config ─▶ blocks of conversations ─▶ any process: split, draw, encode ─▶ one shard for each block
```

A block depends on the data and the settings alone, and so do the order and the batches in which its pages are encoded.
So one process, several, and the workers of a Ray cluster write the same files, and whoever starts again goes on with
the blocks that have no shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from ocrmem.config.train import TrainConfig
from ocrmem.data.processor import MEMProcessor, stack_pages
from ocrmem.data.samples import MEMDataset, usable_replies
from ocrmem.errors import ConfigError, MemoryNeverAppearsError
from ocrmem.memory.features import round_features
from ocrmem.memory.shards import FeatureProfile, ShardFolder, refuse_file, used_rows
from ocrmem.training.build import build_eval_dataset, build_processor, feature_folder, read_data
from ocrmem.training.hardware import check_bfloat16
from ocrmem.training.workers import Workers
from ocrmem.types import Conversation, Page

log = logging.getLogger(__name__)

PAGES_PER_SHARD = 64
"""Pages of a block, as far as they can be told from the conversations' lengths."""
CHARS_PER_PAGE = 2000
"""By which that is told. Only the sizes of the shards depend on it."""
BATCH_SIZE = 16
"""Pages that the encoder is given at once."""
STALE_SECONDS = 600
"""Age at which a half-written shard is nobody's any more."""

Progress = Callable[[int, int, int], None]
"""Called with blocks done, blocks in all, and pages encoded."""


@dataclass(frozen=True, eq=False)
class Block:
    """Conversations whose pages go into one shard."""

    conversations: tuple[Conversation, ...]
    replies: tuple[tuple[int, ...], ...] | None = None
    """For each conversation the messages whose prompts are encoded; None: every reply of all."""


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What became of a block."""

    pages: int
    """Pages of its shard."""
    encoded: int
    """Those encoded now; 0 where the shard was there."""
    size: int
    """Bytes of the shard."""


@dataclass(frozen=True, kw_only=True)
class EncodeResult:
    """What `ocrmem encode` gave."""

    folder: Path
    """The shards' folder."""
    shards: int
    """Shards of the data set."""
    pages: int
    """Pages in them."""
    encoded: int
    """Pages encoded by this call; the others were there."""
    size: int
    """Bytes of the shards."""
    seconds: float
    workers: int
    """Processes that encoded."""

    def __str__(self) -> str:
        rate = f", {self.encoded / self.seconds:.1f} pages/s" if self.encoded and self.seconds else ""
        kept = f" ({self.pages - self.encoded} were there)" if self.encoded < self.pages else ""
        return (
            f"encoded: {self.encoded} of {self.pages} pages{kept} in {self.seconds:.1f} s by {self.workers} "
            f"process{'es' if self.workers > 1 else ''}{rate}; {self.shards} shards, {self.size:,} bytes in "
            f"{self.folder}"
        )

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**dataclasses.asdict(self), "folder": str(self.folder)}


def encode(
    config: TrainConfig,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = BATCH_SIZE,
    pages_per_shard: int = PAGES_PER_SHARD,
    workers: Workers | None = None,
    progress: Progress = lambda *_: None,
) -> EncodeResult:
    """Encode the pages of `data.train` and `data.eval`, block by block, with the other processes of the launch.

    Args:
        device: where this process's encoder runs.
        workers: the processes that share the work; None: those of the launcher that started this one.

    Raises:
        ConfigError: the config has objectives, or a feature is too large for `memory.feature_dtype`.
        MemoryNeverAppearsError: no prompt of the data has a memory.
        TrainingError: another process of the launch did not finish.
    """
    workers = workers or Workers()
    start = time.monotonic()
    encoder = BlockEncoder(config, device=device, batch_size=batch_size, pages_per_shard=pages_per_shard)
    if workers.rank == 0:
        encoder.prepare()
    results = []
    while (number := workers.claim()) < len(encoder.blocks):
        results.append(encoder.run(number))
        blocks, pages = workers.count(1, results[-1].encoded)
        progress(blocks, len(encoder.blocks), pages)
    everyone = workers.gather([dataclasses.asdict(result) for result in results])
    return summary(
        [BlockResult(**result) for results in everyone for result in results],
        encoder.shards.folder,
        seconds=time.monotonic() - start,
        workers=workers.size,
    )


def summary(results: Sequence[BlockResult], folder: Path, *, seconds: float, workers: int) -> EncodeResult:
    """All blocks together.

    Raises:
        MemoryNeverAppearsError: they have no page.
    """
    result = EncodeResult(
        folder=folder,
        shards=len(results),
        pages=sum(block.pages for block in results),
        encoded=sum(block.encoded for block in results),
        size=sum(block.size for block in results),
        seconds=seconds,
        workers=workers,
    )
    if results and not result.pages:
        raise MemoryNeverAppearsError(
            "there is nothing to encode: no prompt of the data has a memory. Lower memory.context_threshold or "
            "memory.recent_tokens, or give longer conversations; `ocrmem train` says which of them it is."
        )
    return result


class BlockEncoder:
    """Encodes blocks of one config; every process that works on it makes the same list of them.

    Args:
        device: where the encoder runs.
        batch_size: pages that it is given at once.
        pages_per_shard: pages of a block, about.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = BATCH_SIZE,
        pages_per_shard: int = PAGES_PER_SHARD,
    ) -> None:
        if config.objectives is not None:
            raise ConfigError(
                "this config has objectives: their corpora are kept as one bank, which the first `ocrmem train` of it "
                "draws and encodes, on every GPU that it sees. `ocrmem encode` is for `data`."
            )
        cache = feature_folder(config)
        refuse_file(cache)
        if config.encoder.dtype == "bfloat16":
            check_bfloat16(["encoder.dtype=bfloat16"], torch.device(device))
        self.config = config
        self.processor = build_processor(config)
        self.encoder = self.processor.encoder
        self.encoder.to(device)  # pyright: ignore[reportCallIssue]
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.shards = ShardFolder(cache, profile_of(config, self.processor))
        self.blocks = plan_blocks(config, self.processor, pages_per_shard=pages_per_shard)
        self._salt = json.dumps([dataclasses.asdict(config.memory), _tokenizer_identity(self.processor)])

    def prepare(self) -> None:
        """Say in the cache what its features are made with, what else it holds, and sweep what killed processes
        left."""
        for path in self.shards.left_over():
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                log.warning("half-written shard %s is removed; its pages are encoded again", path)
                path.unlink(missing_ok=True)
        if not self.shards.count():
            warn_of_others(self.shards)
        self.shards.prepare()

    def name(self, block: Block) -> str:
        """Hex digest of what decides which pages a block has: its text, the memory settings, the tokenizer."""
        total = hashlib.sha256(self._salt.encode())
        total.update(json.dumps(block.replies).encode())
        for conversation in block.conversations:
            total.update(json.dumps([(message.role, message.content) for message in conversation.messages]).encode())
        return total.hexdigest()[:40]

    def run(self, number: int) -> BlockResult:
        """Encode a block, unless its shard is there and whole."""
        block = self.blocks[number]
        name = self.name(block)
        there = self.shards.state(name)
        if there is not None:
            return BlockResult(pages=there, encoded=0, size=self.shards.path(name).stat().st_size)
        keys: list[str] = []
        features: list[torch.Tensor] = []
        waiting: list[Page] = []
        running: torch.Tensor | None = None
        for key, page in self._pages(block):
            keys.append(key)
            waiting.append(page)
            if len(waiting) == self.batch_size:
                # A GPU works on one batch while the next one is drawn.
                done, running, waiting = running, self._launch(waiting), []
                features += self._collect(done)
        features += self._collect(running)
        features += self._collect(self._launch(waiting) if waiting else None)
        size = self.shards.write(name, keys, features, width=self.encoder.feature_width)
        return BlockResult(pages=len(keys), encoded=len(keys), size=size)

    def _pages(self, block: Block):
        """Key and page of every page of a block, each once, in reading order."""
        seen: set[str] = set()
        chosen = block.replies or (None,) * len(block.conversations)
        for conversation, replies in zip(block.conversations, chosen, strict=True):
            counts = self.processor.count(conversation.messages)
            for reply in usable_replies(counts, self.processor) if replies is None else replies:
                _, text, pages = self.processor.draw(counts, reply)
                for key, page in zip(self.processor.page_keys(text, pages), pages, strict=True):
                    if key not in seen:
                        seen.add(key)
                        yield key, page

    def _launch(self, pages: list[Page]) -> torch.Tensor:
        try:
            with torch.no_grad():
                return self.encoder(stack_pages(pages, self.encoder).to(self.device))
        except torch.OutOfMemoryError as error:
            held = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0
            raise ConfigError(
                f"too little memory on {self.device} for {self.batch_size} pages at once: the encoder held {held:.2f} "
                f"GiB and needed more. Give a lower --batch-size than {self.batch_size}; shards that are written stay."
            ) from error

    def _collect(self, features_PVE: torch.Tensor | None) -> list[torch.Tensor]:
        if features_PVE is None:
            return []
        rounded_PVE = round_features(features_PVE, self.processor.feature_dtype, self.encoder.name).cpu()
        return [used_rows(features_VE) for features_VE in rounded_PVE]


def plan_blocks(config: TrainConfig, processor: MEMProcessor, *, pages_per_shard: int = PAGES_PER_SHARD) -> list[Block]:
    """The blocks of a config: runs of conversations of `data.train`, then the evaluation samples.

    Nothing is drawn or tokenised for the training data, so that the list is there at once.
    """
    blocks: list[Block] = []
    run: list[Conversation] = []
    pages = 0
    for conversation in read_data(config.data.train, config.data):
        run.append(conversation)
        pages += _estimated_pages(conversation)
        if pages >= pages_per_shard:
            blocks.append(Block(tuple(run)))
            run, pages = [], 0
    if run:
        blocks.append(Block(tuple(run)))
    evaluation = build_eval_dataset(config, processor)
    return blocks if evaluation is None else blocks + _evaluation_blocks(evaluation, pages_per_shard)


def _estimated_pages(conversation: Conversation) -> int:
    """A last page for every reply, and the full pages."""
    replies = sum(message.role == "assistant" for message in conversation.messages)
    return replies + sum(len(message.content) for message in conversation.messages) // CHARS_PER_PAGE


def _evaluation_blocks(dataset: Dataset, pages_per_shard: int) -> list[Block]:
    indices: Sequence[int]
    if isinstance(dataset, Subset):
        dataset, indices = dataset.dataset, dataset.indices
    else:
        assert isinstance(dataset, MEMDataset)
        indices = range(len(dataset))
    assert isinstance(dataset, MEMDataset)
    chosen: dict[str, tuple[Conversation, list[int]]] = {}
    for index in indices:
        conversation, message = dataset.reply(index)
        chosen.setdefault(conversation.source, (conversation, []))[1].append(message)
    blocks: list[Block] = []
    run: list[tuple[Conversation, tuple[int, ...]]] = []
    pages = 0
    for number, (conversation, messages) in enumerate(chosen.values(), start=1):
        run.append((conversation, tuple(messages)))
        pages += len(messages) + sum(len(message.content) for message in conversation.messages) // CHARS_PER_PAGE
        if pages >= pages_per_shard or number == len(chosen):
            blocks.append(Block(tuple(conversation for conversation, _ in run), tuple(replies for _, replies in run)))
            run, pages = [], 0
    return blocks


def profile_of(config: TrainConfig, processor: MEMProcessor) -> FeatureProfile:
    """What the features of a config are made with."""
    return FeatureProfile(
        encoder_identity=processor.encoder_identity,
        render_identity=processor.render_identity,
        dtype=config.memory.feature_dtype,
        encoder=dataclasses.asdict(config.encoder),
        page=dataclasses.asdict(processor.encoder.page),
    )


def warn_of_others(shards: ShardFolder) -> None:
    """Say which features are in the cache that this config cannot use, and why."""
    for other in shards.others():
        log.warning(
            "the feature cache %s holds shards that were made otherwise and are not used: %s",
            shards.folder.parent.parent,
            shards.profile.differences(other),
        )


def _tokenizer_identity(processor: MEMProcessor) -> list[Any]:
    tokenizer = processor.tokenizer
    probe = tokenizer("Identity 1234 of a\ttokenizer…")["input_ids"]
    return [type(tokenizer).__name__, len(tokenizer), probe, processor.memory_token, str(tokenizer.chat_template)]
