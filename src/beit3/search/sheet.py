"""A contact sheet: the results of a search as one HTML file that can be mailed.

Thumbnails, style and text are inside the file; nothing is fetched and there is no script.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from beit3.files import write_text
from beit3.search.input_tables import open_any_image
from beit3.search.query import Result
from beit3.search.sequence import SequenceResult

MAX_SIDE = 320
"""Longest side of a thumbnail in pixels."""
QUALITY = 80
"""Of JPEG, 0 to 95: a thumbnail takes about 15 KB."""
MAX_SHARP_WIDTH = 96
"""Width up to which an image is shown with sharp pixels; wider ones are smoothed."""
HIDDEN_COLUMNS = ("id", "image_path", "caption", "hash", "width", "height")
"""Columns that have a place of their own on a card, or none."""
MAX_VALUE_LENGTH = 200
"""Characters of a value that a card shows."""

LocateImage = Callable[[dict[str, Any]], str]
"""Returns the file of a row's image, or ""."""


def write_sheet(
    out: Path, results: Sequence[Result], locate_image: LocateImage, *, title: str, lead: str = ""
) -> Path:
    """Writes the results of one query as a page of cards, atomically.

    An image that cannot be read leaves a card that says why.

    Args:
        out: The HTML file.
        results: What was found, the best first.
        locate_image: Returns the file of a row's image.
        title: The query.
        lead: A sentence under it: the index, the filter.
    """
    cards = "".join(render_card(result, locate_image, label=str(result.rank)) for result in results)
    body = f'<ol class="cards">{cards}</ol>' if results else render_nothing()
    write_text(out, render_page(title, lead, body))
    return out


def write_sequence_sheet(
    out: Path,
    videos: Sequence[SequenceResult],
    locate_image: LocateImage,
    *,
    steps: Sequence[str],
    lead: str = "",
) -> Path:
    """Writes the videos of a sequence: a section for each, with a card for every step."""
    sections = []
    for video in videos:
        cards = "".join(
            render_card(frame, locate_image, label=steps[frame.rank - 1]) for frame in video.frames
        )
        sections.append(
            f"<section><h2>{video.rank}. {escape(video.video)} "
            f'<span class="score">{video.score:.3f}</span></h2>'
            f'<ol class="cards">{cards}</ol></section>'
        )
    body = "".join(sections) or render_nothing()
    write_text(out, render_page(", then ".join(steps), lead, body))
    return out


def render_card(result: Result, locate_image: LocateImage, *, label: str) -> str:
    """Returns a row as a list item: thumbnail, score, path, caption and metadata."""
    metadata = result.metadata
    path, caption = metadata.get("image_path") or "", metadata.get("caption") or ""
    values = {
        name: value
        for name, value in metadata.items()
        if name not in HIDDEN_COLUMNS and value is not None
    }
    before = ""
    if result.search_score is not None:
        before = f' <small title="score of the search">({result.search_score:.3f})</small>'
    parts = [
        f'<p class="top"><span>{escape(label)}</span>'
        f'<span class="score">{result.score:.3f}{before}</span></p>',
        f'<p class="path">{escape(path or result.id)}</p>',
    ]
    if path and result.id != path:
        parts.append(f'<p class="id">{escape(result.id)}</p>')
    if caption:
        parts.append(f"<p>{escape(_shorten(caption))}</p>")
    parts.append(render_values(values))
    alt = caption or f"Image {path or result.id}"
    thumbnail = render_thumbnail(locate_image(metadata), alt)
    return f"<li>{thumbnail}<div>{''.join(parts)}</div></li>"


def render_values(values: Mapping[str, Any]) -> str:
    """Returns metadata as a list of terms; "" without any."""
    if not values:
        return ""
    terms = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_shorten(_format(value)))}</dd></div>"
        for name, value in values.items()
    )
    return f"<dl>{terms}</dl>"


def render_thumbnail(path: str, alt: str) -> str:
    """Returns an image as a small JPEG within the page, or the reason why it is not shown."""
    if not path:
        return '<p class="missing">no image</p>'
    try:
        pixels = open_any_image(path).movedim(0, -1).numpy()
    except (ValueError, OSError) as error:
        # The path stands below.
        reason = str(error).rpartition(path)[2].strip(" :") or "it cannot be read"
        return f'<p class="missing">{escape(_shorten(reason))}</p>'
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    jpeg = io.BytesIO()
    image.save(jpeg, format="JPEG", quality=QUALITY)
    data = base64.b64encode(jpeg.getvalue()).decode("ascii")
    sharp = ' class="sharp"' if image.width <= MAX_SHARP_WIDTH else ""
    return (
        f'<img{sharp} src="data:image/jpeg;base64,{data}" alt="{escape(_shorten(alt))}" '
        f'width="{image.width}" height="{image.height}">'
    )


def render_nothing() -> str:
    """Returns the line of a page without results."""
    return "<p>Nothing was found: no row passes the filter, or the index is empty.</p>"


def render_page(title: str, lead: str, body: str) -> str:
    """Returns a whole HTML document; `body` is HTML."""
    lead_html = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>{lead_html}\n{body}\n</main>\n</body>\n</html>\n"
    )


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 1] + "…"


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--line:#dddcd8;--ink:#1c1d20;
--soft:#5c5f66;--mat:#efeeea}
@media (prefers-color-scheme:dark){:root{--page:#131417;--card:#1c1e22;--line:#34373d;
--ink:#e8e8e6;--soft:#a3a7af;--mat:#25282d}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:.9375rem/1.45 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:84rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:clamp(1.35rem,4vw,2rem);line-height:1.2;margin:.25rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .25rem;overflow-wrap:anywhere}
.lead,.path,.id,dt,.missing,small{color:var(--soft)}.lead{margin:0 0 1rem;overflow-wrap:anywhere}
.cards{list-style:none;margin:1rem 0 0;padding:0;display:grid;gap:.9rem;
grid-template-columns:repeat(auto-fill,minmax(min(15rem,100%),1fr))}
li{background:var(--card);border:1px solid var(--line);border-radius:.5rem;overflow:hidden;
display:flex;flex-direction:column}
li>img,.missing{width:100%;height:12.5rem;object-fit:contain;background:var(--mat);margin:0}
.sharp{image-rendering:pixelated}
.missing{display:grid;place-items:center;padding:1rem;text-align:center;font-size:.8125rem;
overflow-wrap:anywhere}
li>div{padding:.6rem .75rem .75rem}
p{margin:.2rem 0;overflow-wrap:anywhere}
.top{display:flex;justify-content:space-between;gap:.75rem;font-weight:600;margin-top:0}
.score{font-variant-numeric:tabular-nums;white-space:nowrap;font-weight:600}
.path,.id{font-size:.8125rem}
dl{margin:.45rem 0 0;font-size:.8125rem;border-top:1px solid var(--line);padding-top:.35rem}
dl div{display:flex;gap:.6rem;justify-content:space-between}
dt{flex:none}dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
@media (max-width:30rem){.cards{grid-template-columns:1fr;gap:.75rem}
li{flex-direction:row}li>img,.missing{width:38%;height:auto;min-height:7rem;
flex:none;align-self:stretch}
li>div{flex:1;min-width:0}}
"""
