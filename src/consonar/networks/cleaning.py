"""Captions as LlamaGen's were before Flan-T5 read them (arXiv 2406.06525; the cleaning of IF and PixArt-alpha).

Lower case, no addresses, names of files and accounts, tags, Chinese, brackets and most signs. The rules and their order
are those of the released code, whose results the test holds.
Deviations: its packages ftfy and BeautifulSoup are not needed; what the parser of HTML refuses (`<![`) stays as it is.
"""

import html
import re
import unicodedata
from html.parser import HTMLParser
from urllib.parse import unquote_plus

DASHES = (
    r"\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63"
    r"\uff0d"
)
DOMAINS = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
FILES = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
Rules = tuple[tuple[str, str], ...]
ADDRESSES: Rules = (
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAINS})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAINS})", ""),
)
SIGNS: Rules = (
    (r"@\w+\b", ""),  # names of accounts
    (r"[\u31c0-\u9fff]+", ""),  # Chinese, and what stands beside it in Unicode
    (rf"[{DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?|&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{FILES}", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
WORDS: Rules = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{FILES}(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


class Text(HTMLParser):
    """What stands between the tags of `text`."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)  # as the parser of the released code is called
        self.parts: list[str] = []
        try:
            self.feed(text)
            self.close()
        except AssertionError:
            self.parts = [text]

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_entityref(self, name: str) -> None:
        meant = html.unescape(f"&{name};")
        self.parts.append(meant.removesuffix(";") if meant.startswith("&") and len(meant) > 1 else meant)

    def handle_charref(self, name: str) -> None:
        self.parts.append(html.unescape(f"&#{name};"))


def by_rules(text: str, rules: Rules) -> str:
    for pattern, other in rules:
        text = re.sub(pattern, other, text, flags=re.DOTALL)
    return text


def plain(text: str) -> str:
    """Without ligatures, letters of another width, and signs that steer a terminal."""
    text = re.sub(r"[\ufb00-\ufb06\uff01-\uffef\u3000]", lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return unicodedata.normalize("NFC", re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", "", text))


def cleaned(caption: str) -> str:
    """The caption as T5 read it; it may be empty."""
    for _ in range(2):
        text = by_rules(unquote_plus(caption).strip().lower(), ADDRESSES)
        text = by_rules("".join(Text(text).parts), SIGNS)
        if len(re.findall("[-_]", text)) > 3:
            text = re.sub("[-_]", " ", text)
        text = html.unescape(html.unescape(plain(text))).strip()
        caption = by_rules(text, WORDS).strip()
    return caption
