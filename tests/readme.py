"README.md is nbs/index.ipynb as Markdown, README_zh.md is nbs/index_zh.ipynb: `python tests/readme.py` writes both, a test compares."
from pathlib import Path
import re
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent
SOURCES = {"README.md": "index.ipynb", "README_zh.md": "index_zh.ipynb"}


def for_reading(page: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "The page without hidden cells and `#|` lines; the source of a cell with `#| echo: false` is marked to be left out."
    page.cells = [cell for cell in page.cells if "#| hide" not in cell.source]
    for cell in page.cells:
        if "#| echo: false" in cell.source: cell.metadata["transient"] = {"remove_source": True}
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    return page


def render(name: str = "README.md") -> str:
    "The page's cells as Markdown, without pictures that a README cannot hold."
    page = for_reading(nbformat.read(root / "nbs" / SOURCES[name], as_version=4))
    for cell in page.cells:
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if "text/html" not in o.get("data", {})]
    text, _ = MarkdownExporter().from_notebook_node(page)
    return f"<!-- written from nbs/{SOURCES[name]} by tests/readme.py -->\n\n" + text.strip() + "\n"


if __name__ == "__main__":
    for name in SOURCES: (root / name).write_text(render(name), encoding="utf-8")
