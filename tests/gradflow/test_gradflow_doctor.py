"""The doctor on scripts: exit codes, output, picture, and everything that can be wrong with a target."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import zoo
from zoo_parts import CASES, Composite, batch

from ocrmem.gradflow import Subject, draw_path, explain, path_tree, run_doctor, run_doctor_on

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # the programs earn them

ZOO = Path(__file__).parent
SCRIPT = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 5).requires_grad_(False)
        self.proj = nn.Linear(5, 2)
    def forward(self, inputs):
        return self.proj(self.encoder(inputs)){cut}.square().mean()

def make():
    model = Model()
    return model, torch.ones(2, 3), torch.optim.SGD(model.{held}.parameters(), lr=0.1)

def pair():
    return make()[:2]

def number():
    return 7

def raising():
    raise KeyError("a name")
"""


@pytest.fixture
def script(tmp_path):
    def write(*, cut="", held="proj"):
        path = tmp_path / "my_script.py"
        path.write_text(SCRIPT.format(cut=cut, held=held), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("function", ["make", "pair"])
def test_a_healthy_script_exits_with_0(script, capsys, function):
    assert run_doctor(f"{script()}:{function}") == 0
    shown = capsys.readouterr().out
    assert "healthy: 2 of 2 trainable tensors of proj get a gradient" in shown
    assert "✓ ▶ proj" in shown


def test_a_cut_script_exits_with_1_and_shows_the_line(script, capsys):
    path = script(cut=".detach()")
    assert run_doctor(f"{path}:make") == 1
    shown = capsys.readouterr().out
    assert "cut (detach): detach() cuts the memory off." in shown
    assert f"{path}:11  return self.proj(self.encoder(inputs)).detach().square().mean()" in shown
    assert "◀── the break" in shown
    assert "mend: keep the tensor as it is" in shown


def test_the_optimizer_of_a_script_is_examined(script, capsys):
    assert run_doctor(f"{script(held='encoder')}:make") == 1
    assert "silent (optimizer-holds-frozen)" in capsys.readouterr().out


def test_json_is_one_object(script, capsys):
    assert run_doctor(f"{script(cut='.detach()')}:make", json=True) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["explanation"]["cause"] == "detach"
    assert shown["explanation"]["source"]["line"] == 11
    assert shown["report"]["trainable"] == ["proj"]


def test_the_picture_is_saved(script, tmp_path, capsys):
    picture = tmp_path / "deep" / "path.svg"
    assert run_doctor(f"{script(cut='.detach()')}:make", picture=picture) == 1
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert f"picture: {picture}" in capsys.readouterr().out
    assert list(picture.parent.iterdir()) == [picture]


def test_a_part_can_be_named(script, capsys):
    assert run_doctor(f"{script()}:make", trainable=["encoder"]) == 1
    assert "projection-frozen" in capsys.readouterr().out


def test_a_zoo_case_is_a_target(capsys):
    assert run_doctor(f"{ZOO / 'zoo_cuts.py'}:data_attribute") == 1
    assert "cut (data-attribute)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "my_script",
            "the target is 'my_script'; expected a Python file and a function in it: my_script.py:make",
        ),
        ("my_script.py", "expected a Python file and a function in it"),
        ("nowhere.py:make", "'nowhere.py' is not a file"),
        ("{script}:build", "has no function 'build'; it has: "),
        ("{script}:number", "returned int; expected (model, batch), (model, batch, optimizer), or an"),
        ("{script}:raising", "raised KeyError at "),
    ],
)
def test_a_wrong_target_exits_with_2_and_says_why(script, capsys, target, said):
    assert run_doctor(target.format(script=script())) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert "could not run: " in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import a_package_that_is_not_there", "ModuleNotFoundError"),
        ("def make(:\n    pass", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_script_that_does_not_import(tmp_path, capsys, source, said):
    path = tmp_path / "broken.py"
    path.write_text(source, encoding="utf-8")
    assert run_doctor(f"{path}:make") == 2
    shown = capsys.readouterr().err
    assert f"'{path}' does not import: {said}" in shown
    assert "if __name__ == '__main__':" in shown
    assert "broken" not in sys.modules


def test_json_also_when_it_could_not_run(capsys):
    assert run_doctor("nowhere.py:make", json=True) == 2
    assert "is not a file" in json.loads(capsys.readouterr().out)["error"]


def test_a_model_at_hand(capsys):
    model = Composite()
    optimizer = torch.optim.AdamW(model.proj.parameters())
    assert run_doctor_on(model, batch(), optimizer, trainable=model.proj) == 0
    assert run_doctor_on(model, batch(images=False), optimizer, trainable="proj") == 1
    assert run_doctor_on(model, {"wrong": 1}, trainable="proj") == 2
    assert "forward raised TypeError" in capsys.readouterr().err


def test_the_tree_of_a_cut():
    result = zoo.run(CASES["detach"])
    lines = path_tree(result.report, result.explanation, numbers=False).splitlines()
    assert [" ".join(line.split()[:2]) for line in lines] == [
        "· llm.model.embed_tokens",
        "· encoder",
        "✓ ▶",
        "✓ proj.first",
        "✓ proj.last",
        "✗ detach",
        "✗ llm",
        "✗ llm.model",
        "✗ llm.model.layers.0",
        "✗ llm.model.norm",
        "✗ llm.lm_head",
        "✗ loss",
    ]
    assert [line.endswith("◀── the break") for line in lines].index(True) == 5
    assert sum("the break" in line for line in lines) == 1
    assert "Qwen3DecoderLayer ×2" in lines[8]


def test_the_tree_of_zeros_and_of_health():
    masked = zoo.run(CASES["mask_zero_on_memory"])
    lines = path_tree(masked.report, masked.explanation).splitlines()
    assert [line[0] for line in lines[:6]] == ["·", "·", "○", "○", "○", "✗"]
    assert "gradient zero" in lines[2]
    healthy = zoo.run(CASES["eval_everywhere"])
    tree = path_tree(healthy.report, healthy.explanation)
    assert "✗" not in tree
    assert "break" not in tree


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if zoo.available(case)))
def test_every_verdict_can_be_drawn(name):
    result = zoo.run(CASES[name])
    tree = path_tree(result.report, result.explanation)
    assert tree.count("◀── the break") == (0 if result.explanation.healthy else 1)
    root = ElementTree.fromstring(draw_path(result.report, result.explanation))
    words = " ".join(element.text or "" for element in root.iter() if element.tag.endswith("text"))
    assert (result.explanation.cause or "healthy") in words
    bottom = float(root.get("height"))
    assert all(float(e.get("y")) < bottom for e in root.iter() if e.tag.endswith(("rect", "text")) and e.get("y"))


def test_names_that_xml_must_escape():
    class Odd(Composite):
        def __init__(self):
            super().__init__()
            self.add_module('a<b>&\x07"c', torch.nn.Linear(64, 64))

        def splice(self, memory, embeds):
            return super().splice(self.get_submodule('a<b>&\x07"c')(memory), embeds)

    odd = Subject(model=Odd(), batch=batch(), trainable="proj").examine()
    assert 'a<b>& "c' in "".join(ElementTree.fromstring(draw_path(odd, explain(odd))).itertext())


def test_the_confusion_table_is_all_on_the_diagonal(capsys):
    assert zoo.main() == 0
    assert capsys.readouterr().out.rstrip().endswith("0 off the diagonal")
