"""Rules of the code: import layers, sizes, no hidden settings, no silent errors.

`ruff` checks the complexity of functions (pyproject.toml).
"""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {  # a file imports files of lower layers only, not of its own
    "errors and configurations": "base chips",
    "tools": "linear latents options hub guards conv color",
    "layers and files": "layers media sampling windows lora tiles quantization",
    "EXR files": "exr",
    "models": "dit text vae diffusion_decoder audio_vae vocoder upsampler duration",
    "looking": "page sheet",
    "the files of a model": "parts",
    "weights and machines": "weights parallel preview guidance",
    "requests": "request conversion cache formats",
    "input files": "inputs record outputs",
    "conditions and components": "conditions components",
    "work": "work",
    "memory": "memory",
    "the machine": "device",
    "time": "timing",
    "recipes": "recipes",
    "defaults": "defaults",
    "stages": "stages",
    "snapshots": "snapshot",
    "a run": "run",
    "the pipeline": "pipeline",
    "quality": "quality",
    "diagnostics": "checks",
    "training: gradients": "gradients",
    "training: files": "dataset adapters",
    "training": "training",
}
LAYER = {name: n for n, files in enumerate(LAYERS.values()) for name in files.split()}
# The only files that import a package; those of LATE import it inside of a function,
# because the import takes long or the package may not be needed.
KNOWN_BY = {
    "PIL": {"adapters", "media", "sheet"},
    "huggingface_hub": {"hub"},
    "imageio_ffmpeg": {"media"},
    "mlx_lm": {"text"},
    "pillow_heif": {"media"},
    "sentencepiece": {"text"},
    "subprocess": {"base", "media"},
    "tokenizers": {"text"},
}
LATE = {"huggingface_hub", "mlx_lm", "sentencepiece", "tokenizers"}
IMPORTED_AS = {"mlx[cpu]": "mlx", "pillow": "PIL"}  # else the name with underscores
MAX_LINES = 15672
MAX_FILE, MAX_FUNCTION = 520, 60

SCRIPTS = [ROOT / f"{name}.py" for name in ("generate", "convert", "train")]
PRODUCT = [*SCRIPTS, *sorted(ROOT.glob("ltx2/*.py"))]
TESTS = sorted(ROOT.glob("tests/*.py"))
ASIDE = sorted([*ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/*.py")])

each = lambda files: pytest.mark.parametrize(
    "file", files, ids=lambda f: str(f.relative_to(ROOT))
)


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of imports, also under TYPE_CHECKING; ours begin with "ltx2."."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(["ltx2"] * node.level + [node.module or ""]).strip(".")
            parts = {f"ltx2.{alias.name}" for alias in node.names}
            names |= parts if package == "ltx2" else {package}
    return names


def packages(*trees: ast.AST) -> set[str]:
    return {name.split(".")[0] for tree in trees for name in imports(tree)}


@functools.cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def test_every_file_has_a_layer():
    files = {f.stem for f in ROOT.glob("ltx2/*.py")} - {"__init__"}
    assert files == LAYER.keys()
    folders = {p.name for p in ROOT.glob("ltx2/*") if p.is_dir()}
    assert folders <= {"__pycache__"}


@pytest.mark.parametrize("name", LAYER)
def test_a_file_imports_only_lower_layers(name):
    paths = [n.split(".") for n in imports(parse(ROOT / "ltx2" / f"{name}.py"))]
    ours = {path[1] for path in paths if path[0] == "ltx2"} & LAYER.keys()
    assert not {other for other in ours if LAYER[other] >= LAYER[name]}


@each(PRODUCT)
def test_packages_are_imported_only_where_they_belong(file):
    tree = parse(file)
    for name in packages(tree):
        assert file.stem in KNOWN_BY.get(name, {file.stem}), name
    definitions = (ast.FunctionDef, ast.ClassDef)
    at_once = [node for node in tree.body if not isinstance(node, definitions)]
    assert not packages(*at_once) & LATE


def test_every_required_package_is_imported():
    names = re.findall(r"^[\w\[\]-]+", (ROOT / "requirements.txt").read_text(), re.M)
    required = {IMPORTED_AS.get(n.lower(), n.replace("-", "_")) for n in names}
    assert required <= packages(*map(parse, PRODUCT))


@each(PRODUCT)
def test_files_and_functions_are_short(file):
    assert len(file.read_text().splitlines()) <= MAX_FILE
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, node.name


def test_the_product_is_small():
    assert sum(len(f.read_text().splitlines()) for f in PRODUCT) <= MAX_LINES


@each(PRODUCT)
def test_text_files_do_not_depend_on_the_locale(file):
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            least = {"read_text": 1, "write_text": 2}.get(node.func.attr, 0)
            assert len(node.args) >= least, node.lineno


@each(PRODUCT)
def test_there_are_no_hidden_settings(file):
    lines = file.read_text().splitlines()
    for node in ast.walk(parse(file)):
        if getattr(node, "attr", getattr(node, "id", "")) in ("environ", "getenv"):
            assert file.name == "__init__.py", node.lineno
            assert "MLX_ENABLE_TF32" in lines[node.lineno - 1]
            assert lines[node.lineno - 2].strip().startswith("#")  # the reason


@each(PRODUCT)
def test_no_error_is_silent(file):
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.keyword):
            strict = not isinstance(node.value, ast.Constant) or node.value.value
            assert node.arg != "strict" or strict, node.value.lineno
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            raises = isinstance(node.body[-1], ast.Raise) and not node.body[-1].exc
            assert caught not in ("everything", "Exception"), node.lineno
            assert caught != "BaseException" or raises, node.lineno


@each(TESTS)
def test_no_test_is_skipped(file):
    for node in ast.walk(parse(file)):
        name = getattr(node, "attr", "")
        assert name not in ("skip", "skipif", "importorskip", "xfail"), node.lineno


@each(PRODUCT + TESTS + ASIDE)
def test_a_file_begins_with_a_docstring(file):
    assert ast.get_docstring(parse(file))
