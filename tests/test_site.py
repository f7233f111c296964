"The documentation site and the READMEs: they build without a network, nothing in them asks for one, and every link among pages arrives."
import re
import socket
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import readme
import website

root = Path(__file__).parent.parent


class Seen(HTMLParser):
    "What a page links (`links`), loads (`loads`: element, address), calls itself (`ids`), holds in scripts and event handlers (`active`), and pictures without words (`mute`)."
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids, self.active, self.mute, self.styles, self.inside = [], [], set(), [], [], [], []
        self.feed(text)

    def handle_starttag(self, name, pairs):
        given = dict(pairs)
        if "id" in given: self.ids.add(given["id"])
        if name == "a" and given.get("href"): self.links.append(given["href"])
        self.loads += [(name, given[k]) for k in ("src", "srcset", "poster", "data", "background", "action", "xlink:href") if given.get(k)]
        if name in ("link", "use", "image", "base"): self.loads.append((name, given.get("href")))
        self.styles.append(given.get("style") or "")
        self.active += [name] * (name in ("script", "iframe", "object", "embed", "form")) + [k for k in given if k.startswith("on")]
        if name == "img" and not (given.get("alt") or "").strip() or given.get("role") == "img" and not (given.get("aria-label") or "").strip(): self.mute.append(self.getpos())
        if name == "style": self.inside.append(name)

    def handle_endtag(self, name):
        if self.inside and name == self.inside[-1]: self.inside.pop()

    def handle_data(self, data):
        if self.inside: self.styles.append(data)


def outside(seen: Seen) -> list:
    "Addresses that a browser would fetch by itself."
    return [where for where in seen.loads if not (where[1] or "").startswith("data:image/")] + [s for s in seen.styles if re.search(r"@import|url\s*\((?!\s*['\"]?data:)", s)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site as a dictionary of file -> what is seen in it, built while sockets are forbidden."
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", lambda *a: pytest.fail("building the site opened a connection"))
    out = tmp_path_factory.mktemp("site")
    try: files = website.build(out)
    finally: patch.undo()
    return out, {f: Seen(f.read_text(encoding="utf-8")) for f in files}


def test_every_page_is_there_and_listed(site):
    out, seen = site
    pages = [p for p in (root / "nbs").glob("**/*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    wanted = {out / p.relative_to(root / "nbs").with_suffix(".html") for p in pages}
    assert set(seen) == wanted and {p.parent.name for p in pages} <= {*website.ROOMS, "nbs"}
    for file, page in seen.items():
        listed = {(file.parent / link).resolve() for link in page.links if not urlsplit(link).scheme}
        assert wanted <= listed, f"{file}: the list at its left lacks {wanted - listed}"


def test_the_site_loads_nothing(site):
    _, seen = site
    assert not {f.name: found for f, page in seen.items() if (found := outside(page))}
    assert not {f.name: page.active for f, page in seen.items() if page.active}
    assert not {f.name: page.mute for f, page in seen.items() if page.mute}, "pictures without words"


def test_no_page_keeps_a_picture_that_jupyterlab_shows_without_words():
    "Its `<img>` of a PNG output has no alt, whatever the metadata; `Picture` is HTML that has one."
    kept = [(p.name, c.id) for p in (root / "nbs").glob("**/*.ipynb") for c in nbformat.read(p, as_version=4).cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert not kept


def test_links_arrive(site):
    "The page is there, and where a link names a heading, the heading too."
    out, seen = site
    missing = []
    for file, page in seen.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme: continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target not in seen or parts.fragment and not {parts.fragment, unquote(parts.fragment)} & seen[target].ids: missing.append((str(file.relative_to(out)), link))
    assert not missing


def test_formulas():
    "A formula keeps its TeX as words, is never markup, and one that can't be drawn stands as it was written; dollars in code and prices stay."
    drawn = website.with_formulas("$a < b$ and `$x$` cost $5 or $6, $$\\unknownword{1} < 2$$")
    assert drawn.count("<svg") == 1 and 'aria-label="a &lt; b"' in drawn and "`$x$` cost $5 or $6" in drawn
    assert "<code>\\unknownword{1} &lt; 2</code>" in drawn
    assert website.with_formulas("```\n$x$\n```") == "```\n$x$\n```"
    assert "NaN" not in drawn and "inf" not in drawn


def test_an_output_as_text_is_no_markup():
    error = {"output_type": "error", "traceback": ["\x1b[31m<script>\x1b[0m"]}
    stream = {"output_type": "stream", "text": "<img src=x>"}
    assert "&lt;script&gt;" in website.output_of(error, root) and "\x1b" not in website.output_of(error, root)
    assert "&lt;img src=x&gt;" in website.output_of(stream, root)


@pytest.mark.parametrize("name", readme.SOURCES)
def test_readme_links_arrive(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", (root / name).read_text(encoding="utf-8")):
        assert urlsplit(link).scheme or (root / link.split("#")[0]).exists(), link


def test_the_readmes_say_the_same():
    "Blocks to be copied are the same but for comments, and so are figures, words in code, and links."
    english, chinese = ((root / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    fences = lambda text: [re.sub(r"[ \t]*#.*", "", block) for block in re.findall(r"^```.*?^```", text, re.S | re.M)]
    assert fences(english) == fences(chinese)
    settings = lambda text: [(line.split(" | ")[0], *line.rsplit(" | ", 2)[1:]) for line in text.splitlines() if re.match(r"\| `\w+` \|", line)]      # name, words, default
    assert settings(english) == settings(chinese) and len(settings(english)) > 60
    part = lambda text, start, end: text[text.index(start):text.index(end)]
    facts = lambda text: sorted(re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", text))
    assert facts(part(english, "## Measured\n", "## Tests\n")) == facts(part(chinese, "## 实测\n", "## 测试\n"))
    links = lambda text: sorted(set(re.findall(r"\]\(([^)\s]+)\)", text)) - {"README.md", "README_zh.md"})
    assert links(english) == links(chinese)
    assert "README_zh.md" in english and "README.md" in chinese
