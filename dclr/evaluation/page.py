"""An HTML page that is one file: sections, tables and pictures. It holds its pictures and loads nothing.

    page("Title", [section("Loss", "One sentence.", table(["run", "loss"], [["a", "0.41"]]), picture(png, "Curve"))])

Every text is escaped, because names of classes and files may contain anything. Only Html, which these functions return,
is written as it is.
"""

import base64
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path

from dclr.errors import printable


class Html(str):
    """A text that is HTML already."""


STYLE = """
:root { color-scheme: light; }
body { margin: 1.5em auto; max-width: 70em; padding: 0 1em; font: 15px/1.5 system-ui, sans-serif; color: #222;
  background: #fff; overflow-wrap: break-word; }
h1 { font-size: 1.5em; margin: 0 0 .5em; }
h2 { font-size: 1.2em; margin: 2em 0 .5em; border-top: 1px solid #ccc; padding-top: .8em; }
p { max-width: 50em; margin: .6em 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6em 0; }
th, td { text-align: left; vertical-align: top; padding: .3em .8em .3em 0; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1em 0; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20em, 100%), 1fr)); gap: 0 1em; }
.row figure { margin: .5em 0; }
summary { cursor: pointer; margin: .6em 0; }
img { max-width: 100%; height: auto; }
figcaption, small { color: #666; }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
"""Forbids a browser to load anything from elsewhere."""


def page(title: str, body: Sequence[str], style: str = STYLE) -> str:
    """Return a whole page as HTML, with `title` as its first heading. A plain text in `body` becomes a paragraph."""
    parts = "\n".join(map(paragraph, body))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{text(title)}</h1>
{parts}
</body>
</html>
"""


def text(words: object) -> Html:
    """Return a text with escaped HTML, control characters and undecodable bytes. Html stays as it is."""
    return words if isinstance(words, Html) else Html(escape(printable(str(words))))


def paragraph(words: str) -> Html:
    """Return a text as a paragraph. Html stays as it is."""
    return words if isinstance(words, Html) else Html(f"<p>{text(words)}</p>")


def section(heading: str, *parts: str) -> Html:
    """Return a section with its heading. A plain text in `parts` becomes a paragraph."""
    return Html("\n".join([f"<section>\n<h2>{text(heading)}</h2>", *map(paragraph, parts), "</section>"]))


def table(head: Sequence[str], rows: Sequence[Sequence[object]], numbers: Collection[str] = ()) -> Html:
    """Return a table.

    Args:
        head: the names of the columns.
        rows: of texts or Html.
        numbers: the names of the right-aligned columns.

    Raises:
        ValueError: a row has another number of cells than `head`.
    """
    kinds = [' class="number"' if name in numbers else "" for name in head]

    def line(cells: Sequence[object], tag: str) -> str:
        inside = zip(kinds, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for kind, cell in inside) + "</tr>"

    lines = "\n".join(line(row, "td") for row in rows)
    return Html(
        f'<div class="wide"><table>\n<thead>{line(head, "th")}</thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'
    )


def details(summary: str, *parts: str) -> Html:
    """Return parts that a reader opens by a click on their summary. A plain text in `parts` becomes a paragraph."""
    inside = "\n".join(map(paragraph, parts))
    return Html(f"<details><summary>{text(summary)}</summary>\n{inside}\n</details>")


def side_by_side(*parts: Html) -> Html:
    """Return parts next to each other, as many as the width of the window has room for."""
    return Html('<div class="row">\n' + "\n".join(parts) + "\n</div>")


def picture(png: bytes | Path, description: str, caption: str = "") -> Html:
    """Return a picture in PNG format as part of the page.

    Args:
        png: the content of the file, or its path. Raises OSError if it cannot be read.
        description: what the picture shows, for readers that cannot see it.
        caption: the text below the picture.
    """
    content = base64.b64encode(png.read_bytes() if isinstance(png, Path) else png).decode()
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Html(f'<figure><img src="data:image/png;base64,{content}" alt="{text(description)}">{below}</figure>')
