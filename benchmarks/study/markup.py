"""Plain text of files with markup: simple on purpose, as it only has to be real text, the same on every machine."""

from __future__ import annotations

import gzip
import re
from html.parser import HTMLParser
from pathlib import Path

_GROFF_CHARACTERS = {
    "-": "-",
    "e": "\\",
    "&": "",
    "|": "",
    "^": "",
    "/": "",
    ",": "",
    ":": "",
    "%": "",
    "~": " ",
    " ": " ",
}
_GROFF_NAMES = {"aq": "'", "dq": '"', "lq": '"', "rq": '"', "oq": "'", "cq": "'", "em": "--", "en": "-", "bu": "*"}
_GROFF_ESCAPE = re.compile(
    r"\\(?:f(?:\[\w*\]|\(\w\w|\w)|s[-+]?\d|\*?\((?P<two>..)|\*?\[(?P<long>[^\]]*)\]|(?P<one>.))", re.DOTALL
)
_GROFF_WITH_TEXT = {"SH", "SS", "B", "I", "BR", "BI", "IR", "IB", "RB", "RI", "SM", "SB", "TH", "IP", "Sh", "Ss", "Nm"}
_POD_CODE = re.compile(r"[BCEFILSX]<(?:<+\s)?([^<>]*)(?:\s>+)?>")


def text_of(file: Path) -> str:
    """Read a file as text without markup; empty where it is not UTF-8, or only names another."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    form = {".gz": groff_text, ".html": html_text, ".pod": pod_text}.get(file.suffix)
    return re.sub(r"\n{3,}", "\n\n", form(text) if form else text).strip() + "\n"


def groff_text(source: str) -> str:
    """Take the macros and escapes of a manual page out."""
    lines = []
    for line in source.splitlines():
        if line.startswith((".so ", '.\\"', "'\\\"")):
            continue
        if not line.startswith((".", "'")):
            lines.append(_unescaped(line))
            continue
        name, _, rest = line[1:].strip().partition(" ")
        if name in _GROFF_WITH_TEXT:
            told = _unescaped(rest.replace('" "', " ").replace('"', ""))
            lines.append(f"\n{told}\n" if name in ("SH", "SS", "Sh", "Ss", "TH") else told)
        elif name in ("PP", "P", "LP", "TP", "Pp", "sp"):
            lines.append("")
    return "\n".join(lines)


def _unescaped(line: str) -> str:
    def plain(match: re.Match[str]) -> str:
        if match["one"] is not None:
            return _GROFF_CHARACTERS.get(match["one"], "")
        return _GROFF_NAMES.get(match["two"] or match["long"] or "", "")

    return _GROFF_ESCAPE.sub(plain, line)


def pod_text(source: str) -> str:
    """Take the commands and formatting codes of Perl's documentation out."""
    kept = [
        line for line in source.splitlines() if not re.match(r"=(?:pod|cut|over|back|begin|end|for|encoding)\b", line)
    ]
    text = "\n".join(re.sub(r"^=(?:head\d|item)\s*", "", line) for line in kept)
    for _ in range(3):  # codes within codes
        text = _POD_CODE.sub(r"\1", text)
    return text


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 -- as its base
        self.hidden += tag in ("script", "style", "head")
        if tag in ("p", "h1", "h2", "h3", "h4", "li", "tr", "pre", "div", "dt", "dd"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def html_text(source: str) -> str:
    """Take the tags of a web page out."""
    parser = _Text()
    parser.feed(source)
    return "\n".join(line.strip() for line in "".join(parser.parts).splitlines())
