"""The anatomy that every notebook keeps; that they run is checked by nbmake."""

import ast
import json
import re
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from conftest import times
from nbclient import NotebookClient

import flashlm_helpers as fl

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
IMPORTED_NAMES = 5  # of ours besides fl, at most


def test_the_series_is_complete():
    assert [path.stem for path in NOTEBOOKS] == [
        "00_quickstart",
        "01_vocabulary",
        "02_ternary_quantization",
        "03_boltblock",
        "04_training",
        "05_evaluation_bpc",
        "06_generation",
        "07_runtimes",
        "08_your_own_mixer",
        "09_scaling",
        "10_v3_archive",
        "11_curriculum",
        "12_ablations",
    ]


def read_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return code, ["".join(cell["source"]) for cell in code], texts


def tagged(cells, tag):
    return [cell for cell in cells if tag in cell["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_anatomy(path):
    code, sources, texts = read_cells(path)
    assert texts[0].startswith(f"# {path.stem[:2]} · ")
    assert "| full |" in texts[0] and "| smoke" in texts[0]

    parameters = tagged(code, "parameters")
    assert parameters == code[:1]
    for statement in ast.parse(sources[0]).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)

    assert not any(re.search(r"\bif\b.*smoke", source) for source in sources)
    assert all(len(source.splitlines()) <= 30 for source in sources)

    figures = [text for text in texts if text.startswith("*The figure")]
    assert figures and any("**What you saw" in text for text in figures)
    solutions = tagged(code, "solution")
    assert len(solutions) == 1 and solutions[0]["metadata"]["jupyter"]["source_hidden"]
    assert any("## References" in text for text in texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_import_and_one_set_up(path):
    _, sources, _ = read_cells(path)
    assert sum("fl.setup(" in source for source in sources) == 1
    assert sum("import flashlm_helpers as fl" in source for source in sources) == 1
    names = re.findall(r"(?m)^from flashlm_helpers\S* import (.*)$", "\n".join(sources))
    assert len(",".join(names).split(",")) <= IMPORTED_NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_name_of_ours_is_there(path):
    _, sources, _ = read_cells(path)
    for chain in set(re.findall(r"\bfl((?:\.\w+)+)", "\n".join(sources))):
        value = fl
        for name in chain[1:].split("."):
            if isinstance(value, ModuleType):
                assert hasattr(value, name), f"fl{chain}"
                value = getattr(value, name)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_to_other_notebooks_lead_somewhere(path):
    for target in re.findall(r"\]\((\d\d_[^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).is_file(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_file_is_looked_for_in_the_working_folder(path):
    """Who runs a notebook chooses that folder: Jupyter, VS Code and papermill differ."""
    _, sources, _ = read_cells(path)
    for source in sources:
        assert not re.search(r"\b(cwd|chdir|getcwd)\b", source)
        assert not re.search(r"\b(Path|open)\(\s*[\"']", source)
        assert not re.search(r"[\"']\.\.?/", source)
        assert "fl.__file__" not in source  # an installed package has no clone around it


@pytest.mark.soak
@pytest.mark.skipif(times(True, False), reason="takes half an hour: make soak")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_again_and_in_any_folder(path, tmp_path, home, monkeypatch):
    """Every cell twice, then all of them once more, in one kernel whose folder is another."""
    monkeypatch.setenv("FLASHLM_PROFILE", "smoke")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    twice = [deepcopy(cell) for cell in code for _ in range(2)]
    notebook.cells = twice + code
    for number, cell in enumerate(notebook.cells):
        cell["id"] = str(number)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=where).execute()
