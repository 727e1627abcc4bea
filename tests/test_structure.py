"""The layout: which room a line belongs to, who may use whom, and how long a file and a function may be."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONVERTERS = ("convert_llama_weights", "apply_delta", "extend_vocab")
SCRIPTS = ("train", "generate_instruction", "chat", *CONVERTERS)
HELPERS = {"utils": SCRIPTS, "engines": ("train",), "weights": CONVERTERS}
MOST_LINES = {
    "train": 2243,
    "engines": 767,
    "weights": 465,
    "utils": 1732,
    "generate_instruction": 1708,
    "convert_llama_weights": 887,
    "apply_delta": 805,
    "chat": 631,
    "extend_vocab": 408,
}
# Names of Stanford Alpaca's utils.py, which forks import from there.
ORIGINALS = {"jload", "jdump", "openai_completion", "OpenAIDecodingArguments"}
EVERY_SCRIPTS = {"main", "parse_arguments"}  # each script's own, with one meaning


@functools.cache
def tree(module):
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def modules():
    return sorted(path.stem for path in ROOT.glob("*.py"))


def definitions(module):
    """{name: its statement} of what a module defines at its top level."""
    found = {}
    for node in tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            found |= dict.fromkeys(names, node)
    return found


def imported(module):
    """Names of the modules that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def used_names(node):
    """Plain names, and attributes of our helper modules, that stand in a piece of code."""
    names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    for attribute in (found for found in ast.walk(node) if isinstance(found, ast.Attribute)):
        if isinstance(attribute.value, ast.Name) and attribute.value.id in HELPERS:
            names.add(attribute.attr)
    return names


def used_by(helper, user):
    """The names of `helper` that `user` needs: those that it writes down, and what these are made of."""
    own = definitions(helper)
    needed, fresh = set(), used_names(tree(user)) & set(own) if helper in imported(user) else set()
    while fresh:
        needed |= fresh
        fresh = set().union(*(used_names(own[name]) for name in fresh)) & set(own) - needed
    return needed


def test_the_top_level_holds_five_scripts_and_three_helpers():
    assert modules() == sorted([*SCRIPTS, *HELPERS])


@pytest.mark.parametrize("module", MOST_LINES)
def test_no_file_is_longer_than_the_layout_says(module):
    assert len((ROOT / f"{module}.py").read_text(encoding="utf-8").splitlines()) <= MOST_LINES[module]


@pytest.mark.parametrize("module", [*SCRIPTS, *HELPERS])
def test_a_module_imports_only_the_helpers_that_are_its_own(module):
    ours = imported(module) & {*SCRIPTS, *HELPERS}
    allowed = {helper for helper, users in HELPERS.items() if module in users}
    assert ours <= (allowed or {"utils"}) - {module}


def test_what_stands_in_utils_is_used_by_two_scripts_or_more():
    users = {name: set() for name in definitions("utils")}
    for script in SCRIPTS:
        reached = used_by("utils", script)
        for helper, owners in HELPERS.items():
            if helper != "utils" and script in owners:
                reached |= used_by("utils", helper)
        for name in reached:
            users[name].add(script)
    alone = {name: sorted(found) for name, found in users.items() if len(found) < 2 and name not in ORIGINALS}
    assert alone == {}


@pytest.mark.parametrize("helper", ["engines", "weights"])
def test_what_stands_in_a_helper_is_used(helper):
    reached = set().union(*(used_by(helper, user) for user in HELPERS[helper]))
    assert set(definitions(helper)) - reached == set()


def test_what_is_below_train_knows_nothing_of_its_classes():
    """No helper reads a field or calls a method that a class of train.py defines and its base class does not."""
    import train

    own = set()
    for name, node in definitions("train").items():
        if not isinstance(node, ast.ClassDef) or name.endswith("Arguments"):  # arguments are for everybody
            continue
        inherited = {key for base in getattr(train, name).__mro__[1:] for key in vars(base)}
        body = [item for item in ast.walk(node)]
        written = {a.attr for a in body if isinstance(a, ast.Attribute) and isinstance(a.ctx, ast.Store)
                   and isinstance(a.value, ast.Name) and a.value.id == "self"}  # fmt: skip
        methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
        own |= {key for key in written | methods | fields if key not in inherited and not key.startswith("__")}
    own.discard("input_ids")  # what a tokenizer of transformers gives has a field of that name too
    assert own
    for helper in ("engines", "utils"):
        # Of somebody else's objects: `self` and modules are no concern of train.py.
        read = {a.attr for a in ast.walk(tree(helper)) if isinstance(a, ast.Attribute)
                and not (isinstance(a.value, ast.Name) and a.value.id in {"self", *imported(helper)})}  # fmt: skip
        assert read & own == set(), helper


@pytest.mark.parametrize("module", [*SCRIPTS, *HELPERS])
def test_no_function_is_longer_than_60_lines(module):
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


@pytest.mark.parametrize(("name", "most"), [("train", 50), ("resume_point", 40)])
def test_the_story_and_what_decides_about_resuming_stay_short(name, most):
    node = definitions("train")[name]
    assert node.end_lineno - node.lineno + 1 <= most


def test_no_name_has_two_meanings():
    homes = {}
    for module in [*SCRIPTS, *HELPERS]:
        for name, node in definitions(module).items():
            homes.setdefault(name, []).append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1 and name not in EVERY_SCRIPTS} == {}
