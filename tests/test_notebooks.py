"""The anatomy that every notebook keeps; that they run is checked by nbmake."""

import ast
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_the_series_is_complete():
    names = [path.stem for path in NOTEBOOKS]
    assert names[:8] == ["00_quickstart", "01_vocabulary", "02_ternary_quantization", "03_boltblock", "04_training",
                         "05_evaluation_bpc", "06_generation", "07_runtimes"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_anatomy(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert texts[0].startswith(f"# {path.stem[:2]} · ")
    assert "| full |" in texts[0] and "| smoke" in texts[0]

    parameters = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert parameters == code[:1]
    for statement in ast.parse("".join(parameters[0]["source"])).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)

    sources = ["".join(cell["source"]) for cell in code]
    assert any("active_profile()" in source for source in sources)
    assert not any(re.search(r"\bif\b.*smoke", source) for source in sources)
    assert all(len(source.splitlines()) <= 30 for source in sources)

    figures = [text for text in texts if text.startswith("*The figure")]
    assert figures and any("**What you saw" in text for text in figures)
    solutions = [cell for cell in code if "solution" in cell["metadata"].get("tags", [])]
    assert len(solutions) == 1 and solutions[0]["metadata"]["jupyter"]["source_hidden"]
    assert any(text.startswith("## References") or "\n## References" in text for text in texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_to_other_notebooks_lead_somewhere(path):
    for target in re.findall(r"\]\((\d\d_[^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).is_file(), target
