"""The notebooks run from top to bottom, and each is in step with its text."""

import os
import pathlib

import jupytext
import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def kernel_of_this_interpreter(folder):
    write_kernel_spec(folder / "here")
    specs = KernelSpecManager(kernel_dirs=[str(folder)], ensure_native_kernel=False)
    return AsyncKernelManager(kernel_name="here", kernel_spec_manager=specs)


def environment():
    """That of a reader: one device, pictures in the notebook, and this clone of the library."""
    settings = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    settings["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return settings | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_there_are_notebooks():
    assert NOTEBOOKS


@every_notebook
def test_it_runs(path, tmp_path):
    notebook = read(path)
    work = tmp_path / "work"
    work.mkdir()
    client = NotebookClient(
        notebook,
        timeout=300,
        km=kernel_of_this_interpreter(tmp_path),
        resources={"metadata": {"path": str(work)}},
    )
    client.execute(env=environment(), cleanup_kc=True)
    streams = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    complaints = [out.text for out in streams if out.get("name") == "stderr"]
    assert not complaints


@every_notebook
def test_it_is_in_step_with_its_text(path):
    notebook, text = read(path), jupytext.read(path.with_suffix(".md"))
    assert notebook.metadata.jupytext.formats == "ipynb,md:myst"
    assert text.metadata.jupytext.formats == "ipynb,md:myst"
    one, two = ([(cell.cell_type, cell.source) for cell in n.cells] for n in (notebook, text))
    assert one == two


@every_notebook
def test_it_is_stored_without_outputs_and_opens_in_colab(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"
    badge = "https://colab.research.google.com/github/sparsejax/sparsejax/blob/main/notebooks/"
    assert f"({badge}{path.name})" in notebook.cells[0].source
