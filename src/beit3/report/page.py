"""One run or several as one HTML file: figures, curves and pictures, with nothing fetched from
anywhere.

Everything is inline (style, SVG, PNG as data URIs), there is no script, and all text is escaped.
Runs of one task share
a section and its pictures, one colour and dash each.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from beit3.files import write_text
from beit3.report.compare import (
    aligned,
    command,
    differences,
    fields,
    figure,
    score_table,
    scored_apart,
    state,
    texts,
)
from beit3.report.curves import (
    DASHES,
    MAX_RAW,
    PALETTE,
    TABLED,
    Chart,
    charts,
    curve,
    headline,
    part_curve,
    run_class,
    spelled,
    unit,
)
from beit3.report.panels import Panel, panels
from beit3.report.runs import Run, read_runs, tails
from beit3.training.log import format_duration

HEADINGS: Mapping[str, tuple[str, str]] = {
    "vqkd": (
        "Visual tokenizer",
        "A codebook of patches learnt from a teacher: what its codes mean.",
    ),
    "pretrain": (
        "Pretraining",
        "Hidden words and patches: how well they are guessed, and what the guesses look like.",
    ),
    "vqa": (
        "Visual question answering",
        "Questions about pictures the network has not seen, and what it answers.",
    ),
    "nlvr2": (
        "Visual reasoning",
        "Statements on two pictures: whether the network finds them true.",
    ),
    "captioning": (
        "Image captioning",
        "Pictures the network has not seen, and what it writes of them.",
    ),
    "retrieval": (
        "Image-text retrieval",
        "Captions and pictures as points: which of the one lie nearest to the other.",
    ),
    "imagenet": (
        "Image classification",
        "Pictures the network has not seen, and what it takes them for.",
    ),
    "coco": (
        "Detection and instance segmentation",
        "Objects in pictures the network has not seen. The losses of stages may rise at first: as "
        "proposals get better, there are "
        "more objects among them whose class and box are to be learnt.",
    ),
    "ade20k": (
        "Semantic segmentation",
        "Pictures the network has not seen, and what it takes every pixel of them for.",
    ),
}

SOURCES = {"main": "records"}
"""What to call a source whose name says nothing."""

UNFOLDED = 2
"""Scores beside the headline up to which their curves are not folded away."""

NAMED = 3
"""Runs up to which the title of a page names each."""


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str = "",
    table: Sequence[Mapping[str, str]] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the page of these run directories to `out` and return it; a reader never sees half a
    page.

    title: by default the runs' names. table: rows by column name, shown first. notes: lines under
    the title. ValueError
    for a directory that holds no run; records or weights that are gone leave one line in their
    place.
    """
    groups: dict[str, list[Run]] = {}
    for run in read_runs(runs):
        groups.setdefault(run.task, []).append(run)
    labels = [run.label for group in groups.values() for run in group]
    title = title or (
        " and ".join(labels)
        if len(labels) <= NAMED
        else f"{len(labels)} runs of {' and '.join(groups)}"
    )
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(note)}</p>" for note in notes)]
    if table:
        parts.append(
            section("At a glance", "The figures of these runs side by side.", [data_table(table)])
        )
    parts += [task_section(group) for group in groups.values()]
    out = Path(out)
    write_text(out, document(title, "\n".join(parts)))
    return out


def document(title: str, body: str) -> str:
    """A whole HTML document around `body`."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{run_styles()}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, lead: str, parts: Iterable[str]) -> str:
    """A heading, the sentence on what is to be seen, and what there is."""
    return (
        f"<section><h2>{escape(title)}</h2><p "
        f'class="lead">{escape(lead)}</p>{"".join(parts)}</section>'
    )


def task_section(runs: Sequence[Run]) -> str:
    """Everything of the runs of one task."""
    title, lead = HEADINGS.get(
        runs[0].task, (runs[0].task, f"Figures and curves of the task {runs[0].task}.")
    )
    parts = [run_line(run, index, several=len(runs) > 1) for index, run in enumerate(runs)]
    parts += [
        score_panel(runs),
        source_scores(runs),
        difference_panel(runs),
        curve_panel(runs),
        part_panel(runs),
    ]
    parts += [*map(panel_html, panels(ends(runs))), place_panel(runs)]
    return section(title, lead, parts)


def ends(runs: Sequence[Run]) -> list[Run]:
    """The runs that no other one of these started from: an earlier part of the same training gets
    curves, not pictures."""
    begun = [Path(run.init).resolve() for run in runs if run.init]
    return [
        run
        for run in runs
        if not any(run.path in start.parents or run.path == start for start in begun)
    ]


def panel_html(panel: Panel) -> str:
    return f'<h3>{escape(panel.title)}</h3><p class="lead">{escape(panel.lead)}</p>{panel.body}'


def run_line(run: Run, index: int, *, several: bool) -> str:
    """One line on a run: its name, length, batch, start and, where they were logged, time, pace and
    memory."""
    batch = run.recipe.get("data", {}).get("batch", {})
    facts = [f"{run.steps} steps"] + [
        f"{count} {SOURCES.get(name, name)} a step" for name, count in batch.items() if count
    ]
    # Weights lie at RUN/best: the last two parts name them without the machine's folders.
    facts.append(f"from {tails([run.init], least=2)[0]}" if run.init else "from scratch")
    costs = (
        (run.seconds(), format_duration),
        (run.waiting(), "{:.0%} of it waiting for records".format),
        (run.rate(), "{:.0f} records/s".format),
        (run.memory(), "{:.1f} GB at its peak".format),
    )
    facts += [form(value) for value, form in costs if value]
    name = f'<span class="run {run_class(index) if several else ""}">{escape(run.label)}</span>'
    return f'<p class="facts">{name} {escape(" · ".join(facts))}</p>'


def score_panel(runs: Sequence[Run]) -> str:
    """The latest held-out scores: tiles of one run, of several a table with the best marked."""
    if not any(run.scores for run in runs):
        return '<p class="none">No held-out scores yet.</p>'
    if len(runs) == 1:
        names = [name for name in score_names(runs) if "/" not in name and name not in TABLED]
        return f'<div class="tiles">{"".join(tile(runs[0], name) for name in names)}</div>'
    apart = scored_apart(runs)
    lead = (
        f"No best is marked: {' and '.join(apart)} are not the same in all runs."
        if apart
        else "★ marks the best of a column."
    )
    return (
        f'<h3>Scores</h3><p class="lead">On held-out records. {escape(lead)}</p>{score_table(runs)}'
    )


def score_names(runs: Sequence[Run]) -> list[str]:
    """Names of the scores that any of these runs has, the headline first."""
    names = dict.fromkeys(name for run in runs for name in run.scores if name != "step")
    return sorted(names, key=lambda name: name != headline(runs[0].task))


def tile(run: Run, name: str) -> str:
    """One score of one run."""
    label = escape(spelled(name) + unit(name, run.task))
    return (
        "<div "
        f'class="tile"><span>{label}</span><b>{escape(figure(name, run.scores[name]))}</b></div>'
    )


def source_scores(runs: Sequence[Run]) -> str:
    """Scores of single sources (`images/...`), folded away."""
    labels, rows = [run.label for run in runs], []
    for name in score_names(runs):
        if "/" in name:
            values = aligned(name, [run.scores.get(name) for run in runs])
            rows.append(
                {"score": name + unit(name, runs[0].task)} | dict(zip(labels, values, strict=True))
            )
    return (
        f"<details><summary>Scores of each source</summary>{data_table(rows)}</details>"
        if rows
        else ""
    )


def difference_panel(runs: Sequence[Run]) -> str:
    """The fields, and the facts of place and code, in which several runs differ."""
    if len(runs) < 2:
        return ""
    found = [difference_table(runs, [kind(run) for run in runs]) for kind in (fields, state)]
    lead = "Fields of the recipe and what the runs read; what is not listed is the same in all."
    body = (
        found[0] or '<p class="none">Nothing: the recipes and what the runs read are the same.</p>'
    )
    where = f"<h3>Machine and code</h3>{found[1]}" if found[1] else ""
    return f'<h3>What differs</h3><p class="lead">{lead}</p>{body}{where}'


def difference_table(runs: Sequence[Run], values: Sequence[Mapping]) -> str:
    """A row per name whose values differ, a column per run; empty where none does."""
    labels = [run.label for run in runs]
    return data_table(
        [
            {"field": name} | dict(zip(labels, row, strict=True))
            for name, row in differences(values).items()
        ]
    )


def curve_panel(runs: Sequence[Run]) -> str:
    """All curves of these runs under one legend."""
    found = charts(runs)
    if not found:
        return '<p class="none">No steps logged yet.</p>'
    others = [
        chart
        for chart in found
        if not chart.training and chart.held_out != (f"val/{headline(runs[0].task)}",)
    ]
    folded = others if len(others) > UNFOLDED else []
    shown = figure_grid([curve(runs, chart) for chart in found if chart not in folded])
    if folded:
        shown += (
            f"<details><summary>{len(folded)} other "
            f"scores</summary>{figure_grid([curve(runs, each) for each in folded])}</details>"
        )
    raw = ", the faint one the logged values" if len(runs) <= MAX_RAW else ""
    lead = (
        f"Training step by step: the line is a running mean{raw}; rings are scores on held-out "
        "records."
    )
    return f'<h3>Curves</h3><p class="lead">{lead}</p>{legend(runs)}{shown}'


def part_panel(runs: Sequence[Run]) -> str:
    """Gradient norms, whole and by part of the network, and the learning rates of groups; empty
    where none was logged."""
    whole = (
        [curve(runs, Chart("gradient norm", "gradient_norm"))]
        if any(len(run.series("gradient_norm")[0]) for run in runs)
        else []
    )
    parts = [
        part_curve(run, prefix, f"{title}: {run.label}" if len(runs) > 1 else title)
        for prefix, title in (
            ("gradient_norm", "gradient norm by part"),
            ("lr", "learning rate by group"),
        )
        for run in runs
        if len(run.names(f"{prefix}/")) > 1
    ]
    if not whole and not parts:
        return ""
    lead = (
        "Gradient norms before clipping, of the network and, where they were logged, of its "
        "parts; learning rates of its groups."
    )
    folded = (
        f"<details><summary>Parts of each network</summary>{figure_grid(parts)}</details>"
        if parts and len(runs) > MAX_RAW
        else ""
    )
    shown = figure_grid(whole) + folded if folded else figure_grid(whole + parts)
    return f'<h3>Gradients and rates</h3><p class="lead">{lead}</p>{legend(runs)}{shown}'


def place_panel(runs: Sequence[Run]) -> str:
    """Where the runs ran, by which code and command, folded away; empty where they did not keep
    it."""
    rows = [
        {"run": run.label} | {name: texts([value])[0] for name, value in state(run).items()}
        for run in runs
        if run.environment
    ]
    lines = [
        f"<dt>{escape(run.label)}, started "
        f"{escape(run.environment.get('started', 'at an unknown time'))}</dt>"
        f"<dd><code>{escape(command(run))}</code></dd>"
        for run in runs
        if command(run)
    ]
    said = f"<dl>{''.join(lines)}</dl>" if lines else ""
    return (
        f"<details><summary>Machine, code and command</summary>{data_table(rows)}{said}</details>"
        if rows or lines
        else ""
    )


def legend(runs: Sequence[Run]) -> str:
    """Each run's name beside its colour and dash; empty for one run."""
    names = (
        f'<span class="run {run_class(index)}">{escape(run.label)}</span>'
        for index, run in enumerate(runs)
    )
    return f'<p class="legend">{" ".join(names)}</p>' if len(runs) > 1 else ""


def figure_grid(found: Sequence[str]) -> str:
    return f'<div class="curves">{"".join(f"<figure>{svg}</figure>" for svg in found)}</div>'


def data_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a table that scrolls sideways in its own box; columns in the order in which rows
    first name them; "" for no rows."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in columns)
    cells = (
        "".join(f"<td>{escape(str(row.get(name, '')))}</td>" for name in columns) for row in rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return (
        '<div class="scroll" '
        f'tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def run_styles() -> str:
    """A stroke in the curves' colour and dash before everything that names a run."""
    looks = (
        (PALETTE[index % len(PALETTE)], DASHES[index % len(DASHES)])
        for index in range(len(PALETTE) * len(DASHES))
    )
    return "".join(
        f".run{index}{{--run:{stroke(color, dash)}}}" for index, (color, dash) in enumerate(looks)
    )


def stroke(color: str, dash: Sequence[float]) -> str:
    """A dash as CSS, the line 3 pixels wide."""
    stops, at = [], 0.0
    for index, length in enumerate(dash or (1, 0)):
        stops.append(
            f"{'transparent' if index % 2 else color} {3 * at:g}px {3 * (at + length):g}px"
        )
        at += length
    return f"repeating-linear-gradient(90deg,{','.join(stops)})"


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
