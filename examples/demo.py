"""The main job, end to end, on two CPU cores: `make demo`.

A frozen SmolLM2-135M-Instruct has a visual memory: the older part of real conversations is drawn on pages, the frozen
PP-OCRv6-small reads them, and a projection hands its features to the LLM. Everything below is real: the weights, the
conversations, the training, and the answers of a new process.

Training starts from the shipped adapter and goes on for some dozen steps, enough to see that a run learns and that
nothing but the projection changes; `configs/smollm2-pp-ocr-2x.yaml` is the run that taught it to read. Then a new
process loads what was saved and answers questions about held-out text: without a memory, through it, and with the full
text (`examples/questions.py`).

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
from ocrmem.data.documents import document_hash
from ocrmem.encoders.registry import build_encoder
from ocrmem.files import write_text
from ocrmem.memory.history import history_text
from ocrmem.model.adapter import MANIFEST_NAME, read_manifest
from ocrmem.render.renderer import Renderer, save_png
from ocrmem.training.build import find_data, page_settings
from ocrmem.training.run import TrainResult, train

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo"
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
    show_pages(config)

    heading("3. Training the projection; both other parts are frozen")
    witness = Witness()
    result = train(config, callbacks=[witness])
    plot_losses(result, OUT / "loss.png")

    heading("4. What the seed document asks for")
    checks = witness.checks(result)
    print_checks(checks)

    heading("5. The saved adapter, loaded by a new process, answers about text that it never saw")
    write_manifest(result, config)
    items = ask_in_new_process(result.adapter)
    questions.show(items, console)
    asked = [item for item in items if item["task"] in questions.ASKED]
    nothing, memory = (questions.mean_f1(asked, arm) for arm in ("none", "memory"))
    checks.append(
        ("a new process knows more with the memory than without", memory > nothing, f"F1 {nothing:.2f} -> {memory:.2f}")
    )
    print_checks(checks[-1:])
    seconds = time.monotonic() - started
    write_report(result, checks, items, seconds)
    console.print(f"\n[bold]{seconds:.0f} s in all.[/bold] See demo/report.md, demo/loss.png and demo/pages/.")
    if not all(passed for _, passed, _ in checks):
        sys.exit("error: a check failed; the table above says which.")


def heading(text: str) -> None:
    """A section title."""
    console.print(f"\n[bold]{text}[/bold]")


def show_pages(config: TrainConfig) -> None:
    """Draw a long held-out conversation, and read its first page back with the OCR head."""
    conversations = read_conversations(resolve("chitchat") / "heldout.jsonl").conversations
    conversation = next(c for c in conversations if 4000 < sum(len(m.content) for m in c.messages) < 6000)
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
    axes.set(xlabel="optimizer step", ylabel="loss (nats per reply token)", title="Training the projection")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_manifest(result: TrainResult, config: TrainConfig) -> None:
    """What the adapter was trained on, here and before, so that questions about any of it are refused."""
    # A run with objectives writes it by itself; this one, on `data`, does not.
    before = read_manifest(Path(config.adapter)) if config.adapter is not None else {}
    conversations = read_conversations(find_data(config.data.train)).conversations[: config.data.max_conversations]
    trained = {document_hash(history_text(conversation.messages))[:16] for conversation in conversations}
    manifest = {
        "documents": sorted({*before.get("documents", ()), *trained}),
        "corpora": sorted({*before.get("corpora", ()), config.data.train}),
        "steps": before.get("steps", 0) + result.steps,
    }
    write_text(result.adapter / MANIFEST_NAME, json.dumps(manifest) + "\n")


def ask_in_new_process(adapter: Path) -> list[dict[str, Any]]:
    """`examples/questions.py` with the saved adapter."""
    command = [sys.executable, questions.__file__, str(adapter), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def write_report(
    result: TrainResult, checks: list[tuple[str, bool, str]], items: list[dict[str, Any]], seconds: float
) -> None:
    """`demo/report.md`."""
    rows = "\n".join(f"| {name} | {seen} | {'ok' if passed else 'FAILED'} |" for name, passed, seen in checks)
    write_text(
        OUT / "report.md",
        f"""# Demo report

{result.steps} optimizer steps on {result.num_samples} samples, {seconds:.0f} s in all, torch {torch.__version__}.

| check | seen | |
| --- | --- | --- |
{rows}

![loss](loss.png)

## A new process answers

Questions about held-out text, answered greedily without the text, through the memory, and with the full text. They are
the first ones of a fixed seed; ✓ marks an answer that is right word for word.

{questions.markdown(items)}

## A page, as the encoder sees it

![first page](pages/page-01.png)
""",
    )


if __name__ == "__main__":
    main()
