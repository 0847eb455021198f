"""How the house is built: floors, who knows what, no hidden settings, no silent errors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    "base media linear layers conv",
    "dit text vae diffusion_decoder duration audio_vae vocoder upsampler latents "
    "sampling guards",
    "dfr hub weights conversion lora limits request denoiser inputs preview memory parallel snapshot cache",
    "pipeline checks",
]
FLOOR = {name: n for n, names in enumerate(FLOORS) for name in names.split()}
# Packages that few files know, and import only where they use them.
LATE = {"mlx_lm", "tokenizers", "huggingface_hub"}
KNOWN_BY = {
    "mlx_lm": {"text"},
    "tokenizers": {"text"},
    "huggingface_hub": {"hub", "conversion"},
    "imageio_ffmpeg": {"media"},
    "subprocess": {"media"},
}

PRODUCT = sorted([*ROOT.glob("*.py"), *ROOT.glob("ltx2/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
ASIDE = sorted([*ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/*.py")])

each = lambda files: pytest.mark.parametrize(
    "file", files, ids=lambda f: str(f.relative_to(ROOT))
)


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of what is imported; ours begin with "ltx2."."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(["ltx2"] * node.level + [node.module or ""]).strip(".")
            whole = package == "ltx2"  # its parts are named one by one
            names |= {f"ltx2.{a.name}" for a in node.names} if whole else {package}
    return names


def packages(*trees: ast.AST) -> set[str]:
    return {name.split(".")[0] for tree in trees for name in imports(tree)}


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def test_every_file_has_a_floor():
    assert {f.stem for f in ROOT.glob("ltx2/*.py")} - {"__init__"} == FLOOR.keys()
    folders = {p.name for p in ROOT.glob("ltx2/*") if p.is_dir()}
    assert folders <= {"__pycache__"}


@pytest.mark.parametrize("name", FLOOR)
def test_no_file_imports_a_higher_one(name):
    floor = FLOOR[name]
    paths = (n.split(".") for n in imports(parse(ROOT / "ltx2" / f"{name}.py")))
    for other in {path[1] for path in paths if path[0] == "ltx2"} & FLOOR.keys():
        # Models and their like on the first floor do not know each other.
        assert FLOOR[other] < floor or (FLOOR[other] == floor and floor != 1), other


@each(PRODUCT)
def test_packages_are_known_where_they_belong(file):
    tree = parse(file)
    for name in packages(tree):
        assert file.stem in KNOWN_BY.get(name, {file.stem}), name
    definitions = (ast.FunctionDef, ast.ClassDef)
    at_once = [node for node in tree.body if not isinstance(node, definitions)]
    assert not packages(*at_once) & LATE


@each(PRODUCT)
def test_no_hidden_setting_and_no_silent_error(file):
    for node in ast.walk(parse(file)):
        name = getattr(node, "attr", getattr(node, "id", ""))
        assert name not in ("environ", "getenv"), node.lineno
        if isinstance(node, ast.keyword):
            strict = not isinstance(node.value, ast.Constant) or node.value.value
            assert node.arg != "strict" or strict, node.value.lineno
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            goes_on = not isinstance(node.body[-1], ast.Raise) or node.body[-1].exc
            assert caught not in ("everything", "Exception"), node.lineno
            assert caught != "BaseException" or not goes_on, node.lineno


@each(TESTS)
def test_no_test_skips(file):
    words = ("skip", "skipif", "importorskip", "xfail")
    for node in ast.walk(parse(file)):
        assert getattr(node, "attr", "") not in words, node.lineno


@each(PRODUCT + TESTS + ASIDE)
def test_a_file_begins_by_saying_what_it_is(file):
    assert file.read_text().startswith('"""')
