"The documentation as a folder of HTML files: `python tests/website.py OUT`. Pages are drawn from their stored outputs, nothing is run, and nothing that was written asks the network for anything."
from functools import lru_cache
from pathlib import Path
import os
import re
import sys

from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from nbconvert.filters import ansi2html, markdown2html_mistune
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
import nbformat
import readme
from rwkv_peft.show.html import Html, escape, tag

root = Path(__file__).parent.parent
ROOMS = ["guides", "show", "kernels", "model", "peft", "data", "train", "export", "look", "notebook", "bench"]
GREEK_AND_KIN = [(r"\\tfrac", r"\\frac"), (r"\\[bB]ig[lr]?(?![a-z])", ""), (r"\\textstyle", ""), (r"\\[lr]Vert", r"\\Vert"), (r"\\[lr]vert", r"\\vert"), (r"\\le(?![a-zA-Z])", r"\\leq"), (r"\\ne(?![a-zA-Z])", r"\\neq"), (r"\\ge(?![a-zA-Z])", r"\\geq"), (r"\\(?:bmod|pmod)", r"\\;\\mathrm{mod}\\;"),
                 (r"\\mathrel\{(.)\}", r"\1"), (r"\\sqrt ?(\w)", r"\\sqrt{\1}"), (r"\\(?:left|right)(?=[\\.])", "")]       # TeX that matplotlib doesn't know, in words that it does
STYLE = """:root { color-scheme: light dark } body { font-family: system-ui, sans-serif; line-height: 1.5; margin: 0; display: flex }
nav { flex: 0 0 15em; height: 100vh; overflow: auto; position: sticky; top: 0; padding: 1em; box-sizing: border-box; font-size: .9em; border-right: 1px solid color-mix(in srgb, currentColor 20%, transparent) }
nav a { display: block; padding: .1em 0; text-decoration: none; color: inherit } nav a[aria-current] { font-weight: bold; text-decoration: underline } summary { cursor: pointer; padding: .2em 0 }
main { flex: 1; min-width: 0; max-width: 60em; padding: 0 2em 4em } pre, code { font-family: monospace } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 } img { max-width: 100% }
.highlight { background: color-mix(in srgb, currentColor 6%, transparent); padding: .4em .6em; border-radius: 4px; margin: .6em 0 } .anchor-link { display: none } table { border-collapse: collapse } td, th { padding: .2em .6em; border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); vertical-align: top; text-align: left }
.output { border-left: 3px solid color-mix(in srgb, currentColor 20%, transparent); padding-left: .8em; margin: .4em 0; overflow-x: auto } .tex { fill: currentColor; stroke: none } .formula { text-align: center; margin: 1em 0; overflow-x: auto }
@media (max-width: 50em) { body { display: block } nav { position: static; height: auto; border: 0 } main { padding: 0 1em } }
"""
CODE = HtmlFormatter(style="default", nobackground=True)
STYLE += f"@media (prefers-color-scheme: light) {{ {CODE.get_style_defs('.highlight')} }} @media (prefers-color-scheme: dark) {{ {HtmlFormatter(style='github-dark', nobackground=True).get_style_defs('.highlight')} }}"
PAGE = """<!DOCTYPE html>
<html lang="{lang}"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>{style}</style></head>
<body><nav aria-label="pages">{nav}</nav><main>{body}</main></body></html>
"""


def place(page: Path) -> str:
    "Where a notebook's HTML goes: guides/10_tiny_model.html for nbs/guides/10_tiny_model.ipynb."
    return page.relative_to(root / "nbs").with_suffix(".html").as_posix()


def outline(path: TextPath) -> str:
    "The d= of an SVG path, in tenths of a point, y downward."
    letters = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
    drawn = lambda xy, code: "Z" if code == Outline.CLOSEPOLY else letters[code] + " ".join(f"{10 * x * (-1) ** i:.0f}" for i, x in enumerate(xy))
    return "".join(drawn(xy, code) for xy, code in path.iter_segments(curves=True, simplify=False))


@lru_cache(maxsize=None)
def formula(tex: str, block: bool) -> Html:
    "TeX as SVG, its source for those who don't see it; as code where matplotlib can't read it."
    words = " ".join(tex.split())
    for old, new in GREEK_AND_KIN: words = re.sub(old, new, words)
    try: path = TextPath((0, 0), f"${words}$", size=15)
    except ValueError: return tag("div", tag("code", tex.strip()), class_="formula") if block else tag("code", tex)
    (left, low), (right, high) = path.get_extents().get_points() if len(path) else ((0, 0), (1, 1))
    box = f"{10 * left:.0f} {-10 * high - 8:.0f} {10 * (right - left):.0f} {10 * (high - low) + 16:.0f}"
    drawn = tag("svg", tag("path", d=outline(path)), class_="tex", viewBox=box, role="img", aria_label=" ".join(tex.split()),
                style=f"width:{(right - left) / 15:.2f}em;height:{(high - low + 1.6) / 15:.2f}em;vertical-align:{(low - .8) / 15:.2f}em")
    return tag("div", drawn, class_="formula") if block else drawn


def with_formulas(text: str) -> str:
    "Markdown with its $...$ and $$...$$ drawn, those in code left alone."
    parts = re.split(r"(^```.*?^```|`+[^`]+`+)", text, flags=re.S | re.M)
    draw = lambda m: str(formula(m[1], True) if m[1] else formula(m[2], False)).replace("|", "&#124;")
    return "".join(part if i % 2 else re.sub(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?![\s$])([^$\n]+?)(?<!\s)\$(?!\w)", draw, part, flags=re.S) for i, part in enumerate(parts))


def linked(text: str, page: Path) -> str:
    "Links among notebooks, and to the READMEs, as links among their HTML."
    readmes = {name: root / "nbs" / source for name, source in readme.SOURCES.items()}
    def there(m):
        target = readmes.get(m[1]) or ((root if page.parent == root / "nbs" and m[1].startswith("nbs/") else page.parent) / m[1]).resolve()
        return f"]({os.path.relpath(root / 'nbs' / place(target), page.parent)}{m[2] or ''})" if target.suffix == ".ipynb" else m[0]
    return re.sub(r"\]\((?!https?:)([^)\s#]+)(#[^)\s]*)?\)", there, text)


def output_of(output: dict, page: Path) -> str:
    "An output in the richest form that needs no kernel: HTML, Markdown, SVG, or text with its ANSI colours."
    data = output.get("data", {"text/plain": output.get("text") or "\n".join(output.get("traceback", []))})
    if "text/html" in data: return data["text/html"]
    if "text/markdown" in data: return prose(data["text/markdown"], page)
    if "image/svg+xml" in data: return data["image/svg+xml"]
    return f"<pre>{ansi2html(data.get('text/plain', ''))}</pre>"


def prose(text: str, page: Path) -> str:
    "Markdown as HTML."
    return markdown2html_mistune(with_formulas(linked(text, page)))


def body_of(page: Path) -> str:
    "The notebook's cells as HTML, without the hidden ones."
    parts = []
    for cell in readme.for_reading(nbformat.read(page, as_version=4)).cells:
        if cell.cell_type == "markdown": parts.append(prose(cell.source, page))
        elif cell.cell_type == "code":
            if "transient" not in cell.metadata and cell.source.strip(): parts.append(highlight(cell.source, PythonLexer(), CODE))
            parts += [f'<div class="output">{output_of(o, page)}</div>' for o in cell.outputs]
    return "\n".join(parts)


def title_of(page: Path) -> str:
    "The words of the notebook's first heading."
    return re.match(r"# (.+)", nbformat.read(page, as_version=4).cells[0].source)[1].replace("`", "") + " (中文)" * page.stem.endswith("_zh")


def navigation(titles: dict[Path, str], here: Path) -> Html:
    "The list of rooms, the one of this page open."
    link = lambda page: tag("a", titles[page], href=os.path.relpath(place(page), Path(place(here)).parent), aria_current="page" if page == here else None)
    rooms = [tag("details", tag("summary", room), *(link(p) for p in titles if p.parent.name == room), open="" if room in (here.parent.name, "guides") else None) for room in ROOMS]
    return Html("".join([*(link(p) for p in titles if p.name.startswith("index")), *rooms, *(link(p) for p in titles if p.parent == root / "nbs" and not p.name.startswith("index"))]))


def build(out: Path, pages: list[Path] | None = None) -> list[Path]:
    "Writes the site, or some of its pages, below `out`; the files written."
    every = sorted(p for p in (root / "nbs").glob("**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    titles, written = {p: title_of(p) for p in every}, []
    for page in pages or every:
        file = out / place(page)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PAGE.format(title=escape(titles[page]), style=STYLE, nav=navigation(titles, page), body=body_of(page), lang="zh" if page.stem.endswith("_zh") else "en"), encoding="utf-8")
        written.append(file)
    return written


if __name__ == "__main__": print(f"{len(build(Path(sys.argv[1])))} pages")
