"""The shape of the code, as rules that fail. Each message says what breaks the rule and what to do instead."""

import ast
import dataclasses
import io
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from depthlm_jax import config

ROOT = Path(__file__).parents[1]
PACKAGE = "depthlm_jax"
# Lowest first: a module imports from its own level or from below. A name that ends in a dot stands for every module
# under it that is not named by itself.
LEVELS = (
    ("errors",),
    ("files", "config_errors", "config_rules"),
    ("html_page", "event_files"),
    ("config", "batch", "tree", "models", "chips", "compiler"),
    ("hf", "parameter_groups", "same_run", "recipes"),
    ("data.", "models."),
    ("models.registry", "data.pipeline", "sharding", "log", "checkpoint", "watchdog", "lock", "environment"),
    ("tracking",),
    ("run",),
    ("eval.",),
    ("train.",),
    ("release", "verify", "model_card", "snippet", "hub", "plan.", "bench.", "launch.", "overview.", "sweep."),
    ("cli.",),
    ("__main__",),
)
LONGEST_CHAIN = 10  # imports, one after the other
FILE_LINES, FUNCTION_LINES = 300, 60  # of code: no blank lines, comments, docstrings
CONFIG_LEAVES = 89
TOP_LEVEL = {
    "depthlm_jax", "configs", "launch", "tests", "requirements.txt", "README.md", "pyproject.toml", "LICENSE", ".ci",
    ".gitignore",
}  # fmt: skip
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
NAMES_THAT_SAY_NOTHING = {"util", "utils", "common", "helper", "helpers", "misc"}


@dataclasses.dataclass(frozen=True)
class Module:
    name: str  # within the package: 'data.camera'; a folder's __init__ has the folder's name, the package's own is ''
    path: Path
    source: str
    tree: ast.Module

    @property
    def is_init(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def is_host_only(self) -> bool:
        return self.name.startswith("data.") or self.name.rsplit(".", 1)[-1] in ("processor", "tokenizer")


Modules = dict[str, Module]


def read_package(package: Path) -> Modules:
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        modules[name] = Module(name, path, source, ast.parse(source))
    return modules


def imported_names(module: Module) -> Iterator[str]:
    """Gives 'jax.numpy' of `import jax.numpy`; 'jax' and 'jax.numpy' of `from jax import numpy`; in functions too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def libraries(module: Module) -> set[str]:
    return {name.split(".")[0] for name in imported_names(module)}


def import_edges(modules: Modules) -> dict[str, list[str]]:
    """Returns module → modules of the package that it imports."""
    inside = {name: {imported.removeprefix(f"{PACKAGE}.") for imported in imported_names(module)}
              for name, module in modules.items()}  # fmt: skip
    return {name: sorted(imported & modules.keys()) for name, imported in inside.items()}


def level(name: str) -> int | None:
    heights = {entry: height for height, entries in enumerate(LEVELS) for entry in entries}
    parts = name.split(".")
    folders = [".".join(parts[:end]) + "." for end in range(len(parts) - 1, 0, -1)]
    return next((heights[entry] for entry in [name, *folders] if entry in heights), None)


def levels_broken(modules: Modules) -> Iterator[str]:
    for name, module in modules.items():
        if level(name) is None and not module.is_init:
            yield f"{name} stands on no level: give it a place in LEVELS"
        if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(module.tree)):
            yield f"{name} has a relative import: write the whole name, {PACKAGE}.…"
    for name, targets in import_edges(modules).items():
        for target in targets:
            if level(name) is not None and level(target) is not None and level(name) < level(target):
                yield (
                    f"{name} (level {level(name)}) imports {target} (level {level(target)}): take what it needs as an "
                    "argument, or move the shared part down"
                )


def longest_chain(modules: Modules) -> list[str]:
    """Returns the modules along the longest chain of imports; one that ends where it began is a cycle."""
    edges = import_edges(modules)
    longest: dict[str, list[str]] = {}

    def from_module(name: str, above: tuple[str, ...]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name not in longest:
            chains = [from_module(target, (*above, name)) for target in edges[name]]
            cycle = next(filter(is_cycle, chains), None)
            longest[name] = cycle or [name, *max(chains, key=len, default=[])]
        return longest[name]

    chains = [from_module(name, ()) for name in modules]
    return next(filter(is_cycle, chains), max(chains, key=len))


def is_cycle(chain: list[str]) -> bool:
    return len(chain) > 1 and chain[0] == chain[-1]


def chain_broken(modules: Modules) -> Iterator[str]:
    chain = longest_chain(modules)
    if is_cycle(chain):
        yield f"{' → '.join(chain)}: a cycle; move what both need into a module below them"
    elif len(chain) - 1 > LONGEST_CHAIN:
        yield f"{' → '.join(chain)}: {len(chain) - 1} imports, at most {LONGEST_CHAIN}; leave out who only passes on"


def device_code_on_the_host(modules: Modules) -> Iterator[str]:
    edges = import_edges(modules)
    for start in (module for module in modules.values() if module.is_host_only):
        ways = {start.name: start.name}
        queue = [start.name]
        for name in queue:
            for library in libraries(modules[name]) & {"jax", "flax", "optax"}:
                yield f"{ways[name]} → {library}: the host's code loads no {library}; use numpy, or do it in the model"
            fresh = [target for target in edges[name] if target not in ways]
            ways |= {target: f"{ways[name]} → {target}" for target in fresh}
            queue += fresh


PRIVATE = {"models.cudnn"}  # attention sample by sample: 1.6 × the speed of a step, and JAX has no public name for it


def libraries_out_of_place(modules: Modules) -> Iterator[str]:
    for name, module in modules.items():
        if "flax" in libraries(module) and not name.startswith("models."):
            yield f"{name} imports flax: outside models/ a model is apply(params, batch) and nested dicts of arrays"
        attributes = {node.attr for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
        private = "_src" in attributes or any(imported.startswith("jax._src") for imported in imported_names(module))
        if private and name not in PRIVATE:
            yield f"{name}: jax._src is private and moves between releases; use a public name"


def init_files_that_import(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        if module.is_init and any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(module.tree)):
            folder = module.path.parent.name
            yield f"{folder}/__init__.py imports: whoever needs a module names it; leave a docstring or constants"


def code_lines(module: Module) -> set[int]:
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(module.source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTION) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def too_long(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        lines = code_lines(module)
        if len(lines) > FILE_LINES:
            yield f"{module.name}: {len(lines)} lines of code, at most {FILE_LINES}; split it by what changes together"
        for node in ast.walk(module.tree):
            if isinstance(node, FUNCTION):
                length = len(lines.intersection(range(node.lineno, node.end_lineno + 1)))
                if length > FUNCTION_LINES:
                    yield f"{module.name}.{node.name}: {length} lines of code, at most {FUNCTION_LINES}; name its steps"


def words_without_meaning(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        defined = [node.name for node in ast.walk(module.tree) if isinstance(node, FUNCTION | ast.ClassDef)]
        for word in [*module.name.split("."), *defined]:
            if word.strip("_").lower() in NAMES_THAT_SAY_NOTHING or word.endswith("Manager"):
                yield f"{module.name}: {word!r} says nothing; name it after what it does"


def hidden_names(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        for node in ast.walk(module.tree):
            match node:
                case ast.Call(func=ast.Name("getattr"), args=[_, ast.Constant(str(name)), *_]):
                    yield f"{module.name}:{node.lineno}: getattr with {name!r}; write .{name}, which a search finds"
                case ast.arguments(kwarg=ast.arg(name)):
                    yield f"{module.name}:{node.kwarg.lineno}: **{name}; name the parameters, so that a typo fails"


RULES = (
    levels_broken,
    chain_broken,
    device_code_on_the_host,
    libraries_out_of_place,
    init_files_that_import,
    too_long,
    words_without_meaning,
    hidden_names,
)


@pytest.mark.parametrize("rule", RULES, ids=[rule.__name__ for rule in RULES])
def test_package_keeps(rule):
    problems = list(rule(read_package(ROOT / PACKAGE)))
    assert not problems, "\n" + "\n".join(problems)


def test_config_has_few_leaves():
    leaves = sorted(config.flatten(config.Config()))
    assert len(leaves) <= CONFIG_LEAVES, f"{len(leaves)} fields; each needs a user who sets it: {leaves}"


def test_top_level_holds_nothing_else():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    extra = {file.split("/")[0] for file in listed.stdout.splitlines()} - TOP_LEVEL
    assert not extra, f"{sorted(extra)}: move it under one of {sorted(TOP_LEVEL)}, or name it in .gitignore"


BROKEN = (  # a rule, a package that breaks it once, and what the rule says of that
    (
        levels_broken,
        {"config.py": "import depthlm_jax.tree, depthlm_jax.hf", "hf.py": "", "tree.py": ""},
        "imports hf (l",
    ),
    (
        levels_broken,
        {"data/a.py": "import depthlm_jax.data.pipeline", "data/pipeline.py": ""},
        "imports data.pipeline (level",
    ),
    (
        levels_broken,
        {"data/a.py": "def f():\n  from depthlm_jax import log", "log.py": ""},
        "imports log (level",
    ),
    (levels_broken, {"other.py": ""}, "other stands on no level"),
    (levels_broken, {"data/a.py": "from . import b", "data/b.py": ""}, "data.a has a relative import"),
    (
        chain_broken,
        {"tree.py": "import depthlm_jax.batch", "batch.py": "import depthlm_jax.tree"},
        "batch → tree → batch",
    ),
    (chain_broken, {f"data/a{i}.py": f"import depthlm_jax.data.a{i + 1}" for i in range(12)}, "data.a11: 11 imports"),
    (device_code_on_the_host, {"data/a.py": "import jax.numpy as jnp"}, "data.a → jax: the host's code loads no jax"),
    (
        device_code_on_the_host,
        {"models/a/processor.py": "from depthlm_jax import tree", "tree.py": "import flax"},
        "models.a.processor → tree → flax",
    ),
    (libraries_out_of_place, {"train/step.py": "from flax import nnx"}, "train.step imports flax"),
    (libraries_out_of_place, {"log.py": "from jax._src import mesh"}, "log: jax._src is private"),
    (libraries_out_of_place, {"log.py": "import jax\njax._src.mesh"}, "log: jax._src is private"),
    (init_files_that_import, {"data/__init__.py": "SIZE = 1\nimport os"}, "data/__init__.py imports"),
    (too_long, {"tree.py": '"""Two\nlines."""\n\n# why\n' + "x = 1\n" * 301}, "tree: 301 lines of code, at most 300"),
    (too_long, {"tree.py": 'def f():\n  """No."""\n  # no\n\n' + "  x = 1\n" * 60}, "tree.f: 61 lines of code"),
    (words_without_meaning, {"data/utils.py": ""}, "'utils' says nothing"),
    (words_without_meaning, {"tree.py": "class TreeManager: pass"}, "'TreeManager' says nothing"),
    (hidden_names, {"tree.py": "getattr(x, 'name', 0)"}, "tree:1: getattr with 'name'; write .name"),
    (hidden_names, {"tree.py": "def f(a, **options): pass"}, "tree:1: **options; name the parameters"),
)


@pytest.mark.parametrize(("rule", "files", "says"), BROKEN, ids=[says for _, _, says in BROKEN])
def test_rule_sees_what_breaks_it(rule, files, says, tmp_path):
    for name, source in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    problems = list(rule(read_package(tmp_path)))
    assert len(problems) == 1
    assert says in problems[0]
