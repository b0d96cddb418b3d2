"""`Memory`: one conversation without end, at the same cost for every turn.

```
append ─▶ messages (on disk, if there is a store)
prompt ─▶ turns that are no longer recent ─▶ tail page ─▶ full pages, within the budget ─▶ features, each made once
      └─▶ [system, pages, ledger, recalled text] [recent turns] [question] ─▶ LLM, keys and values of the front reused
```
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch

from ocrmem.config.growing import GrowingSettings
from ocrmem.data.conversations import parse_conversation
from ocrmem.data.processor import MEMProcessor, stack_pages
from ocrmem.errors import DataError
from ocrmem.memory.chat_format import num_leading_system
from ocrmem.memory.features import encode_pages
from ocrmem.memory.growing_pages import GrowingPages, MemoryPage
from ocrmem.memory.history import history_text, turn_text
from ocrmem.memory.ledger import Ledger
from ocrmem.memory.recall import SHARED, PageIndex, Passages, best, recalled_text
from ocrmem.memory.split import Split, TokenCounts, find_recent_start
from ocrmem.model.mem_model import MEMModel
from ocrmem.render.files import save_png
from ocrmem.session.prompt import MemoryPrompt, MemoryTokens, fitted
from ocrmem.session.reader import PrefixReader
from ocrmem.session.replies import Decoder
from ocrmem.types import Message

if TYPE_CHECKING:
    from ocrmem.memory.store import MemoryStore
    from ocrmem.session.keeper import Keeper

log = logging.getLogger(__name__)

LEDGER_OF_REPLACED = 8
"""A ledger takes at most this part of the text tokens that the memory replaces: one eighth of a short memory's text."""
LEDGER_HEADING = "Exact names and numbers from it, newest first: "
RECALL_HEADING = "Quoted from it:\n"


class Memory:
    """A conversation whose older part is a visual memory that grows with it.

    Args:
        model: in eval mode, on its device.
        processor: the one that fits the model; None: `MEMProcessor.from_model(model)`.
        settings: the memory's budget; None: the defaults.
        store: where the conversation is kept; None: in this process alone.
        conversation: its name in the store; made there if it is new.
        reencode: where the stored pages were made with another encoder, LLM or page settings, draw and encode the
            conversation again; False: refuse it.
        wait: seconds to wait for another process that writes the conversation.

    Raises:
        ConfigError: the budget has no room for a few pages, or a package that `settings` needs is not installed.
        StoreBusyError: another process writes the conversation.
        StoreMismatchError: the stored pages were made with other parts, and `reencode` is False.
    """

    def __init__(
        self,
        model: MEMModel,
        processor: MEMProcessor | None = None,
        *,
        settings: GrowingSettings | None = None,
        store: MemoryStore | None = None,
        conversation: str = "default",
        reencode: bool = False,
        wait: float = 0.0,
    ) -> None:
        self.model = model
        self.processor = processor or MEMProcessor.from_model(model)
        self.settings = (settings or GrowingSettings()).resolved(self.processor.encoder.tokens_per_page)
        self._index = PageIndex() if self.settings.recall else None
        self._reader = PrefixReader(model)
        self._decoder = Decoder(self._reader, self.processor)
        self._start_empty()
        self._keeper: Keeper | None = None
        if store is not None:
            from ocrmem.session.keeper import Keeper, made_with  # needs SQLAlchemy

            recorded = made_with(model, self.processor, self.settings)
            self._keeper = Keeper(store, conversation, memory=recorded, wait=wait)
            try:
                self._load(reencode)
            except BaseException:
                self._keeper.close()
                raise

    @classmethod
    def from_adapter(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        settings: GrowingSettings | None = None,
        store: MemoryStore | None = None,
        conversation: str = "default",
        reencode: bool = False,
        wait: float = 0.0,
    ) -> Self:
        """Load an adapter folder with the frozen parts that it names, and open a memory on it; arguments as above."""
        model = MEMModel.from_pretrained(folder, device=device)
        return cls(model, settings=settings, store=store, conversation=conversation, reencode=reencode, wait=wait)

    def close(self) -> None:
        """Let other processes write the conversation; what was appended is on disk already."""
        self._reader.forget()
        if self._keeper is not None:
            self._keeper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, oldest first."""
        return list(self._messages)

    @property
    def pages(self) -> list[MemoryPage]:
        """The pages that the conversation so far has in a prompt, oldest first; empty while all of it stays text."""
        return list(self.prompt().pages)

    @property
    def tokens(self) -> MemoryTokens:
        """What the prompt of the conversation so far is made of, in tokens."""
        return self.prompt().tokens

    def append(self, message: Message | Mapping[str, Any]) -> None:
        """Take a message behind all others. With a store it is on disk when this returns.

        Raises:
            DataError: it is no message.
            StoreError: it could not be written; the conversation is as it was.
        """
        self.extend([message])

    def extend(self, messages: Sequence[Message | Mapping[str, Any]]) -> None:
        """`append` several messages; with a store, all of them or none."""
        new = [_as_message(message) for message in messages]
        if not new:
            return
        if self._keeper is not None:
            self._keeper.append(new, position=len(self._messages))
        self._take(new)

    def prompt(self, question: str | None = None) -> MemoryPrompt:
        """The prompt for a reply to the conversation so far and, if given, a question; nothing is appended.

        Pages that are new are drawn, encoded and, with a store, kept.

        Raises:
            DataError: there is neither a message nor a question, or the template refuses the turns.
            ConfigError: the prompt is longer than the LLM can read.
        """
        asked = [] if question is None else [Message("user", question)]
        messages = [*self._messages, *asked]
        if not messages:
            raise DataError("the conversation is empty and no question was given; append a message, or ask.")
        counts = self._counts(messages)
        memory = self.processor.memory
        prompt_tokens = counts.prompt_tokens(len(messages))
        if prompt_tokens > memory.context_threshold:
            recent = find_recent_start(counts, len(messages), memory.recent_tokens)
            if self._messages and self._messages[-1].role == "user":
                recent = min(recent, counts.last_user[len(self._messages)])  # it may still be answered
            self._grow(recent)
        pages = self._pages.pages if prompt_tokens > memory.context_threshold else []
        query = question if question is not None else _last_question(messages)
        ledger = self._ledger_text(counts) if pages else ""
        prompt = self._assembled(counts, pages, ledger, self._recalled(query, counts, pages, ledger))
        if prompt.recalled and not prompt.smaller:
            prompt = self._assembled(counts, pages, ledger, "")
        if prompt.ledger and not prompt.smaller:
            prompt = self._assembled(counts, pages, "", "")
        if prompt.pages and not prompt.smaller:
            prompt = self._assembled(counts, [], "", "")
        return fitted(prompt, self.model)

    @overload
    def reply(
        self,
        question: str | None = None,
        *,
        stream: Literal[False] = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str: ...

    @overload
    def reply(
        self,
        question: str | None = None,
        *,
        stream: Literal[True],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]: ...

    def reply(
        self,
        question: str | None = None,
        *,
        stream: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str | Iterator[str]:
        """Ask, and append both the question and the reply to the conversation.

        The question is appended before the LLM begins, and the reply when it ends; where a stream is closed early, or
        interrupted, what had come by then is the reply.

        Args:
            question: None: the conversation's last message, which must be the user's, is answered.
            stream: give the reply piece by piece as it comes.
            max_new_tokens: longest reply.
            temperature: 0: always the likeliest token.
            seed: of the sampling; None: torch's own state.

        Raises:
            DataError: nothing was asked.
            ConfigError: the prompt is longer than the LLM can read; nothing was appended.
        """
        if question is None and (not self._messages or self._messages[-1].role != "user"):
            raise DataError("nothing was asked: give a question, or append a user's message first.")
        prompt = self.prompt(question)
        if question is not None:
            self.append(Message("user", question))
        pieces = self._decoder.pieces(
            prompt,
            self._features,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        said = self._appended(pieces)
        return said if stream else "".join(said).strip()

    def show(self, folder: str | Path) -> list[Path]:
        """Write the memory's pages as PNG files, oldest first, and return their paths."""
        folder = Path(folder)
        paths = []
        for number, page in enumerate(self.pages, start=1):
            paths.append(folder / f"page-{number:04d}.png")
            save_png(self._pages.draw(page), paths[-1])
        return paths

    def logits(self, question: str | None = None) -> torch.Tensor:
        """float32 [vocabulary]: the logits of a reply's first token, keys and values of the stable prefix reused."""
        return self._reader.read(self.prompt(question).slots, self._features)

    @property
    def num_read(self) -> int:
        """Positions that the LLM computed for its last prompt; the rest of the prompt was reused."""
        return self._reader.num_read

    def forget(self, *, keep: int = 0) -> None:
        """Forget the conversation, or its messages from number `keep` on: text, pages, features, keys and values.

        With a store they are overwritten there too.
        """
        kept = self._messages[:keep]
        chars = len(history_text(kept[num_leading_system(kept) :]))
        whole = {page.key for page in self._pages.full if page.end <= chars}
        features = {key: features_VE for key, features_VE in self._features.items() if key in whole}
        if self._keeper is not None:
            self._keeper.forget(keep=len(kept))
        self._reader.forget()
        self._start_empty()
        self._features = features
        self._take(kept)

    def _start_empty(self) -> None:
        self._messages: list[Message] = []
        self._ends: list[int] = [0]
        """Tokens of the first i messages."""
        self._offsets: list[int] = [0]
        """Characters of the first i messages on pages, leading system messages left out."""
        self._last_user: list[int] = [-1]
        self._num_system = 0
        self._features: dict[str, torch.Tensor] = {}
        self._start_memory()

    def _start_memory(self) -> None:
        """Let no message be memory yet; features stay, so that the same pages need not be encoded again."""
        processor, settings = self.processor, self.settings
        self._in_memory = self._num_system
        """Messages, leading system messages included, that have become memory."""
        self._pages = GrowingPages(
            processor.encoder,
            densities=settings.densities,
            budget=settings.page_tokens - processor.chat_format.separator_tokens(has_system=False),
            page_key=processor.page_key,
        )
        self._ledger = Ledger(heading=LEDGER_HEADING, count_tokens=processor.chat_format.content_lengths)
        page = processor.encoder.page
        self._passages = Passages(
            page.lines_per_page * max(1, page.text_width // (page.cell_width or page.font_size // 2))
        )

    def _take(self, new: Sequence[Message]) -> None:
        lengths = self.processor.chat_format.content_lengths([message.content for message in new])
        overheads = self.processor.chat_format.overheads
        for message, length in zip(new, lengths, strict=True):
            first, number = not self._messages, len(self._messages)
            own = 0 if first and message.role == "system" else overheads[message.role]  # else it is in the base
            self._ends.append(self._ends[-1] + length + own)
            leading = message.role == "system" and self._num_system == number
            self._num_system += leading
            self._offsets.append(self._offsets[-1] + (0 if leading else len(turn_text(message))))
            self._last_user.append(number if message.role == "user" else self._last_user[-1])
            self._messages.append(message)
        self._in_memory = max(self._in_memory, self._num_system)

    def _counts(self, messages: Sequence[Message]) -> TokenCounts:
        ends, last_user = list(self._ends), list(self._last_user)
        chat_format = self.processor.chat_format
        for number in range(len(self._messages), len(messages)):
            (length,) = chat_format.content_lengths([messages[number].content])
            ends.append(ends[-1] + length + chat_format.overheads[messages[number].role])
            last_user.append(number)
        has_system = self._num_system > 0
        return TokenCounts(
            messages=tuple(messages),
            num_system=self._num_system,
            base=chat_format.base_length(has_system=has_system),
            ends=tuple(ends),
            separator_tokens=chat_format.separator_tokens(has_system=has_system),
            last_user=tuple(last_user),
        )

    def _grow(self, recent: int) -> None:
        """Turn the messages before number `recent` into memory, and see to the features of every page."""
        if recent > self._in_memory:
            turns = self._messages[self._in_memory : recent]
            before = self._pages.left_out
            try:
                text = history_text(turns)
                self.processor.warn_of_unread(text)
                self._pages.append(text)
                for turn in turns:
                    self._ledger.add(turn.content)
                self._leave_out(before)
            except BaseException:  # Ctrl-C comes at any time; half of it would be neither here nor there
                self._start_memory()
                raise
            self._in_memory = recent
        missing = {page.key: page for page in self._pages.pages if page.key not in self._features}
        for page in missing.values():
            self._features[page.key] = self._encoded(page)
        held = {page.key for page in self._pages.pages}
        self._features = {key: features_VE for key, features_VE in self._features.items() if key in held}
        if self._keeper is not None:
            self._keeper.keep_pages(self._pages.full, self._features)

    def _leave_out(self, before: int) -> None:
        """Let text that has left the pages since then be found by recall."""
        after = self._pages.left_out
        if after > before:
            self._passages.append(self._text(before, after))

    def _encoded(self, page: MemoryPage) -> torch.Tensor:
        """features_VE of a page, on the CPU. Each is encoded alone, so that they are the same whenever it is made."""
        encoder, processor = self.processor.encoder, self.processor
        features_PVE = encode_pages(
            encoder,
            stack_pages([self._pages.draw(page)], encoder),
            [page.key],
            store=processor.store,
            dtype=processor.feature_dtype,
            device=next(self.model.proj.parameters()).device,
        )
        return features_PVE[0].cpu()

    def _text(self, start: int, end: int) -> str:
        """Characters of the history, as it is drawn."""
        first = bisect_right(self._offsets, start, lo=self._num_system) - 1
        last = bisect_right(self._offsets, end - 1, lo=self._num_system) - 1
        offset = self._offsets[first]
        return history_text(self._messages[first : last + 1])[start - offset : end - offset]

    def _ledger_text(self, counts: TokenCounts) -> str:
        replaced = counts.ends[self._in_memory] - counts.ends[self._num_system]
        budget = min(self.settings.ledger_tokens, replaced // LEDGER_OF_REPLACED)
        return self._ledger.text(budget) if budget else ""

    def _recalled(self, question: str, counts: TokenCounts, pages: Sequence[MemoryPage], ledger: str) -> str:
        """Text of the pages that matter for a question."""
        if self._index is None or not pages or not question:
            return ""
        chat_format = self.processor.chat_format
        texts = [*self._passages.all, *(page.text for page in pages)]
        shared = SHARED
        if self.settings.recall_by == "bm25":
            chosen = best(self._index.scores(texts, question), self.settings.recall)
        else:
            attention_P = self.page_attention(self._assembled(counts, pages, ledger, ""))
            chosen = [len(texts) - len(pages) + i for i in attention_P.argsort(descending=True)[: self.settings.recall]]
            shared = 0.0  # what it finds need not share a word with the question
        (heading,) = chat_format.content_lengths([RECALL_HEADING])
        found = recalled_text(
            [texts[i] for i in sorted(chosen)],
            question,
            budget=self.settings.recall_tokens - heading,
            count_tokens=chat_format.content_lengths,
            shared=shared,
        )
        return RECALL_HEADING + found if found else ""

    def page_attention(self, prompt: MemoryPrompt) -> torch.Tensor:
        """float32 [pages of the prompt]: how much the prompt's last user turn looks at a memory token of each page."""
        chat_format = self.processor.chat_format
        asked = chat_format.clean(_last_question(prompt.split.recent)).strip()
        last = max(1, len(chat_format.ids(prompt.text[prompt.text.rfind(asked) :])))
        attention_S = self._reader.attention(prompt.slots, self._features, last=last)
        places = torch.tensor(prompt.input_ids) == self.processor.memory_token_id
        counts = [page.num_tokens for page in prompt.pages]
        return torch.stack([part.mean() for part in attention_S[places].split(counts)])

    def _assembled(self, counts: TokenCounts, pages: Sequence[MemoryPage], ledger: str, recalled: str) -> MemoryPrompt:
        end, num_system = len(counts.messages), counts.num_system
        recent = self._in_memory if pages else num_system
        start = num_system
        if pages:
            # The first turn of which a page holds anything.
            start = min(bisect_right(self._offsets, pages[0].start, lo=num_system) - 1, recent)
        split = Split(
            messages=counts.messages,
            end=end,
            num_system=num_system,
            history_start=start,
            recent_start=recent,
            prompt_tokens=counts.prompt_tokens(end),
            dropped_tokens=counts.ends[start] - counts.ends[num_system],
            history_tokens=counts.ends[recent] - counts.ends[start],
            separator_tokens=0,
            placeholder_tokens=sum(page.num_tokens for page in pages),
        )
        return MemoryPrompt.of(
            split,
            pages,
            ledger=ledger,
            recalled=recalled,
            processor=self.processor,
            budget=self.settings.tokens,
            num_levels=len(self.settings.densities),
        )

    def _appended(self, pieces: Iterator[str]) -> Iterator[str]:
        """Pass a reply's pieces on, and append what has come when they end or nobody wants more."""
        said: list[str] = []
        done = False
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
            done = True
        finally:
            if done or said:
                self.append(Message("assistant", "".join(said).strip()))

    def _load(self, reencode: bool) -> None:
        assert self._keeper is not None
        self._take(self._keeper.messages())
        full, features = self._keeper.load_pages(self._text, self._offsets[-1], self._pages, reencode=reencode)
        self._features = features
        if full:
            self._pages.restore(full, left_out=full[0].start)
            self._leave_out(0)
            reached = bisect_right(self._offsets, full[-1].end - 1, lo=self._num_system)
            for turn in self._messages[self._num_system : reached]:
                self._ledger.add(turn.content)
            self._pages.append(self._text(full[-1].end, self._offsets[reached]))
            self._in_memory = reached


def _as_message(message: Message | Mapping[str, Any]) -> Message:
    if isinstance(message, Message):
        return message
    return parse_conversation({"messages": [message]}, source="the message", require_reply=False).messages[0]


def _last_question(messages: Sequence[Message]) -> str:
    return next((message.content for message in reversed(messages) if message.role == "user"), "")
