"""docs/design.md and CONTRIBUTING.md are true: what they name exists, and their commands can be given."""

import ast
import functools
import re
import shlex
import subprocess

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from test_structure import HELPERS, SCRIPTS, imported

import generate_instruction
import train as trainer

DOCUMENTS = ("docs/design.md", "CONTRIBUTING.md")
MODULES = (*SCRIPTS, *HELPERS)
FILES = (".py", ".md", ".json", ".jsonl", ".toml", ".txt", ".csv", ".model")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def prose(document):
    """A document without its blocks of code, each paragraph on one line."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", re.sub(r"^```.*?^```$", "", read(document), flags=re.DOTALL | re.MULTILINE))


@functools.cache
def names_of(path):
    """Functions, classes, their methods and fields ("Class.name") and constants that a file defines."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            inside = {part.name for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))}
            inside |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
            names |= {f"{node.name}.{name}" for name in inside}
    stored = [part for node in tree.body if not hasattr(node, "body") for part in ast.walk(node)]
    return names | {part.id for part in stored if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


@functools.cache
def repository():
    """(names that any Python file defines, strings that stand in the scripts, options that these know)."""
    scripts = [ROOT / f"{name}.py" for name in MODULES]
    paths = [
        *scripts,
        *(path for folder in ("tests", "examples", "benchmarks") for path in ROOT.glob(f"{folder}/*.py")),
    ]
    nodes = [node for path in scripts for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    classes = (trainer.ModelArguments, trainer.DataArguments, trainer.TrainingArguments, generate_instruction.Options)
    options = {f"--{name}" for group in classes for name in group.__dataclass_fields__}
    options |= {word for word in strings if word.startswith("--")}
    return set().union(*map(names_of, paths)), strings, options


def problem(name):
    """What is wrong with a name in backticks; "" where it exists, or is a phrase."""
    defined, strings, options = repository()
    owner, _, rest = name.partition(".")
    if name.startswith("make "):
        return "" if re.search(rf"^{re.escape(name[5:])}:", MAKEFILE, re.MULTILINE) else "no such target"
    if " " in name:
        return ""
    if name.startswith("--"):
        return "" if name in options else "no such option"
    if "/" in name or name.endswith(FILES) or (ROOT / name).exists():
        return "" if (ROOT / name).exists() or name in strings else "no such file, nor one that a script speaks of"
    if owner in MODULES and rest:
        return "" if rest in names_of(ROOT / f"{owner}.py") else f"{owner}.py does not define it"
    if not re.fullmatch(r"[\w.]+", name):
        return "neither a file nor an option nor an identifier"
    return "" if name in defined | strings else "no script defines it"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_exists(document):
    names = re.findall(r"`([^`]+)`", prose(document))
    assert len(names) > 10
    assert {name: problem(name) for name in names if problem(name)} == {}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_name_with_a_file_behind_it_is_defined_there(document):
    pairs = re.findall(r"`([\w.]+)` (?:\(|in )`?(\w+\.py)`?", prose(document))
    pairs += re.findall(r"`([\w.]+)` in `(tests/\w+\.py)`", prose(document))
    assert [(name, file) for name, file in pairs if name not in names_of(ROOT / file)] == []


@pytest.mark.parametrize("name", ["no_such_function", "train.no_such", "utils.encode", "no_such.py", "--no_such",
                                  "tests/test_no_such.py", "make no-such", "SFTTrainer.no_such"])  # fmt: skip
def test_a_name_that_does_not_exist_is_found(name):
    assert problem(name)


def test_the_table_of_files_says_who_imports_whom():
    rows = re.findall(r"^\| `(\w+)\.py` \| ([^|]+) \|", read("docs/design.md"), re.MULTILINE)
    assert {file: set(re.findall(r"`(\w+)\.py`", cell)) for file, cell in rows} == {
        module: imported(module) & set(MODULES) for module in MODULES
    }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_fit_a_screen_and_files_a_reader(document):
    lines = read(document).split("\n")
    assert len(lines) <= 156 and [line for line in lines if len(line) > 120] == []


def commands(document):
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```$", read(document), re.DOTALL | re.MULTILINE))
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").split("\n") if line.strip()]


def test_the_commands_of_contributing_can_be_given():
    """Files, tests, targets and options that stand in them exist; programs that are not ours are left alone."""
    ours, known = 0, repository()[2]
    for words in commands("CONTRIBUTING.md"):
        if words[0] == "make":
            assert words[1] == ".venv/.built" or not problem(f"make {words[1]}")
        if words[0] != ".venv/bin/python":
            continue
        ours += 1
        is_pytest = words[1:3] == ["-m", "pytest"]
        for word in words[3 if is_pytest else 1 :]:
            file, _, test = word.partition("::")
            if file.endswith(".py"):
                assert (ROOT / file).is_file() and (not test or test in names_of(ROOT / file)), word
            elif word.startswith("--") and not is_pytest:
                assert word in known or f'"{word}"' in (ROOT / words[1]).read_text(encoding="utf-8"), word
        if "-k" in words:
            tests = "\n".join(names_of(ROOT / words[-1])) if words[-1].endswith(".py") else ""
            assert all(part in tests for part in words[words.index("-k") + 1].split(" or ")), words
    assert ours >= 4


def test_ruff_goes_before_the_tests():
    folder = ROOT / ".no-such-environment"
    words = ["make", "-n", "-o", f"{folder}/.built", f"VENV={folder}"]
    for target in ("test", "test-all"):
        done = subprocess.run([*words, target], cwd=ROOT, capture_output=True, text=True, check=True)
        tools = re.findall(r"-m (ruff check \.|ruff format --check \.|pytest)", done.stdout)
        assert tools == ["ruff check .", "ruff format --check .", "pytest"]


def test_every_tested_release_lies_in_its_range():
    lines = [re.sub("#.*", "", line).strip() for line in read("requirements.txt").split("\n")]
    ranges = {wanted.name: wanted.specifier for wanted in map(Requirement, filter(None, lines))}
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", read("tests/requirements-tested.txt"), re.MULTILINE))
    optional = {"bitsandbytes", "pyarrow"}  # README names it where it is needed
    assert ranges.keys() == tested.keys() - optional and all(name in read("README.md") for name in optional)
    assert [name for name in ranges if not ranges[name].contains(tested[name])] == []
