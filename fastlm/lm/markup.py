"""HTML to the text that a reader sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any


class _Text(HTMLParser):
    """The visible text of HTML, a line for each block element."""

    HIDDEN = frozenset({"script", "style", "head", "noscript", "template"})
    BLOCKS = frozenset(
        "p div br li ul ol tr table h1 h2 h3 h4 h5 h6 pre blockquote section article hr dd dt"
        " header footer main nav aside figure figcaption td th".split()
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._out: list[str] = []
        self._hidden = 0
        self.tags = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags += 1
        self._hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self._out.append("\n")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags += 1
        if tag in self.BLOCKS:
            self._out.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        if tag in self.BLOCKS:
            self._out.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._out.append(data)

    def take(self) -> str:
        text, self._out = "".join(self._out), []
        return text


def without_tags(pieces: Iterator[str], counts: Counter[str]) -> Iterator[str]:
    """HTML to text: tags, scripts and styles out, entities to characters."""
    parser = _Text()
    for piece in pieces:
        parser.feed(piece)
        if text := parser.take():
            yield text
    parser.close()
    if text := parser.take():
        yield text
    counts["HTML tags"] += parser.tags
