"""The HTML around the parts of a page: the document with its style, sections, tables and figures.

There is no script, and nothing is fetched. All text that is passed in is escaped, except for
parameters that hold HTML.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from beit3.report.plots import DASHES, PALETTE, get_run_class
from beit3.report.runs import Run

STROKE_PIXELS = 3
"""Width of the stroke in front of a run's name; dashes are in units of it."""


def render_document(title: str, body: str) -> str:
    """Returns a whole HTML document; `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{render_run_styles()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def render_section(title: str, lead: str, parts: Iterable[str]) -> str:
    """Returns a section: a heading, a sentence on what it shows, and its parts, which are HTML."""
    return (
        f'<section><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>'
        f"{''.join(parts)}</section>"
    )


def render_panel(title: str, lead: str, body: str) -> str:
    """Returns a part of a section: a heading, a sentence on what it shows, and HTML."""
    return f'<h3>{escape(title)}</h3><p class="lead">{escape(lead)}</p>{body}'


def render_note(text: str) -> str:
    """Returns the line that stands where there is nothing to show."""
    return f'<p class="none">{escape(text)}</p>'


def render_details(summary: str, body: str) -> str:
    """Returns HTML that is folded behind a summary."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def render_figure_grid(figures: Sequence[str]) -> str:
    """Returns a grid of SVGs."""
    return f'<div class="curves">{"".join(f"<figure>{svg}</figure>" for svg in figures)}</div>'


def render_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows, each as column name -> text, as a table that scrolls sideways in its own box.

    Columns stand in the order in which the rows first name them. No rows give "".
    """
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in columns)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{escape(str(row.get(name, '')))}</td>" for name in columns)
        body += f"<tr>{cells}</tr>"
    return (
        '<div class="scroll" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# Names of runs --------------------------------------------------------------------------------


def render_run_label(label: str, index: int) -> str:
    """Returns the label of run `index` behind a stroke in its color and dash."""
    return f'<span class="run {get_run_class(index)}">{escape(label)}</span>'


def render_legend(runs: Sequence[Run]) -> str:
    """Returns the labels of several runs in one line; "" for one run, which needs no legend."""
    if len(runs) < 2:
        return ""
    labels = [render_run_label(run.label, index) for index, run in enumerate(runs)]
    return f'<p class="legend">{" ".join(labels)}</p>'


def render_run_styles() -> str:
    """Returns CSS that gives the class of each run a stroke in the color and dash of its curves."""
    rules = []
    for index in range(len(PALETTE) * len(DASHES)):
        stroke = render_stroke(PALETTE[index % len(PALETTE)], DASHES[index % len(DASHES)])
        rules.append(f".run{index}{{--run:{stroke}}}")
    return "".join(rules)


def render_stroke(color: str, dash: Sequence[float]) -> str:
    """Returns a dash, lengths on and off in line widths, as a CSS gradient."""
    stops = []
    start = 0.0
    for index, length in enumerate(dash or (1, 0)):
        end = start + length
        stop_color = "transparent" if index % 2 else color
        stops.append(f"{stop_color} {STROKE_PIXELS * start:g}px {STROKE_PIXELS * end:g}px")
        start = end
    return f"repeating-linear-gradient(90deg,{','.join(stops)})"


# Style ----------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--line:#dddcd8;--ink:#1c1d20;
--soft:#5c5f66;
--right:#0b6b57;--right-bg:#d8f0e8;--wrong:#a33a08;--wrong-bg:#fde6d8}
@media (prefers-color-scheme:dark){:root{--page:#131417;--card:#1c1e22;--line:#34373d;
--ink:#e8e8e6;--soft:#a3a7af;
--right:#7be0c3;--right-bg:#123b31;--wrong:#ffb48a;--wrong-bg:#4a2412}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:70rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:clamp(1.6rem,5vw,2.4rem);line-height:1.15;margin:.5rem 0 1rem;text-wrap:balance}
h2{font-size:1.5rem;margin:0 0 .25rem}h3{font-size:1.1rem;margin:2.2rem 0 .1rem}
section{margin-top:3rem;padding-top:1.5rem;border-top:1px solid var(--line)}
p{margin:.4rem 0;max-width:46rem}.lead,.facts,.none,small,figcaption,dt{color:var(--soft)}
.none{font-style:italic}
.facts,small,figcaption{font-size:.875rem}
figure{margin:0}figcaption{margin-top:.35rem}
svg{display:block;width:100%;height:auto;color:var(--ink)}
svg text{font-family:system-ui,sans-serif!important}
img{display:block;width:100%;height:auto;border-radius:2px}img.sharp{image-rendering:pixelated}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem;background:var(--card);
margin:1rem 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);
min-width:6rem}
th{font-size:.875rem;color:var(--soft);white-space:nowrap}tbody tr:last-child>*{border-bottom:0}
tbody th{color:var(--ink)}.number{text-align:right;white-space:nowrap;min-width:0}
.best{font-weight:700}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.75rem;
margin:1rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.tile span{display:block;font-size:.875rem;color:var(--soft)}
.tile b{display:block;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}
.run::before{content:"";display:inline-block;width:30px;height:3px;margin-right:.5em;
vertical-align:middle;
background:var(--run,var(--soft));print-color-adjust:exact}
.facts .run{font-weight:600;color:var(--ink);margin-right:.5rem}.legend .run{display:inline-block;
margin-right:1.2rem}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1rem;
margin-top:.8rem}
.wide{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:center;margin-top:.8rem}
.wide figure{flex:2 1 20rem}.wide figure+figure{flex:3 1 20rem}
.figures b{font-size:1.35rem}.figures span{display:inline-block;margin-right:1.2rem}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(4.75rem,1fr));gap:.75rem;
margin-top:.8rem}
.pairs img+img{margin-top:.3rem}
.quads{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(28rem,100%),1fr));
gap:1.5rem 2rem;margin-top:.8rem}
.quad{display:grid;grid-template-columns:repeat(4,1fr);gap:.3rem .5rem}.quad small{grid-column:1/-1}
.quad span{font-size:.875rem;color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(30rem,100%),1fr));gap:1rem;
margin-top:.8rem}
.views{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(9rem,100%),1fr));
gap:.6rem .7rem;align-items:end}
.lettered{grid-template-columns:repeat(auto-fit,minmax(min(14rem,100%),1fr))}
.views figcaption{margin:0 0 .2rem}.chips{font-size:.875rem;margin:0;line-height:1.6}
.chip{white-space:nowrap;margin-right:.7rem}.chip::before{content:"";display:inline-block;
width:.8em;height:.8em;margin-right:.35em;
border:1px solid var(--soft);border-radius:2px;vertical-align:-.05em;background:var(--chip);
print-color-adjust:exact}
.narrow{max-width:max-content}.narrow th,.narrow td{padding:.25rem .8rem}
.answers{grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr))}
.card{display:grid;grid-template-columns:6.5rem 1fr;gap:.9rem;align-items:start;
background:var(--card);
border:1px solid var(--line);border-radius:.5rem;padding:.7rem}
.tall{grid-template-columns:1fr;align-content:start}
.row{padding:.25rem 0;display:grid;grid-auto-flow:column;grid-auto-columns:minmax(0,1fr);gap:.5rem}
.hit{outline:3px solid var(--right);outline-offset:1px;border-radius:2px}
.answers mark{white-space:normal;-webkit-box-decoration-break:clone;box-decoration-break:clone}
.card dl{margin:0;overflow-wrap:anywhere}.card b+dl{margin-top:.25rem}
.card dt{font-size:.8125rem;line-height:1.3}.card dd{margin:0 0 .35rem}
mark{color:inherit;background:none;border-radius:.25rem;padding:0 .25rem;white-space:nowrap}
.right{color:var(--right);background:var(--right-bg)}.wrong{color:var(--wrong);
background:var(--wrong-bg)}
.wrong i{color:var(--soft);font-size:.85em}
.gap{display:inline-block;min-width:3em;border-bottom:2px solid var(--soft);border-radius:0;
line-height:1.1}
details{margin:.5rem 0}summary{cursor:pointer}
"""
