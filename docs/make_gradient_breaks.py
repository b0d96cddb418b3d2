"""Write docs/gradient-breaks.md and its pictures from the running zoo; `--check` fails if they are out of date."""

from __future__ import annotations

import contextlib
import inspect
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(__file__).with_name("gradient-breaks.md")
PICTURES = {
    "detach": "gradient-cut.svg",
    "mask_zero_on_memory": "gradient-zero.svg",
    "eval_everywhere": "gradient-whole.svg",
}
sys.path.insert(0, str(ROOT / "tests" / "gradflow"))

import zoo  # noqa: E402
import zoo_ranks  # noqa: E402
from zoo_parts import CASES, Case, Composite, batch  # noqa: E402

from ocrmem.files import write_files  # noqa: E402
from ocrmem.gradflow import draw_path, path_tree  # noqa: E402
from ocrmem.gradflow.cause import E0  # noqa: E402
from ocrmem.gradflow.explain import CAUSES  # noqa: E402

TABLES = {
    "A": (
        "The bare RuntimeError",
        "No tensor that can learn is connected to the loss. The error says no more than that; the doctor says which "
        "of these it is.",
    ),
    "B": (
        "Another error",
        "The message is PyTorch's, and it is about a symptom. Obeying it sometimes makes things worse: "
        "`.detach().numpy()` turns an error about numpy into a cut.",
    ),
    "C": (
        "Silent",
        "The backward runs, the loss has a `grad_fn`, and nothing, too little or the wrong thing is learnt. Changed "
        "weights prove nothing: with zero gradients AdamW's weight decay still moves them.",
    ),
}  # fmt: skip


def document(results: dict[str, zoo.Result], ranks: list[dict[str, dict[str, Any]]]) -> str:
    """The page.

    Args:
        results: every available case of the zoo, run broken, by name.
        ranks: results of the two-process scenarios, by rank and name.
    """
    parts = [_opening(), _eval_section()]
    shown: set[str] = set()
    titles = {cause.id: cause for cause in CAUSES}
    for table, (title, words) in TABLES.items():
        parts.append(f"## {title}\n\n{_wrapped(words)}\n")
        for name, result in results.items():
            case = result.case
            if case.table == table and case.cause is not None and case.cause not in shown:
                shown.add(case.cause)
                parts.append(_section(result, titles[case.cause].title, also=_others(case, results)))
            assert name == case.name
    parts += [
        _distributed(ranks),
        _harmless(results),
        _rest(shown | {s.cause or "" for s in zoo_ranks.SCENARIOS.values()}),
    ]
    return "\n".join(parts)


def _opening() -> str:
    return f"""# What breaks a gradient, and how the doctor names it

This page is made by `python docs/make_gradient_breaks.py`, which runs every program on it; a test fails when a
verdict changes. The programs are the zoo in `tests/gradflow`: a two-layer LLM, a convolutional encoder and a
projection between them, the only part that should learn.

```
RuntimeError: {E0}
```

    ocrmem doctor CONFIG.yaml                        a training config of ocrmem
    ocrmem doctor my_script.py:make                  your own model: make() returns (model, batch[, optimizer])
    ocrmem doctor tests/gradflow/zoo_cuts.py:detach  any program on this page
    python tests/gradflow/zoo.py                     the whole zoo as a table: what it is, what it was called

```python
from ocrmem.gradflow import explain, verify_gradient_flow

report = verify_gradient_flow(model, batch, trainable="proj", optimizer=optimizer)
print(explain(report))
```

The exit code is 0 for healthy, 1 for a break, 2 where no verdict was reached. In the trees below `✓` carries the
gradient, `○` carries nothing but zeros, `✗` should carry it and does not, `·` needs none (nothing before it
learns), and `▶` marks the part that learns.

![A cut](gradient-cut.svg)
"""


def _eval_section() -> str:
    gradients = []
    for mode in (True, False):
        torch.manual_seed(0)
        model = Composite().train(mode)
        model(**batch()).loss.backward()
        gradients.append([parameter.grad for parameter in model.proj.parameters()])
    same = all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))
    assert same, "eval() changed a gradient"
    return """## eval() is not a cause

`eval()` on the frozen parts, on the projection or on everything cuts nothing. The program that writes this page has
just compared the gradients of the zoo's model in train mode and in eval mode, and they were equal bit for bit.
PyTorch says so too: "Evaluation mode is not a mechanism to locally disable gradient computation" (Autograd
mechanics). The one exception is a recurrent layer on cuDNN, which refuses a backward in eval mode, with an error that
says so (`cudnn-rnn-eval`).

`MEMModel.train()` puts all three parts in train mode all the same, for one reason: transformers checkpoints activations
only where `self.training` is true, so a frozen LLM in eval mode silently keeps the activations that checkpointing
should save.
What train mode could do harm is excluded: active dropout in a frozen part is refused, and batch norms keep their
statistics.

![Whole, in eval mode](gradient-whole.svg)
"""


def _section(result: zoo.Result, title: str, *, also: list[str]) -> str:
    case, explanation = result.case, result.explanation
    file = Path(inspect.getfile(case.make)).name
    tree = path_tree(result.report, explanation, numbers=False)
    lines = [
        f"### {explanation.cause}",
        "",
        f"{title[0].upper()}{title[1:]}. `ocrmem doctor tests/gradflow/{file}:{case.name}`",
        "",
        f"```python\n{case.code}\n```",
        "",
        f"```text\n{tree}\n\n{explanation}\n```",
    ]
    if also:
        lines += ["", "The same cause in another shape: " + ", ".join(f"`{name}`" for name in also) + "."]
    if case.name == "mask_zero_on_memory":
        lines += ["", "![Nothing but zeros](gradient-zero.svg)"]
    return "\n".join(lines) + "\n"


def _others(case: Case, results: dict[str, zoo.Result]) -> list[str]:
    return [name for name, other in results.items() if other.case.cause == case.cause and name != case.name]


def _distributed(ranks: list[dict[str, dict[str, Any]]]) -> str:
    words = (
        "Two processes (gloo); rank 1 has no memory in its batch. The doctor compares what the processes saw before it "
        "lets a backward or a gather begin, so it names what would otherwise hang until a timeout. "
        "`python tests/gradflow/zoo_ranks.py` runs them."
    )
    lines = [
        "## Several processes",
        "",
        _wrapped(words),
        "",
        "| program | verdict | cause | what rank 0 is told |",
        "| --- | --- | --- | --- |",
    ]
    for name in zoo_ranks.SCENARIOS:
        said = ranks[0][name]
        sentence = str(said["sentence"]).replace("|", "\\|")
        lines.append(f"| `{name}` | {said['verdict']} | {_code(said['cause'])} | {sentence} |")
    lines.append("")
    for name, scenario in zoo_ranks.SCENARIOS.items():
        if scenario.cause is not None:
            source = inspect.getsource(scenario.make)
            lines += [f"```python\n{source[source.index('def ') :].rstrip()}\n```", ""]
            assert name in source
    return "\n".join(lines)


def _harmless(results: dict[str, zoo.Result]) -> str:
    lines = ["## Looks like a break, and is none", "", "| program | verdict | noted |", "| --- | --- | --- |"]
    for name, result in results.items():
        if result.case.cause is None:
            notes = ", ".join(f"`{warning.id}`" for warning in result.explanation.warnings)
            lines.append(f"| `{name}` | {result.explanation.verdict} | {notes} |")
    return "\n".join([*lines, ""])


def _rest(shown: set[str]) -> str:
    lines = ["## Causes without a program here", ""]
    lines += [f"- `{cause.id}`: {cause.title}. Mend: {cause.mend}" for cause in CAUSES if cause.id not in shown]
    return "\n".join([*lines, ""])


def _code(word: str | None) -> str:
    return "" if word is None else f"`{word}`"


def _wrapped(words: str) -> str:
    return textwrap.fill(words, 118)


def run_zoo() -> dict[str, zoo.Result]:
    """Every case that can be built here, broken."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), contextlib.chdir(ROOT):
        warnings.simplefilter("ignore")
        return {case.name: zoo.run(case) for case in CASES.values() if zoo.available(case)}


def essence(text: str) -> list[str]:
    """The page without the trees, whose grad_fn names and classes belong to torch and transformers."""
    return [line for line in text.splitlines() if not line.startswith(("· ", "✓ ", "○ ", "✗ "))]


def main() -> int:
    """Write or check."""
    torch.set_num_threads(1)
    results = run_zoo()
    with contextlib.chdir(ROOT):
        page = document(results, zoo_ranks.run_all())
    if "--check" in sys.argv:
        if essence(TARGET.read_text(encoding="utf-8")) == essence(page):
            return 0
        print(f"{TARGET} is out of date; run python docs/make_gradient_breaks.py", file=sys.stderr)
        return 1
    texts = {TARGET.name: page} | {
        file: draw_path(results[name].report, results[name].explanation, numbers=False)
        for name, file in PICTURES.items()
    }
    write_files(
        TARGET.parent,
        {name: lambda path, text=text: path.write_text(text, encoding="utf-8") for name, text in texts.items()},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
