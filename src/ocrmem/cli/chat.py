"""`ocrmem chat`: talk to an LLM whose long history is a visual memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ocrmem.data.processor import MEMProcessor
    from ocrmem.model.mem_model import MEMModel
    from ocrmem.types import Message


def command(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, as `ocrmem train` writes it.")],
    history: Annotated[
        str | None,
        typer.Argument(help="Earlier conversation: a JSONL file (its first line), a text file, or - for stdin."),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option("--question", "-q", help="Ask this and exit. None: read questions from the terminal."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as JSON with its token counts.")] = False,
) -> None:
    """Answer questions on a conversation, its older part read through the visual memory.

    What became memory, and at which ratio, is said on stderr.
    """
    from ocrmem.data.processor import MEMProcessor
    from ocrmem.errors import ConfigError
    from ocrmem.model.mem_model import MEMModel
    from ocrmem.types import Message

    if history == "-" and question is None:
        raise ConfigError("the history comes from stdin, so questions cannot: give one with --question.")
    messages = [] if history is None else read_history(history)
    model = MEMModel.from_pretrained(adapter, device=device)
    processor = MEMProcessor.from_model(model)
    if question is not None:
        answer(model, processor, [*messages, Message("user", question)], max_new_tokens, temperature, as_json)
        return
    while (line := read_question()) is not None:
        messages.append(Message("user", line))
        reply = answer(model, processor, messages, max_new_tokens, temperature, as_json)
        messages.append(Message("assistant", reply))


def read_question() -> str | None:
    """The next non-empty line from the terminal or stdin; None at its end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line:
            return line


def read_history(source: str) -> list[Message]:
    """The messages of a conversation file; a text without JSON is one user message.

    Raises:
        DataError: the file cannot be read, or its first line is JSON but no conversation.
    """
    from ocrmem.data.conversations import parse_history
    from ocrmem.errors import DataError

    if source == "-":
        return parse_history(sys.stdin.read(), source="stdin")
    try:
        text = Path(source).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(
            f"history {source!r} cannot be read: {error.strerror or error}. Give a JSONL or text file, or - for stdin."
        ) from None
    return parse_history(text, source=source)


def answer(
    model: MEMModel,
    processor: MEMProcessor,
    messages: list[Message],
    max_new_tokens: int,
    temperature: float,
    as_json: bool,
) -> str:
    """Generate one reply, streaming it to stdout unless JSON is wanted."""
    from transformers import TextStreamer

    prompt = processor.prompt(messages)
    if not as_json:
        print(prompt.split.summary(), file=sys.stderr)
    batch = processor([messages], device=model.device)
    streamer = None if as_json else TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    ids = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        pad_token_id=processor.pad_token_id,
        streamer=streamer,
        **sampling,
    )
    new_ids = ids[0, batch["input_ids"].shape[1] :]
    reply = str(processor.tokenizer.decode(new_ids, skip_special_tokens=True)).strip()
    if as_json:
        print(json.dumps({"answer": reply, "pages": len(prompt.pages), **prompt.split.as_json()}), flush=True)
    return reply
