"README.md is nbs/index.ipynb as Markdown: `python tests/readme.py` writes it, a test compares."
from pathlib import Path
import re
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent


def render() -> str:
    "The page's cells as Markdown, without `#|` lines, hidden cells, or pictures that a README cannot hold."
    page = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    page.cells = [cell for cell in page.cells if "#| hide" not in cell.source]
    for cell in page.cells:
        if "#| echo: false" in cell.source: cell.metadata["transient"] = {"remove_source": True}
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if "text/html" not in o.get("data", {}) and "image/png" not in o.get("data", {})]
    text, _ = MarkdownExporter().from_notebook_node(page)
    return "<!-- written from nbs/index.ipynb by tests/readme.py -->\n\n" + text.strip() + "\n"


if __name__ == "__main__": (root / "README.md").write_text(render(), encoding="utf-8")
