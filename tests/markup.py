"What a parser that isn't ours makes of our HTML."
from base64 import b64decode
from html.parser import HTMLParser

VOID = {"br", "hr", "img", "meta"}      # they have no end
SVG = "data:image/svg+xml;base64,"


class Markup(HTMLParser):
    "The tags (a comment is `<!--`), the attributes (pairs of name and value) and the text of a piece of HTML, whose elements must all be closed in order. A drawing counts as the SVG that it holds."

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(str(html))
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        source = dict(attributes).get("src") or ""
        if name == "img" and source.startswith(SVG): return self.add(Markup(b64decode(source.removeprefix(SVG)).decode()))
        self.tags.append(name)
        self.attributes += attributes
        if name not in VOID: self.open.append(name)

    def add(self, drawing):
        self.tags += drawing.tags
        self.attributes += drawing.attributes
        self.text += drawing.text

    def handle_endtag(self, name): assert self.open.pop() == name
    def handle_comment(self, data): self.tags.append("<!--")
    def handle_data(self, data): self.text += data
    def values(self, name): return [value for key, value in self.attributes if key == name]
