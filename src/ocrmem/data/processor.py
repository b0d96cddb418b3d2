"""`MEMProcessor`: conversations in, what `MEMModel` takes out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch

from ocrmem.config.memory import MemorySettings
from ocrmem.data.conversations import parse_conversation
from ocrmem.encoders.base import OCREncoder
from ocrmem.errors import ConfigError, DataError, SpliceError
from ocrmem.memory.chat_format import ChatFormat
from ocrmem.memory.features import FeatureStore, encode_pages, page_key
from ocrmem.memory.history import history_text
from ocrmem.memory.pages import HistoryPages
from ocrmem.memory.placeholder import choose_memory_token
from ocrmem.memory.split import Split, TokenCounts, split_prompt
from ocrmem.model.reader import UNKNOWN, unread
from ocrmem.render.renderer import Renderer, render_identity
from ocrmem.types import Conversation, Message, Page

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ocrmem.model.mem_model import MEMModel

log = logging.getLogger(__name__)

UNREAD_SHARE = 0.05
"""Share of a text's characters that a projection may not read without a warning: a conversation has some emoji."""

Chat = Conversation | Sequence[Message] | Sequence[Mapping[str, Any]]
"""One conversation in any of the forms that callers have."""


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """One prompt, ready for the LLM but for the features of its pages."""

    text: str
    """What the chat template wrote, placeholders included."""
    input_ids: list[int]
    """Its token ids."""
    pages: list[Page]
    """The history's pages, in order; empty without memory."""
    page_keys: list[str]
    """`page_key` of each page."""
    page_num_tokens: list[int]
    """Memory tokens in use of each page."""
    split: Split
    """What became memory and what stayed text."""


class MEMProcessor:
    """Turns conversations into the inputs of a `MEMModel`.

    ```
    messages ─▶ split ─▶ history ─▶ pages ─▶ features ─▶ placeholders in the system turn
                     └─▶ recent turns ─▶ chat template ─▶ input_ids
    ```

    `memory.chat_format.ChatFormat` says where the memory goes, and what happens to system and tool messages
    that a template refuses. Content that holds the placeholder's text, or lone surrogates, is changed for the
    tokenizer alone; pages draw it as it is.

    Args:
        tokenizer: the LLM's, with a chat template.
        encoder: the OCR encoder; its `page` settings are those of the pages.
        memory: when history becomes memory.
        memory_token: the placeholder's text and id, from `choose_memory_token`; None: it is chosen.
        store: cache of features, for calls with `encode=True`; None: every page is encoded each time.
        reads_letters: the model's projection does (`projection.read_tokens`), so that other letters are warned of.

    Raises:
        ConfigError: the tokenizer has no chat template, no token to pad with, or no token for the
            placeholder.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder: OCREncoder,
        memory: MemorySettings,
        memory_token: tuple[str, int] | None = None,
        store: FeatureStore | None = None,
        reads_letters: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.memory = memory
        self.store = store
        self.memory_token, self.memory_token_id = memory_token or choose_memory_token(tokenizer)
        self.pad_token_id = _pad_token_id(tokenizer)
        self.chat_format = ChatFormat(tokenizer, memory_token=self.memory_token, header=memory.header)
        self.feature_dtype: torch.dtype = getattr(torch, memory.feature_dtype)
        self._renderer = Renderer(encoder.page)
        self._history_pages = HistoryPages(self._renderer)
        self.encoder_identity = encoder.identity()
        self.render_identity = render_identity(encoder.page)
        self._warns = reads_letters

    @classmethod
    def from_model(
        cls,
        model: MEMModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        store: FeatureStore | None = None,
    ) -> Self:
        """The processor that fits a model: its encoder, its settings, its placeholder.

        Args:
            tokenizer: None: that of the LLM which the model's config names.
        """
        if tokenizer is None:
            from ocrmem.model.llm import load_tokenizer

            tokenizer = load_tokenizer((model.config.llm or {}).get("name", model.base_llm_model.name_or_path))
        if model.config.memory_token is None or model.config.memory_token_id is None:
            raise ConfigError("the model's config has no memory_token; build it with MEMConfig.from_settings.")
        return cls(
            tokenizer,
            encoder=model.ocr_embed,
            memory=model.config.memory_settings,
            memory_token=(model.config.memory_token, model.config.memory_token_id),
            store=store,
            reads_letters=model.proj.reader is not None,
        )

    def pages(self, text: str) -> list[Page]:
        """The pages of a text, drawn as a history is."""
        return self._renderer.pages(text)

    def count(self, messages: Sequence[Message]) -> TokenCounts:
        """Tokenise every message of a conversation once; for `prepare`."""
        return TokenCounts.of(messages, chat_format=self.chat_format)

    def prompt(self, conversation: Chat) -> PreparedPrompt:
        """The prompt for the reply that comes after all messages of one conversation."""
        messages = conversation.messages if isinstance(conversation, Conversation) else conversation
        if not messages:
            raise DataError("the prompt is empty: no messages were given. Give at least one user message.")
        messages = _as_messages(messages, 0)
        return self.prepare(self.count(messages), len(messages))

    def prepare(self, counts: TokenCounts, end: int) -> PreparedPrompt:
        """The prompt for the reply that comes after the first `end` messages of a counted conversation.

        Raises:
            SpliceError: the template lost or repeated placeholders.
            DataError: the template refuses the messages.
        """
        split, text, pages = self.draw(counts, end)
        prompt_text = self.prompt_text(split)
        input_ids = self.chat_format.ids(prompt_text)
        found = input_ids.count(self.memory_token_id)
        if found != split.placeholder_tokens:
            raise SpliceError(
                f"the prompt holds {found} placeholders {self.memory_token!r} (id {self.memory_token_id}) "
                f"but the pages give {split.placeholder_tokens} memory tokens; the two must be equal. The "
                f"chat template of {self.tokenizer.name_or_path!r} loses, repeats or itself writes the "
                "placeholder: choose another memory_token, or set another chat template."
            )
        return PreparedPrompt(
            text=prompt_text,
            input_ids=input_ids,
            pages=pages,
            page_keys=self.page_keys(text, pages),
            page_num_tokens=[self.encoder.num_tokens(page) for page in pages],
            split=split,
        )

    def draw(self, counts: TokenCounts, end: int) -> tuple[Split, str, list[Page]]:
        """The prompt's split, the text of its history and that text's pages; none where all stays text."""
        split = split_prompt(counts, end, settings=self.memory)
        if not split.history:
            return split, "", []
        text = history_text(split.history)
        self.warn_of_unread(text)
        pages = self._history_pages.pages(text)
        split = split.with_memory(sum(map(self.encoder.num_tokens, pages)))
        return split, text, pages if split.placeholder_tokens else []

    def warn_of_unread(self, text: str) -> None:
        """Say, but once, if much of what goes on pages is in letters that the model's projection does not read."""
        if not self._warns:
            return
        others = unread(text)
        if len(others) > UNREAD_SHARE * len(text):
            self._warns = False
            log.warning(
                "%d of %d characters are none that this projection reads (%s…); in the memory each is %r. It reads the "
                "Latin letters of Western and Central Europe (projection.read_tokens); for other text, train an "
                "adapter with projection.read_tokens=0.",
                len(others),
                len(text),
                ", ".join(f"U+{ord(character):04X}" for character in list(dict.fromkeys(others))[:3]),
                UNKNOWN,
            )

    def prompt_text(self, split: Split, *, reply: Message | None = None) -> str:
        """What the chat template writes for a split prompt, ready for a reply, or with the reply in place."""
        messages = [*split.system, *split.recent, *([] if reply is None else [reply])]
        return self.chat_format.text(
            messages, add_generation_prompt=reply is None, num_placeholders=split.placeholder_tokens
        )

    def smallest_memory(self) -> int:
        """Placeholders of the smallest memory there is: a page with one character."""
        return sum(map(self.encoder.num_tokens, self._renderer.pages("a")))

    def page_key(self, page_text: str, render_identity: str | None = None) -> str:
        """Key of a page's features in a `FeatureStore`.

        Args:
            render_identity: of other page settings than the encoder's own.
        """
        return page_key(
            page_text,
            encoder_identity=self.encoder_identity,
            render_identity=render_identity or self.render_identity,
            dtype=self.feature_dtype,
        )

    def page_keys(self, text: str, pages: Sequence[Page]) -> list[str]:
        """`page_key` of each page of a text."""
        return [self.page_key(text[page.text_start : page.text_end]) for page in pages]

    def __call__(
        self,
        conversations: Chat | Sequence[Chat],
        *,
        encode: bool = True,
        device: torch.device | str | None = None,
    ) -> dict[str, torch.Tensor]:
        """A batch for `MEMModel.generate`, padded on the left, each prompt ready for a reply.

        Args:
            conversations: one conversation or several, each a `Conversation`, a list of `Message`s or a list
                of `{"role": …, "content": …}`.
            encode: give features (from the store, if there is one) instead of pages.
            device: where the tensors go; the encoder must be there too if it is to encode. None: the
                encoder's.

        Returns:
            int64 `input_ids` and `attention_mask` [B, S]; and where any prompt has a memory, `features`
            [P, V, E] or uint8 `pages` [P, H, W], and int64 `page_num_tokens` [P] and `num_pages` [B].
        """
        if device is None:
            device = next((parameter.device for parameter in self.encoder.parameters()), torch.device("cpu"))
        device = torch.device(device)
        prompts = [self.prompt(messages) for messages in _as_batch(conversations)]
        longest = max(len(prompt.input_ids) for prompt in prompts)
        rows, masks = [], []
        for prompt in prompts:
            pad = longest - len(prompt.input_ids)
            rows.append([self.pad_token_id] * pad + prompt.input_ids)
            masks.append([0] * pad + [1] * len(prompt.input_ids))
        batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
        pages = [page for prompt in prompts for page in prompt.pages]
        if pages:
            keys = [key for prompt in prompts for key in prompt.page_keys]
            pages_PHW = stack_pages(pages, self.encoder)
            if encode:
                batch["features"] = encode_pages(
                    self.encoder, pages_PHW, keys, store=self.store, dtype=self.feature_dtype, device=device
                )
            else:
                batch["pages"] = pages_PHW
            batch["page_num_tokens"] = torch.tensor([n for prompt in prompts for n in prompt.page_num_tokens])
            batch["num_pages"] = torch.tensor([len(prompt.pages) for prompt in prompts])
        return {name: tensor.to(device) for name, tensor in batch.items()}


def stack_pages(pages: Sequence[Page], encoder: OCREncoder) -> torch.Tensor:
    """pages_PHW uint8; P may be 0."""
    if not pages:
        return torch.zeros(0, encoder.page.page_height, encoder.page.page_width, dtype=torch.uint8)
    return torch.from_numpy(np.stack([page.image_HW for page in pages]))


def _as_batch(conversations: Chat | Sequence[Chat]) -> list[tuple[Message, ...]]:
    if isinstance(conversations, Conversation):
        return [conversations.messages]
    if not conversations:
        raise DataError("no conversation was given. Give one, or a list of them.")
    first = conversations[0]
    if isinstance(first, (Message, Mapping)):
        return [_as_messages(cast("Chat", conversations), 0)]
    return [_as_messages(cast("Chat", chat), i) for i, chat in enumerate(conversations)]


def _as_messages(chat: Chat, number: int) -> tuple[Message, ...]:
    if isinstance(chat, Conversation):
        return chat.messages
    source = f"conversation {number}"
    if all(isinstance(message, Message) for message in chat) and chat:
        return tuple(cast("Sequence[Message]", chat))
    return parse_conversation({"messages": list(chat)}, source=source, require_reply=False).messages


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Pad id, or the end-of-text id where there is none: padding is masked, so any id does."""
    for index in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(index, int):
            return index
    raise ConfigError(
        f"the tokenizer {tokenizer.name_or_path!r} has neither a pad token nor an end-of-text token; set "
        "tokenizer.pad_token."
    )
