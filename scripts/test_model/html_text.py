"""Plain text from documentation pages: the same bytes for the same page, on any machine.

Only the standard library's tokenizer is used, so that no parser version can change a corpus.
A page's text is what lies inside its content root; navigation, footers, scripts, permalinks and
indexes are dropped by tag or by class. Code blocks keep their line breaks and indentation.
"""

import re
from html.parser import HTMLParser


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VOID = _names("area base br col embed hr img input link meta param source track wbr")
SKIP_TAGS = _names("script style head nav footer form svg button select title iframe")
SKIP_CLASSES = _names(
    "headerlink anchor mark navheader navfooter related sphinxsidebar sidebar toctree-wrapper "
    "toc fancy_toc nosearch footer copyright indextable genindextable prev-next-area "
    "sourcelink viewcode-link viewcode-back nav-wrapper nav-wide-wrapper sphx-glr-signature "
    "sphx-glr-footer sphx-glr-download-link-note contents local changelog-link "
    "api_metadata srclink toclist linenos sr-only visually-hidden"
)
SKIP_IDS = _names("toc sidebar search footer docs-bottom-navigation docs-top-navigation")
BLOCK = _names(
    "address article aside blockquote body center dd details div dl dt fieldset figure figcaption "
    "h1 h2 h3 h4 h5 h6 header hr li main ol p pre section summary table tbody tfoot thead tr ul"
)
PARAGRAPH = _names("p pre h1 h2 h3 h4 h5 h6 table ul ol dl blockquote section")
SPACES = re.compile(r"[ \t\r\n\f\v\u00a0]+")


class _Extractor(HTMLParser):
    """Collects text between the opening and the closing of the content root."""

    def __init__(self, root: tuple[str, str, str]) -> None:
        super().__init__(convert_charrefs=True)
        self.root = root
        self.stack: list[tuple[str, bool]] = []  # open tags, and whether each starts a skip
        self.skips = 0
        self.depth_of_root: int | None = None
        self.pre = 0
        self.parts: list[str] = []

    @property
    def inside(self) -> bool:
        return self.depth_of_root is not None and self.skips == 0

    def _is_root(self, tag: str, attributes: dict[str, str | None]) -> bool:
        wanted, key, value = self.root
        if tag != wanted:
            return False
        return not key or value in (attributes.get(key) or "").split()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if self.inside:
            if tag == "br":
                self.parts.append("\n")
            elif tag in PARAGRAPH:
                self.parts.append("\n\n")
            elif tag in BLOCK:
                self.parts.append("\n")
            elif tag in ("td", "th"):
                self.parts.append("\t")
        if tag in VOID:
            return
        classes = frozenset((attributes.get("class") or "").split())
        skip = tag in SKIP_TAGS or bool(classes & SKIP_CLASSES) or attributes.get("id") in SKIP_IDS
        self.stack.append((tag, skip))
        self.skips += skip
        if self.depth_of_root is None and self._is_root(tag, attributes):
            self.depth_of_root = len(self.stack)
        self.pre += tag == "pre"
        if tag == "li" and self.inside:
            self.parts.append("- ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            self.handle_starttag(tag, attrs)  # <a/> and <div/> of XHTML hold no text

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or all(tag != name for name, _ in self.stack):
            return
        if self.inside and tag in BLOCK:
            self.parts.append("\n\n" if tag in PARAGRAPH else "\n")
        while True:  # old pages leave <li> and <p> open: close what lies above
            name, skip = self.stack.pop()
            self.skips -= skip
            self.pre -= name == "pre"
            if name == tag:
                break
        if self.depth_of_root is not None and len(self.stack) < self.depth_of_root:
            self.depth_of_root = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.parts.append(data if self.pre else SPACES.sub(" ", data))


def page_text(html: str, root: tuple[str, str, str]) -> str:
    """Return the text of `html` inside `root`, a (tag, attribute, value); '' if it has none."""
    extractor = _Extractor(root)
    extractor.feed(html)
    extractor.close()
    text = "".join(extractor.parts).replace("\u00a0", " ").replace("\u00b6", "")
    lines = []
    for raw in text.split("\n"):
        cells = [cell.strip() for cell in raw.split("\t")] if "\t" in raw.strip() else []
        # a table row, or a tab inside code: both read well with bars or spaces
        line = " | ".join(cell for cell in cells if cell) if cells else raw
        lines.append(line.rstrip())
    joined = "\n".join(_tidy(lines))
    return re.sub(r"\n{3,}", "\n\n", joined).strip()


def _tidy(lines: list[str]) -> list[str]:
    """Drop the single space that inline markup leaves, and bullets that hold nothing."""
    tidied = []
    for line in lines:
        stripped = line[1:] if line.startswith(" ") and not line.startswith("  ") else line
        tidied.append("" if stripped in ("-", "|") else stripped)
    return tidied
