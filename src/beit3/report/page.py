"""One run or several as one HTML file: figures, curves and pictures, with nothing fetched from anywhere.

Everything is inline (style, SVG, PNG as data URIs), there is no script, and all text is escaped. Runs of one task share
a section and its pictures, one colour each.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from beit3.data.records import write_text
from beit3.report.curves import PALETTE, Run, headline, loss_curves, read_runs
from beit3.report.panels import Panel, panels

HEADINGS: Mapping[str, tuple[str, str]] = {
    "vqkd": ("Visual tokenizer", "A codebook of patches learnt from a teacher: what its codes mean."),
    "pretrain": ("Pretraining", "Hidden words and patches: how well they are guessed, and what the guesses look like."),
    "vqa": ("Visual question answering", "Questions about pictures the network has not seen, and what it answers."),
}

PERCENT = ("accuracy", "codebook_use", "most_frequent")
"""Scores that are shares."""


SOURCES = {"main": "records"}
"""What to call a source whose name says nothing."""


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str,
    table: Sequence[Mapping[str, str]] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the page of these run directories to `out` and return it; a reader never sees half a page.

    table: rows by column name, shown first. notes: lines under the title. ValueError for a directory that holds no run;
    records or weights that are gone leave one line in their place.
    """
    groups: dict[str, list[Run]] = {}
    for run in read_runs(runs):
        groups.setdefault(run.task, []).append(run)
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(note)}</p>" for note in notes)]
    if table:
        parts.append(section("At a glance", "The figures of these runs side by side.", [data_table(table)]))
    parts += [task_section(group) for group in groups.values()]
    out = Path(out)
    write_text(out, document(title, "\n".join(parts)))
    return out


def document(title: str, body: str) -> str:
    """A whole HTML document around `body`."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{run_colors()}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, lead: str, parts: Iterable[str]) -> str:
    """A heading, the sentence on what is to be seen, and what there is."""
    return f'<section><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>{"".join(parts)}</section>'


def task_section(runs: Sequence[Run]) -> str:
    """Everything of the runs of one task."""
    title, lead = HEADINGS.get(runs[0].task, (runs[0].task, f"Figures and curves of the task {runs[0].task}."))
    parts = [run_line(run, index, color=len(runs) > 1) for index, run in enumerate(runs)]
    parts += [score_tiles(runs), curve_panel(runs), *map(panel_html, panels(ends(runs)))]
    return section(title, lead, parts)


def ends(runs: Sequence[Run]) -> list[Run]:
    """The runs that no other one of these started from: an earlier part of the same training gets curves, not pictures."""
    begun = [Path(run.init).resolve() for run in runs if run.init]
    return [run for run in runs if not any(run.path in start.parents or run.path == start for start in begun)]


def panel_html(panel: Panel) -> str:
    return f'<h3>{escape(panel.title)}</h3><p class="lead">{escape(panel.lead)}</p>{panel.body}'


def run_line(run: Run, index: int, *, color: bool) -> str:
    """One line on a run: its name, length, batch and start."""
    steps = max((int(line["step"]) for line in run.metrics), default=0)
    batch = run.recipe.get("data", {}).get("batch", {})
    facts = [f"{steps} steps"] + [f"{count} {SOURCES.get(name, name)} a step" for name, count in batch.items() if count]
    # Weights lie at RUN/best: the last two parts name them without the machine's folders.
    facts.append(f"from {'/'.join(Path(run.init).parts[-2:])}" if run.init else "from scratch")
    name = f'<span class="run {f"run{index % len(PALETTE)}" if color else ""}">{escape(run.label)}</span>'
    return f'<p class="facts">{name} {escape(" · ".join(facts))}</p>'


def score_tiles(runs: Sequence[Run]) -> str:
    """The latest held-out scores, the headline first; scores of single sources (`images/...`) folded away below."""
    if not any(run.scores for run in runs):
        return '<p class="none">No held-out scores yet.</p>'
    names = list(dict.fromkeys(name for run in runs for name in run.scores if name != "step"))
    names.sort(key=lambda name: name != headline(runs[0].task))
    tiles = "".join(tile(runs, name) for name in names if "/" not in name)
    rows = [
        {"score": name} | {run.label: figure(name, run.scores[name]) if name in run.scores else "" for run in runs}
        for name in names if "/" in name
    ]  # fmt: skip
    more = f"<details><summary>Scores of each source</summary>{data_table(rows)}</details>" if rows else ""
    return f'<div class="tiles">{tiles}</div>{more}'


def tile(runs: Sequence[Run], name: str) -> str:
    """One score, a figure per run."""
    values = [
        f'<b class="run{index % len(PALETTE)} {"run" if len(runs) > 1 else ""}">{figure(name, run.scores[name])}</b>'
        for index, run in enumerate(runs) if name in run.scores
    ]  # fmt: skip
    return f'<div class="tile"><span>{escape(name.replace("_", " "))}</span>{"".join(values)}</div>'


def figure(name: str, value: float) -> str:
    """A score to read: shares in percent, the rest to four digits."""
    if not isinstance(value, int | float):
        return escape(json.dumps(value))
    return f"{value:.1%}" if name.rpartition("/")[2].endswith(PERCENT) else f"{value:.4g}"


def curve_panel(runs: Sequence[Run]) -> str:
    """All curves of these runs under one legend."""
    curves = loss_curves(runs)
    if not curves:
        return '<p class="none">No steps logged yet.</p>'
    names = (f'<span class="run run{i % len(PALETTE)}">{escape(run.label)}</span>' for i, run in enumerate(runs))
    legend = f'<p class="legend">{" ".join(names)}</p>' if len(runs) > 1 else ""
    figures = "".join(f"<figure>{svg}</figure>" for svg in curves)
    lead = "Training step by step: the thick line is a running mean, the faint one the logged values."
    return f'<h3>Curves</h3><p class="lead">{lead}</p>{legend}<div class="curves">{figures}</div>'


def data_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a table that scrolls sideways in its own box; columns in the order in which rows first name them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in columns)
    cells = ("".join(f"<td>{escape(str(row.get(name, '')))}</td>" for name in columns) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def run_colors() -> str:
    """The curves' colours for everything that names a run."""
    return "".join(f".run{index}{{--run:{color}}}" for index, color in enumerate(PALETTE))


STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--line:#dddcd8;--ink:#1c1d20;--soft:#5c5f66;
--right:#0b6b57;--right-bg:#d8f0e8;--wrong:#a33a08;--wrong-bg:#fde6d8}
@media (prefers-color-scheme:dark){:root{--page:#131417;--card:#1c1e22;--line:#34373d;--ink:#e8e8e6;--soft:#a3a7af;
--right:#7be0c3;--right-bg:#123b31;--wrong:#ffb48a;--wrong-bg:#4a2412}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:1rem/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:70rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:clamp(1.6rem,5vw,2.4rem);line-height:1.15;margin:.5rem 0 1rem;text-wrap:balance}
h2{font-size:1.5rem;margin:0 0 .25rem}h3{font-size:1.1rem;margin:2.2rem 0 .1rem}
section{margin-top:3rem;padding-top:1.5rem;border-top:1px solid var(--line)}
p{margin:.4rem 0;max-width:46rem}.lead,.facts,.none,small,figcaption,dt{color:var(--soft)}.none{font-style:italic}
.facts,small,figcaption{font-size:.875rem}
figure{margin:0}figcaption{margin-top:.35rem}
svg{display:block;width:100%;height:auto;color:var(--ink)}svg text{font-family:system-ui,sans-serif!important}
img{display:block;width:100%;height:auto;border-radius:2px}img.sharp{image-rendering:pixelated}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem;background:var(--card);margin:1rem 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);min-width:6rem}
th{font-size:.875rem;color:var(--soft);white-space:nowrap}tbody tr:last-child td{border-bottom:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.75rem;margin:1rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.tile span{display:block;font-size:.875rem;color:var(--soft)}
.tile b{display:block;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}
.run::before{content:"";display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.4em;
background:var(--run,var(--soft))}
.facts .run{font-weight:600;color:var(--ink);margin-right:.5rem}.legend .run{margin-right:1.2rem}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1rem;margin-top:.8rem}
.wide{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:center;margin-top:.8rem}
.wide figure{flex:2 1 20rem}.wide figure+figure{flex:3 1 20rem}
.figures b{font-size:1.35rem}.figures span{display:inline-block;margin-right:1.2rem}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(4.75rem,1fr));gap:.75rem;margin-top:.8rem}
.pairs img+img{margin-top:.3rem}
.quads{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(28rem,100%),1fr));gap:1.5rem 2rem;margin-top:.8rem}
.quad{display:grid;grid-template-columns:repeat(4,1fr);gap:.3rem .5rem}.quad small{grid-column:1/-1}
.quad span{font-size:.875rem;color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(30rem,100%),1fr));gap:1rem;margin-top:.8rem}
.answers{grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr))}
.card{display:grid;grid-template-columns:6.5rem 1fr;gap:.9rem;align-items:start;background:var(--card);
border:1px solid var(--line);border-radius:.5rem;padding:.7rem}
.card dl{margin:0;overflow-wrap:anywhere}.card dt{font-size:.8125rem;line-height:1.3}.card dd{margin:0 0 .35rem}
mark{color:inherit;background:none;border-radius:.25rem;padding:0 .25rem;white-space:nowrap}
.right{color:var(--right);background:var(--right-bg)}.wrong{color:var(--wrong);background:var(--wrong-bg)}
.wrong i{color:var(--soft);font-size:.85em}
.gap{display:inline-block;min-width:3em;border-bottom:2px solid var(--soft);border-radius:0;line-height:1.1}
details{margin:.5rem 0}summary{cursor:pointer}
"""
