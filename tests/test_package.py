"""The package as a whole: what importing it pulls in, its public names, its examples."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import pallas_kernels
import sparsejax

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(
    info.name
    for package in (sparsejax, pallas_kernels)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


def test_importing_pulls_in_nothing_heavy():
    code = (
        "import sys, sparsejax; "
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'matplotlib', 'torch', 'orbax', "
        "'experiments') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["sparsejax", "sparsejax.core", "sparsejax.weights", "sparsejax.models"]
)
def test_every_public_name_exists_and_says_what_it_is(name):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), f"{name}.{public} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_the_readme_s_training_step_runs(capsys):
    text = (ROOT / "README.md").read_text()
    part = text.split("<!-- example -->")[1].split("<!-- end of example -->")[0]
    code = part.split("```python")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    exec(compile(code, "README.md", "exec"), {})
    assert "0.5000" in capsys.readouterr().out


def test_both_libraries_say_that_they_are_typed():
    for package in (sparsejax, pallas_kernels):
        assert (pathlib.Path(package.__file__).parent / "py.typed").is_file()
