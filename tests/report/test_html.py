import base64
import re
from collections.abc import Callable
from html.parser import HTMLParser

from lipfast.report import Comparison
from lipfast.report.html import html_report

Make = Callable[..., Comparison]


class Page(HTMLParser):
    """Collects the tags that load something, and the texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_loads_nothing(make_comparison: Make) -> None:
    text = html_report(make_comparison())
    page = Page(text)
    assert len(page.loads) == 2
    assert all(url.startswith("data:image/svg+xml;base64,") for url in page.loads)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]+", "", text))
    assert "script" not in page.tags
    assert "link" not in page.tags
    for url in page.loads:
        svg = base64.b64decode(url.split(",", 1)[1]).decode()
        assert ">Cayley<" in svg


def test_page_shows_values_failures_and_recipes(make_comparison: Make) -> None:
    page = Page(html_report(make_comparison(failed=("lot",))))
    for text in ("0.270", "95.9", "1 + 2.0e-08", "Training memory (MiB)", "2.13.0", "width"):
        assert any(text in t for t in page.texts), text
    assert "LOT failed: loss: expected a finite value, got nan in epoch 3" in page.texts


def test_page_escapes_what_it_shows(make_comparison: Make) -> None:
    text = html_report(make_comparison())
    assert "a machine with &lt;two&gt; cores &amp; more" in text
    assert "<two>" not in text
