"""The main job, end to end, on two CPU cores: `make demo`.

A frozen SmolLM2-135M-Instruct has a visual memory: the older part of real conversations is drawn on pages, the frozen
PP-OCRv6-small reads them, and a projection hands its features to the LLM. Everything below is real: the weights, the
conversations, the training, and the answers of a new process.

Training goes on from the shipped adapter for some dozen steps on replies alone, enough to see that a run learns and
that nothing but the projection changes; a new process then answers through what was saved. So few steps on one task
cost much of what the adapter could read, so questions about held-out text go to the shipped adapter itself, in a
process of its own: without a memory, through it, and with the full text (`examples/questions.py`).
`configs/smollm2-pp-ocr-2x.yaml` is the run that taught it to read.

Leaves `demo/`: the pages, the loss plot, the adapter and `report.md`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import questions
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import TrainerCallback

from ocrmem.assets.fetch import catalogue, resolve
from ocrmem.config.train import TrainConfig, load_train_config
from ocrmem.data.conversations import read_conversations
from ocrmem.encoders.registry import build_encoder
from ocrmem.files import write_text
from ocrmem.memory.history import history_text
from ocrmem.render.files import save_png
from ocrmem.render.renderer import Renderer
from ocrmem.training.build import page_settings
from ocrmem.training.run import TrainResult, train

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo"
QUESTION = "What were we talking about at the beginning?"
console = Console(highlight=False)


def main() -> None:
    """Run every part in order and fail if a check does."""
    os.chdir(ROOT)
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    heading("1. Weights and data, each checked by its SHA-256")
    for asset in catalogue():
        console.print(f"  {asset.name:<24} {asset.license:<12} {resolve(asset.name, progress=console.print)}")
    config = load_train_config(ROOT / "configs" / "demo.yaml", sys.argv[1:])

    heading("2. A conversation of a held-out person, as the encoder sees it")
    history = show_pages(config)

    heading("3. Training the projection; both other parts are frozen")
    witness = Witness()
    result = train(config, callbacks=[witness])
    plot_losses(result, OUT / "loss.png")

    heading("4. What the seed document asks for")
    checks = witness.checks(result)
    print_checks(checks)

    heading("5. The saved adapter, loaded by a new process, answers on a long history")
    chat = ("-m", "ocrmem", "chat", result.adapter, history)
    answer = json.loads(in_new_process(*chat, "--question", QUESTION, "--max-new-tokens", 48, "--json"))
    console.print(f"  question: {QUESTION}\n  answer:   {escape(answer['answer'])}\n  {counts(answer)}")
    answered = bool(answer["answer"]) and answer["memory_tokens"] > 0
    checks.append(("a new process answered through the memory", answered, ""))

    heading("6. The shipped adapter, in a new process, is asked about text that it never saw")
    items = json.loads(in_new_process(questions.__file__, questions.ADAPTER, "--json"))
    questions.show(items, console)
    asked = [item for item in items if item["task"] in questions.ASKED]
    nothing, memory = (questions.mean_f1(asked, arm) for arm in ("none", "memory"))
    seen = f"token F1 {nothing:.2f} -> {memory:.2f}"
    checks.append(("answers with the memory are nearer than without", memory > nothing, seen))
    print_checks(checks[-2:])
    seconds = time.monotonic() - started
    write_report(result, checks, answer, items, seconds)
    console.print(f"\n[bold]{seconds:.0f} s in all.[/bold] See demo/report.md, demo/loss.png and demo/pages/.")
    if not all(passed for _, passed, _ in checks):
        sys.exit("error: a check failed; the table above says which.")


def heading(text: str) -> None:
    """A section title."""
    console.print(f"\n[bold]{text}[/bold]")


def show_pages(config: TrainConfig) -> Path:
    """Draw a long held-out conversation, read its first page back with the OCR head, and store the conversation."""
    conversations = read_conversations(resolve("chitchat") / "heldout.jsonl").conversations
    conversation = next(c for c in conversations if 4000 < sum(len(m.content) for m in c.messages) < 6000)
    history = OUT / "history.jsonl"
    write_text(history, json.dumps({"messages": [message.as_dict() for message in conversation.messages]}) + "\n")
    encoder = build_encoder(config.encoder, page=page_settings(config))
    text = history_text(conversation.messages)
    pages = Renderer(encoder.page).pages(text)
    (OUT / "pages").mkdir(parents=True)
    for number, page in enumerate(pages, start=1):
        save_png(page, OUT / "pages" / f"page-{number:02d}.png")
    console.print(f"  {len(text)} characters on {len(pages)} pages: demo/pages/page-01.png …")
    with torch.inference_mode():
        lines = encoder.read_lines(torch.from_numpy(pages[0].image_HW)[None])[0]
    console.print("  read back from the pixels by the encoder's own text head:")
    for line in lines[:4]:
        console.print(f"    [dim]{escape(line)}[/dim]")
    return history


@dataclass
class Witness(TrainerCallback):
    """Looks at a training run from outside: modes, grad_fns, and what changed."""

    modes: dict[str, bool] = field(default_factory=dict)
    grad_fns: dict[str, bool] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Print the parameters, hash the parts, and look at the first training forward."""
        model.print_trainable_parameters()
        self.before = {part: digest(model.get_submodule(part)) for part in ("base_llm_model", "ocr_embed", "proj")}

        def look(module: nn.Module, arguments, output) -> None:
            if module.training and not self.modes:
                parts = {"model": model, **{part: model.get_submodule(part) for part in self.before}}
                self.modes = {name: part.training for name, part in parts.items()}
                self.grad_fns = {name: getattr(output, name).grad_fn is not None for name in ("loss", "logits")}

        self.hook = model.register_forward_hook(look)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Hash the parts again."""
        self.hook.remove()
        self.after = {part: digest(model.get_submodule(part)) for part in self.before}

    def checks(self, result: TrainResult) -> list[tuple[str, bool, str]]:
        """(check, passed, what was seen) for each point of the list."""
        evals = [entry["eval_loss"] for entry in result.log_history if "eval_loss" in entry]
        rows = [(f"{name}.training during training", mode, str(mode)) for name, mode in self.modes.items()]
        rows += [(f"{name}.grad_fn is not None", there, str(there)) for name, there in self.grad_fns.items()]
        rows.append(("loss on held-out people fell", evals[-1] < evals[0], f"{evals[0]:.4f} -> {evals[-1]:.4f}"))
        for part, same in (("proj", False), ("base_llm_model", True), ("ocr_embed", True)):
            old, new = self.before[part], self.after[part]
            rows.append(
                (
                    f"{part} {'unchanged' if same else 'changed'}",
                    (old == new) == same,
                    f"{old[:12]} -> {new[:12]}",
                )
            )
        return rows


def digest(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer of a module."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def print_checks(checks: list[tuple[str, bool, str]]) -> None:
    """The checks as a table."""
    table = Table("check", "seen", "")
    for name, passed, seen in checks:
        table.add_row(name, seen, "[green]ok[/green]" if passed else "[red]FAILED[/red]")
    console.print(table)


def plot_losses(result: TrainResult, path: Path) -> None:
    """Training loss of each step and the loss on held-out people."""
    steps = [(entry["step"], entry["loss"]) for entry in result.log_history if "loss" in entry]
    evals = [(entry["step"], entry["eval_loss"]) for entry in result.log_history if "eval_loss" in entry]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*steps, strict=True), color="0.6", linewidth=1.2, label="training batch")
    axes.plot(*zip(*evals, strict=True), "o-", color="tab:blue", label="held-out people")
    for step, loss in evals:
        axes.annotate(f"{loss:.3f}", (step, loss), (0, -14), textcoords="offset points", ha="center", color="tab:blue")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per reply token)", title="Training the projection")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def in_new_process(*arguments: object) -> str:
    """What Python prints when it is run with these arguments."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def counts(answer: dict[str, Any]) -> str:
    """How much the memory of an answer took."""
    if not answer["memory_tokens"]:
        return "No memory was made."
    return (
        f"{answer['history_tokens']} tokens of history became {answer['memory_tokens']} memory tokens on "
        f"{answer['pages']} pages ({answer['compression_ratio']:.2f}x)."
    )


def write_report(
    result: TrainResult,
    checks: list[tuple[str, bool, str]],
    answer: dict[str, Any],
    items: list[dict[str, Any]],
    seconds: float,
) -> None:
    """`demo/report.md`."""
    rows = "\n".join(f"| {name} | {seen} | {'ok' if passed else 'FAILED'} |" for name, passed, seen in checks)
    write_text(
        OUT / "report.md",
        f"""# Demo report

{result.steps} optimizer steps from the shipped adapter on, {result.num_samples} samples at hand.
{seconds:.0f} s in all, torch {torch.__version__}.

| check | seen | |
| --- | --- | --- |
{rows}

![loss](loss.png)

## The saved adapter answers in a new process

{counts(answer)}

> **{QUESTION}**
>
> {questions.plain(answer["answer"])}

These steps train on replies alone and cost much of what the shipped adapter could read; they show that a run learns,
not how well a memory can be read.

## The shipped adapter is asked about text that it never saw

Questions about held-out text, answered greedily without the text, through the memory, and with the full text. They are
the first ones of a fixed seed; ✓ marks an answer that is right word for word.

{questions.markdown(items)}

## A page, as the encoder sees it

![first page](pages/page-01.png)
""",
    )


if __name__ == "__main__":
    main()
