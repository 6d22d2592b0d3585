"""The page that plays each query next to the videos that were found. It is one file and loads nothing else."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dclr.evaluation.page import Html, page, text
from dclr.evaluation.previews import Preview


@dataclass(frozen=True)
class Cell:
    """One video on a page or on a sheet."""

    name: str
    """Its path in the data set."""
    preview: Preview | str
    """Or the reason why it cannot be shown."""
    label: str = ""
    """Its class; empty if it is not known."""
    rank: int = 0
    """1 is the nearest; 0 is the query."""
    similarity: float = 0.0
    address: str = ""
    """Where a browser finds the video's own file; empty if it is not on disk."""


@dataclass(frozen=True)
class Block:
    """A query and the videos nearest to it, nearest first."""

    query: Cell
    nearest: Sequence[Cell]


_STYLE = """
body { margin: 1.5em; font: 14px/1.4 system-ui, sans-serif; color: #222; background: #fff; }
h1 { font-size: 1.3em; margin: 0; }
section { display: flex; gap: 2em; align-items: flex-start; margin-top: 1.5em; border-top: 1px solid #ccc; }
.query { position: sticky; top: 0; flex: none; padding-top: 1em; }
.nearest { display: flex; flex-wrap: wrap; gap: 1em; padding-top: 1em; }
figure { margin: 0; width: 220px; }
video, .none { display: block; width: 220px; height: 165px; background: #eee; object-fit: contain; }
.query video { outline: 3px solid #222; }
figure.same video { outline: 3px solid #2a9d2a; }
figure.other video { outline: 3px solid #c33; }
figcaption { margin-top: .4em; overflow-wrap: anywhere; }
small { color: #666; }
"""


def search_page(title: str, remarks: Sequence[str], blocks: Sequence[Block]) -> str:
    """Return the page as HTML. All texts are escaped.

    Args:
        title: one line.
        remarks: lines below the title.
    """
    lines = Html("<p>" + "<br>\n".join(map(text, remarks)) + "</p>")
    return page(title, [lines, *map(_section, blocks)], _STYLE)


def _section(block: Block) -> Html:
    found = "\n".join(_figure(cell, likeness_of_class(cell, block.query)) for cell in block.nearest)
    return Html(f"""<section>
<div class="query">{_figure(block.query, "")}</div>
<div class="nearest">
{found}
</div>
</section>""")


def likeness_of_class(cell: Cell, query: Cell) -> str:
    """Return "same" or "other" for a video whose class is that of the query or another; "" if one is not known."""
    if not (cell.label and query.label):
        return ""
    return "same" if cell.label == query.label else "other"


def _figure(cell: Cell, kind: str) -> str:
    """Return a video with its caption."""
    if isinstance(cell.preview, str):
        player, frames = f'<div class="none">{text(cell.preview)}</div>', ""
    else:
        content = base64.b64encode(cell.preview.mp4).decode()
        player = f'<video autoplay loop muted playsinline controls src="data:video/mp4;base64,{content}"></video>'
        frames = f"<br><small>{text(cell.preview.frames)}</small>"
    name: str = text(cell.name)
    if cell.address:
        name = f'<a href="{escape(cell.address)}">{name}</a>'
    rank = f"{cell.rank}. similarity {cell.similarity:.3f}" if cell.rank else "query"
    label = f" · {text(cell.label)}" if cell.label else ""
    return f'<figure class="{kind}">{player}<figcaption><b>{rank}</b>{label}<br>{name}{frames}</figcaption></figure>'
