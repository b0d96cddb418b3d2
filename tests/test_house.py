"""The house keeps its own rules: import floors, file sizes, configs and generated pages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ocrmem.config.train import load_train_config

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "ocrmem"
FLOORS = [
    {"types", "errors", "files"},
    {"config"},
    {"assets"},
    {"render"},
    {"encoders"},
    {"memory"},
    {"model"},
    {"data"},
    {"session"},
    {"gradflow"},
    {"training"},
    {"evaluation"},
    {"serving"},
    {"cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS, start=1) for name in names}
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem in FLOOR_OF)


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ocrmem that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("ocrmem.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_from_its_own_floor_or_below(path):
    floor = FLOOR_OF[room_of(path)]
    above = {room for room in imported_rooms(path) if FLOOR_OF[room] > floor}
    sideways = {room for room in imported_rooms(path) if FLOOR_OF[room] == floor and room != room_of(path)}
    assert not above, f"imports from above: {above}"
    assert not sideways or floor == 1, f"imports from a neighbour: {sideways}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_stays_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads(path):
    config = load_train_config(path)
    assert config.output_dir
    from ocrmem.training.build import training_arguments

    training_arguments(config) if "bf16" not in config.training else None


def test_the_configuration_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_configuration.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_and_the_command_needs_no_torch():
    code = "import sys, ocrmem, ocrmem.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
