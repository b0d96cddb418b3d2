"""How one LLM's chat template writes a conversation, with the memory in its place.

```
[system: its text, header, placeholders, exact part] [recent turns] [start of the reply]
```
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from ocrmem.errors import ConfigError, DataError
from ocrmem.memory.placeholder import text_for_tokenizer
from ocrmem.types import Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "PROBE-{}-TEXT"
"""Content by which a template is asked what it does; plain enough that no template changes it."""


class ChatFormat:
    """A chat template, asked once what it accepts.

    - A leading system message stays in front, and the memory goes to its end. Where the conversation has
      none, the memory goes into a system turn that begins with the template's own default system text, so
      that the memory changes nothing else about the prompt.
    - A template that refuses or drops system messages gets their text, and the memory, at the start of the
      first user turn.
    - A template that refuses or drops tool messages gets them as user turns that begin with `tool: `.
    - A template that wants user and assistant in turn gets neighbouring turns of one role as one turn, later
      system messages as user turns that begin with `system: `, and an empty user turn where the assistant
      speaks first.

    Args:
        tokenizer: the LLM's, with a chat template.
        memory_token: text of the placeholder.
        header: text in front of the memory tokens.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that cannot write a user turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, memory_token: str, header: str) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template. Use an instruct model's "
                "tokenizer, or set tokenizer.chat_template."
            )
        self.tokenizer = tokenizer
        self.memory_token = memory_token
        self.header = text_for_tokenizer(header, memory_token)
        user, assistant, again = _probe("user", 0), _probe("assistant", 1), _probe("user", 2)
        self.accepts_system = self.accepts_tool = True
        self.merges_turns = False
        if not self._shows([user]):
            raise ConfigError(
                f"the chat template of the tokenizer {tokenizer.name_or_path!r} does not write a user "
                "message's text, so conversations cannot be written for it. Set tokenizer.chat_template to "
                "one that does."
            )
        self.accepts_system = self._accepts_system()
        self.accepts_tool = self._shows([user, assistant, _probe("tool", 3)])
        self.merges_turns = not self._shows([user, again])
        self.default_system = self._default_system()
        self.num_reply_tail = self._num_reply_tail()

    def text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        num_placeholders: int = 0,
        after_memory: str = "",
    ) -> str:
        """The messages as the template writes them, with the memory's header and placeholders in front.

        Args:
            messages: leading system messages and the turns that stay text; at least one.
            add_generation_prompt: end with the start of an assistant turn.
            num_placeholders: memory tokens; 0: no memory and no header.
            after_memory: text behind the placeholders, in the same turn; it goes where they go.

        Raises:
            DataError: the template refuses the messages.
        """
        turns = self._turns(messages, num_placeholders, after_memory)
        try:
            return str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns[:12]) + (", …" if len(turns) > 12 else "")
            raise DataError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses these turns ({roles}): "
                f"{error}. Change the conversation, or set tokenizer.chat_template to one that takes it."
            ) from None

    def ids(self, text: str) -> list[int]:
        """Token ids of text that `text` wrote."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def content_lengths(self, contents: Sequence[str]) -> list[int]:
        """Tokens of each content, without its turn's own."""
        if not contents:
            return []
        cleaned = list(map(self.clean, contents))
        return [len(ids) for ids in self.tokenizer(cleaned, add_special_tokens=False, verbose=False)["input_ids"]]

    @functools.cached_property
    def overheads(self) -> dict[Role, int]:
        """Tokens that the template writes around the content of one turn of each role.

        The two of a user and assistant pair are measured together; only their sum matters where turns
        alternate.
        """
        content = self.content_lengths(["a"])[0]
        one = self._length([Message("user", "a")])
        three = self._length([Message("user", "a"), Message("assistant", "a"), Message("user", "a")])
        pair = three - one - 2 * content
        user = pair // 2
        return {"user": user, "assistant": pair - user, "system": user, "tool": user}

    def base_length(self, *, has_system: bool) -> int:
        """Tokens of a prompt that belong to no user, assistant or tool turn, the system content left out: the
        template's default system text, its system turn, and the start of the reply."""
        return self._bases[has_system]

    @functools.cached_property
    def _bases(self) -> dict[bool, int]:
        content = self.content_lengths(["a"])[0]
        user = content + self.overheads["user"]
        system_and_user = self._length([Message("system", "a"), Message("user", "a")])
        return {False: self._length([Message("user", "a")]) - user, True: system_and_user - content - user}

    @functools.cached_property
    def _separators(self) -> dict[bool, int]:
        counts = {}
        for has_system in (False, True):
            messages = [*([Message("system", "a")] if has_system else []), Message("user", "a")]
            with_memory = self.ids(self.text(messages, add_generation_prompt=True, num_placeholders=1))
            counts[has_system] = len(with_memory) - 1 - self._length(messages)
        return counts

    def separator_tokens(self, *, has_system: bool) -> int:
        """Tokens of a memory besides its placeholders: its header, and a system turn where there was none."""
        return self._separators[has_system]

    def _length(self, messages: Sequence[Message]) -> int:
        return len(self.ids(self.text(messages, add_generation_prompt=True)))

    def _turns(self, messages: Sequence[Message], num_placeholders: int, after_memory: str) -> list[dict[str, str]]:
        num_system = num_leading_system(messages)
        system = [self.clean(message.content) for message in messages[:num_system]]
        turns = [self._turn(message) for message in messages[num_system:]]
        if num_placeholders:
            memory = self.header + self.memory_token * num_placeholders + self.clean(after_memory)
            before = system.pop() if system else self.default_system
            system.append(f"{before}\n\n{memory}" if before else memory)
        if self.merges_turns:
            if turns and turns[0][0] == "assistant":
                turns.insert(0, ("user", ""))
            groups = groupby(turns, itemgetter(0))
            turns = [(role, "\n".join(text for _, text in group)) for role, group in groups]
        if system and not self.accepts_system:
            turns = _in_first_user_turn("\n\n".join(system), turns)
        elif system and self.merges_turns:
            turns.insert(0, ("system", "\n\n".join(system)))
        else:
            turns = [*(("system", text) for text in system), *turns]
        return [{"role": role, "content": text} for role, text in turns]

    def _turn(self, message: Message) -> tuple[str, str]:
        """Role and content of a turn after the leading system messages, as the template gets them."""
        text = self.clean(message.content)
        if message.role == "tool" and not self.accepts_tool:
            return "user", f"tool: {text}"
        if message.role == "system" and (self.merges_turns or not self.accepts_system):
            return "user", f"system: {text}"
        return message.role, text

    def clean(self, text: str) -> str:
        return text_for_tokenizer(text, self.memory_token)

    def _shows(self, messages: Sequence[Message]) -> bool:
        """Whether the template takes the messages and writes the text of each."""
        try:
            text = self.text(messages, add_generation_prompt=True)
        except DataError:
            return False
        return all(message.content in text for message in messages)

    def _accepts_system(self) -> bool:
        """Whether a system message is taken, and stays where it is when a reply comes (Mistral moves it)."""
        system, user, reply = _probe("system", 0), _probe("user", 1), _probe("assistant", 2)
        if not self._shows([system, user]):
            return False
        prompt = self.text([system, user], add_generation_prompt=True)
        whole = self.text([system, user, reply], add_generation_prompt=False)
        return prompt.index(system.content) < prompt.index(user.content) and whole.startswith(prompt)

    def _default_system(self) -> str:
        """The system text that the template writes where a conversation has none; "" if there is none."""
        if not self.accepts_system:
            return ""
        system, user = _probe("system", 0), _probe("user", 1)
        without = self.text([user], add_generation_prompt=True)
        before, _, after = self.text([system, user], add_generation_prompt=True).partition(system.content)
        length = len(without) - len(before) - len(after)
        if length < 0 or not without.startswith(before) or not without.endswith(after):
            return ""
        return without[len(before) : len(before) + length]

    def _num_reply_tail(self) -> int:
        """Tokens that the template writes after a reply's end-of-turn token (ChatML: the line break).

        The LLM never has to generate them, so they are no part of the reply.
        """
        reply = _probe("assistant", 1)
        text = self.text([_probe("user", 0), reply], add_generation_prompt=False)
        ids = self.ids(text.partition(reply.content)[2])
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special.update(self.tokenizer.all_special_ids)
        end = next((i for i, index in enumerate(ids) if index in special), None)
        return 0 if end is None else len(ids) - end - 1


def num_leading_system(messages: Sequence[Message]) -> int:
    """How many system messages the conversation begins with; they stay text whatever becomes memory."""
    return next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))


def _in_first_user_turn(text: str, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    for i, (role, content) in enumerate(turns):
        if role == "user":
            return [*turns[:i], (role, f"{text}\n\n{content}"), *turns[i + 1 :]]
    return [("user", text), *turns]


def _probe(role: Role, number: int) -> Message:
    return Message(role, PROBE.format(number))
