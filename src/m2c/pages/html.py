"""A page: head, style sheet, sections, tables. Self-contained; nothing in it runs.

All words from outside pass through `escape`; the policy in the head forbids scripts and any
request, should one be forgotten. Knows nothing about models.
"""

import base64
import hashlib
import html
from collections.abc import Sequence
from typing import Final

from m2c import __version__

MARK: Final = "m2c report"  # by it a file is known as one of ours
_STYLE: Final = """
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--ink:#1c2128;--dim:#5a6572;--line:#dfe3e8;
--room:#edf0f3;--1:#1f6feb;--2:#cf6a0b;--3:#1a8a5a;--4:#8250df;--5:#c9372c;--6:#0b8398;--7:#8a6d1b;
--8:#7a828c}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1c2026;--ink:#e8eaed;--dim:#a3adb8;
--line:#323942;--room:#2a3038;--1:#6cb0ff;--2:#ffa657;--3:#56d397;--4:#c29bff;--5:#ff8a80;
--6:#4fd0e0;--7:#d8bd5c;--8:#9aa4b2}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:1.6rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:40px 0 4px}
p{margin:4px 0;max-width:78ch}
.dim,figcaption,footer{color:var(--dim)}
.dim{overflow-wrap:anywhere}
figcaption{font-size:.9rem;margin-top:6px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:12px;
margin:20px 0 0;padding:0;list-style:none}
.cards li,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:12px 14px}
.cards b{display:block;font-size:1.2rem;font-weight:600;line-height:1.3;
font-variant-numeric:tabular-nums}
.cards span{color:var(--dim);font-size:.88rem}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px;
margin:12px 0;align-items:start}
figure{margin:0;min-width:0}
figure h3{font-size:1rem;margin:0 0 8px}
svg{display:block;width:100%;height:auto}
text{fill:var(--dim);font-size:12px;font-family:inherit}
.name{fill:var(--ink);font-size:13px}
.value,.end{text-anchor:end}
.middle{text-anchor:middle}
.value{font-size:13px}
.grid{stroke:var(--line)}
.axis{stroke:var(--dim)}
.room{fill:var(--room)}
polyline,.key line{fill:none;stroke-width:2;stroke-linejoin:round}
.s1{stroke:var(--1)}.s2{stroke:var(--2);stroke-dasharray:7 3}
.s3{stroke:var(--3);stroke-dasharray:2 3}.s4{stroke:var(--4);stroke-dasharray:9 3 2 3}
.s5{stroke:var(--5)}.s6{stroke:var(--6);stroke-dasharray:7 3}.s7{stroke:var(--7)}
.s8{stroke:var(--8);stroke-dasharray:4 4}
.f1{fill:var(--1)}.f2{fill:var(--2)}.f3{fill:var(--3)}.f4{fill:var(--4)}.f5{fill:var(--5)}
.f6{fill:var(--6)}.f7{fill:var(--7)}.f8{fill:var(--8)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:6px 0 0;padding:0;list-style:none;
font-size:.88rem}
.legend li{display:flex;align-items:center;gap:6px}
.key{width:22px;height:12px;flex:none}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px 5px 0;text-align:right;border-bottom:1px solid var(--line);
vertical-align:top}
th{font-weight:600;color:var(--dim)}
th:first-child,td:first-child,.words td,.words th{text-align:left}
table:not(.words) td:not(:first-child){white-space:nowrap}
.words td:last-child{overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}
details{margin-top:8px}
summary{cursor:pointer;color:var(--dim);font-size:.9rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:6px 0 0;max-height:14em;overflow-y:auto;
font:.9rem/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
footer{margin-top:40px;font-size:.88rem}
@media (max-width:480px){main{padding:18px 12px 32px}h1{font-size:1.3rem}
.cards{grid-template-columns:1fr 1fr;gap:8px}.cards li,figure{padding:10px}
.cards b{font-size:1.1rem}text{font-size:14px}.name,.value{font-size:14px}}
@media print{body{background:#fff}figure,.cards li{break-inside:avoid}}
"""
_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
# the one style sheet by its digest, and nothing else
POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'"
)


def escape(text: str) -> str:
    """Text that stays text, whatever it holds."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else _replaced(c) for c in text)
    return html.escape(shown, quote=True)


def _replaced(character: str) -> str:
    """Spaces of all kinds and what joins letters stay; controls and lone surrogates are marked."""
    invisible = character < " " or "\x7f" <= character <= "\x9f"
    return "\ufffd" if invisible or "\ud800" <= character <= "\udfff" else character


def page(title: str, subtitle: str, body: Sequence[str], *, created: str) -> bytes:
    """The whole document, UTF-8."""
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="{MARK}, version {__version__}">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{escape(title)}</h1><p class="dim">{escape(subtitle)}</p></header>\n'
        + "\n".join(body)
        + f"\n<footer>Written by m2c {escape(__version__)} on {escape(created)}. "
        "This page loads nothing and runs nothing.</footer>\n</main>\n</body>\n</html>\n"
    )
    return text.encode("utf-8", errors="replace")


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """Figures that matter, large. facts: (figure, what it is)."""
    items = [f"<li><b>{escape(a)}</b><span>{escape(b)}</span></li>" for a, b in facts]
    return f'<ul class="cards">{"".join(items)}</ul>'


def section(title: str, *parts: str, intro: str = "") -> str:
    """A heading, a sentence, and what follows (HTML)."""
    said = f"<p>{escape(intro)}</p>" if intro else ""
    return f"<section><h2>{escape(title)}</h2>{said}{''.join(parts)}</section>"


def figure(title: str, chart: str, caption: str = "", more: str = "") -> str:
    """chart, more: HTML."""
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{chart}{said}{more}</figure>"


def side_by_side(*figures: str) -> str:
    """Two in a row where the window is wide enough."""
    return f'<div class="grid2">{"".join(figures)}</div>'


def lines(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def quoted(text: str) -> str:
    """Text as it was typed or generated."""
    return f'<pre dir="auto">{escape(text)}</pre>'


def folded(title: str, *parts: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """words: the cells are text, not numbers."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    kind = ' class="words"' if words else ""
    top = f"<thead><tr>{head}</tr></thead>" if header else ""
    return f'<div class="scroll"><table{kind}>{top}<tbody>{body}</tbody></table></div>'
