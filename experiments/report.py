"""What a run found: claims with verdicts, tables and pictures, as JSON, as one self-contained HTML page and on the terminal.

    results = report.Results(title=..., claims=(report.Claim(id="bdia-1", claim=..., paper=12.3, ours=12.1, interval=0.4, seeds=5,
                                                             verdict="holds"),))
    report.save_results(workdir, results)
    report.write_report(workdir)          # workdir/report.html, with training curves drawn from metrics.jsonl

The page has its pictures and its style inside: no script, no font and no picture is fetched.
"""

import base64
import dataclasses
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from janax.experiments import config as configs
from janax.experiments.errors import UserError
from janax.experiments.metrics import read_rows

__all__ = [
    "Claim",
    "Figure",
    "Results",
    "Table",
    "Verdict",
    "format_interval",
    "format_value",
    "load_results",
    "save_results",
    "show",
    "write_combined",
    "write_report",
]

Verdict = Literal["holds", "does not hold", "undecided", "not run"]
_SIGNS: dict[str, str] = {"holds": "✓", "does not hold": "✗", "undecided": "≈", "not run": "–"}
_CLASSES = {"holds": "holds", "does not hold": "fails", "undecided": "open", "not run": "open"}
_COLORS = {"holds": "green", "does not hold": "red", "undecided": "yellow", "not run": "dim"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of the paper beside our measurement.

    Attributes:
      id: Short name, "bdia-1", stable over versions.
      claim: The statement, one sentence, with the unit.
      paper: The paper's number or word, None if it gives none.
      ours: Our number or word, None if not run.
      interval: Half width of the 95 % interval, or its (low, high); None if there is none.
      seeds: Independent seeds behind `ours`, None if randomness plays no part.
      verdict: "holds", "does not hold", "undecided" (the interval allows both) or "not run".
      note: What a reader must know to judge: scale, difference in setting.
    """

    id: str
    claim: str
    paper: float | str | None = None
    ours: float | str | None = None
    interval: float | tuple[float, float] | None = None
    seeds: int | None = None
    verdict: Verdict = "not run"
    note: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in _SIGNS:
            raise ValueError(f"Claim {self.id!r}: 'verdict' is {self.verdict!r}, expected one of {', '.join(map(repr, _SIGNS))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of words and numbers; every row as long as `columns`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"Table {self.title!r}: a row has {len(row)} entries, expected {len(self.columns)} as in 'columns'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A PNG, its path relative to the run directory, and what it shows; `alt` describes it to those who do not see it."""

    path: str
    caption: str
    alt: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """All that an experiment reports; what `run(config, session)` returns."""

    title: str
    intro: str = ""
    claims: Sequence[Claim] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def save_results(workdir: Path, results: Results) -> Path:
    """Writes results.json and returns its path."""
    path = workdir / "results.json"
    configs.write_json(path, results)
    return path


def load_results(workdir: Path) -> Results | None:
    """Reads results.json; None if the run has not come to its end.

    Raises:
      UserError: if the file cannot be understood.
    """
    path = workdir / "results.json"
    if not path.exists():
        return None
    values = configs.read_json(path)
    try:
        tables = [
            {**entry, "columns": tuple(entry["columns"]), "rows": tuple(map(tuple, entry["rows"]))} for entry in values.get("tables", ())
        ]
        return Results(
            title=values["title"],
            intro=values.get("intro", ""),
            claims=tuple(Claim(**entry) for entry in values.get("claims", ())),
            figures=tuple(Figure(**entry) for entry in values.get("figures", ())),
            tables=tuple(Table(**entry) for entry in tables),
            notes=tuple(values.get("notes", ())),
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a janax result ({error}); run the experiment again in another --workdir") from error


def format_value(value: Any) -> str:
    """A number in four digits, a word as it is, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−") if math.isfinite(value) else "not finite"
    return str(value)


def format_interval(ours: Any, interval: float | Sequence[float] | None) -> str:
    """ "12.34 ± 0.56", to the interval's second digit; "12.34 [11.9, 12.9]" if it has two ends; "12.34" if it has none."""
    if interval is None or not isinstance(ours, int | float):
        return format_value(ours)
    if isinstance(interval, Sequence):
        low, high = interval
        if low is None or high is None or not math.isfinite(high - low):
            return format_value(ours)
        digits = _digits((high - low) / 2)
        return f"{_fixed(ours, digits)} [{_fixed(low, digits)}, {_fixed(high, digits)}]"
    if not math.isfinite(interval):
        return format_value(ours)
    digits = _digits(interval)
    return f"{_fixed(ours, digits)} ± {_fixed(interval, digits)}"


def _digits(width: float) -> int:
    return 3 if width <= 0 else max(-20, 1 - math.floor(math.log10(width)))


def _fixed(value: float, digits: int) -> str:
    extreme = digits > 6 or abs(value) >= 1e6
    return (f"{value:.3g}" if extreme else f"{round(value, digits):.{max(digits, 0)}f}").replace("-", "−")


def show(results: Results, console: Console) -> None:
    """The claims on the terminal."""
    if not results.claims:
        return
    table = RichTable(title=results.title, title_justify="left", title_style="bold", header_style="bold", expand=False)
    table.add_column("claim", ratio=3, overflow="fold")
    for name in ("paper", "ours", "seeds"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for claim in results.claims:
        verdict = Text(f"{_SIGNS[claim.verdict]} {claim.verdict}", style=_COLORS[claim.verdict])
        texts = (claim.claim, format_value(claim.paper), format_interval(claim.ours, claim.interval), format_value(claim.seeds))
        table.add_row(*(Text(text) for text in texts), verdict)
    console.print(table)


def write_report(workdir: Path) -> Path:
    """Draws the training curves and writes report.html of one run directory, finished or not.

    Raises:
      UserError: if this is no run directory, or cannot be written.
    """
    section = _section(workdir, heading="h1", identity="run")
    return _write(workdir / "report.html", section.title, section.body)


def write_combined(workdirs: Sequence[Path], output: Path) -> Path:
    """One page for several runs, with a table of contents.

    Raises:
      UserError: if a directory holds no run, or the page cannot be written.
    """
    sections = [_section(workdir, heading="h2", identity=f"run-{i}") for i, workdir in enumerate(workdirs)]
    claims = sum(len(section.claims) for section in sections)
    entries = "".join(
        f'<li><a href="#{section.identity}">{_e(section.title)}</a> <span class="quiet">{_e(workdir.name)}: {_e(_tally(section.claims))}</span></li>'
        for workdir, section in zip(workdirs, sections)
    )
    total = _tally([claim for section in sections for claim in section.claims]) if claims else ""
    head = f'<header><h1>janax: {len(sections)} experiments</h1><p class="lead">{_e(total)}</p></header>'
    nav = f'<nav aria-label="Contents"><h2>Contents</h2><ol>{entries}</ol></nav>'
    return _write(output, f"janax: {len(sections)} experiments", head + nav + "".join(section.body for section in sections))


@dataclasses.dataclass(frozen=True)
class _Section:
    identity: str
    title: str
    claims: Sequence[Claim]
    body: str


def _section(workdir: Path, *, heading: str, identity: str) -> _Section:
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no janax run (no config.json); give the directory of a run, e.g. runs/bdia-default")
    record = configs.read_json(workdir / "config.json")
    status_path = workdir / "status.json"
    status = configs.read_json(status_path) if status_path.exists() else {}
    results = load_results(workdir)
    title = results.title if results else f"{record['experiment']} ({record['preset']})"
    sub = "h2" if heading == "h1" else "h3"
    parts = [f"<header><{heading}>{_e(title)}</{heading}>"]
    if results is None:
        state, message = status.get("state", "unknown"), status.get("message", "")
        parts.append(f'<p class="warning">This run is not finished ({_e(state)}). {_e(message)}</p>')
    else:
        parts.append("".join(f'<p class="lead">{_e(text)}</p>' for text in results.intro.split("\n\n") if text))
    parts.append(_facts(record, status) + "</header>")
    if results is not None:
        parts.append(_claims(results.claims, sub))
        parts.extend(_table(table, sub) for table in results.tables)
        if results.figures:
            figures = "".join(_figure(workdir / figure.path, figure.caption, figure.alt) for figure in results.figures)
            parts.append(f'<{sub}>Pictures</{sub}><div class="figures">{figures}</div>')
    curves = _curves(workdir)
    if curves:
        pictures = "".join(_figure(path, caption, caption) for path, caption in curves)
        parts.append(f'<{sub}>Training</{sub}><div class="figures">{pictures}</div>')
    if results is not None and results.notes:
        parts.append(f"<{sub}>Notes</{sub}><ul>{''.join(f'<li>{_e(note)}</li>' for note in results.notes)}</ul>")
    parts.append(_details(record))
    body = f'<section id="{identity}">{"".join(parts)}</section>'
    return _Section(identity, title, results.claims if results else (), body)


def _tally(claims: Sequence[Claim]) -> str:
    if not claims:
        return "no claims measured yet"
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in _SIGNS}
    return ", ".join(f"{count} {'hold' if verdict == 'holds' and count != 1 else verdict}" for verdict, count in counts.items() if count)


def _facts(record: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    versions = record.get("versions", {})
    count = record.get("num_devices", 1)
    facts = {
        "experiment": f"{record['experiment']}, preset {record['preset']}",
        "seed": format_value(record.get("seed")),
        "wall time": _duration(status.get("seconds")),
        "device": f"{count} × {record.get('device', '?')} ({record.get('backend', '?')})",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("janax", "jax", "flax", "optax", "python") if name in versions),
    }
    return f'<dl class="facts">{"".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in facts.items())}</dl>'


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _claims(claims: Sequence[Claim], heading: str) -> str:
    if not claims:
        return ""
    rows = []
    for claim in claims:
        note = f'<span class="note">{_e(claim.note)}</span>' if claim.note else ""
        cells = (
            f'<th scope="row"><span class="id">{_e(claim.id)}</span> {_e(claim.claim)}{note}</th>',
            f'<td data-label="paper"{_words(claim.paper)}>{_e(format_value(claim.paper))}</td>',
            f'<td data-label="ours"{_words(claim.ours)}>{_e(format_interval(claim.ours, claim.interval))}</td>',
            f'<td data-label="seeds">{_e(format_value(claim.seeds))}</td>',
            f'<td data-label="verdict"><span class="verdict {_CLASSES[claim.verdict]}">'
            f'<span aria-hidden="true">{_SIGNS[claim.verdict]}</span> {_e(claim.verdict)}</span></td>',
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{name}</th>' for name in ("claim", "paper", "ours ± 95 %", "seeds", "verdict"))
    return (
        f'<{heading}>Claims</{heading}><p class="quiet">{_e(_tally(claims))}</p>'
        f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _words(value: Any) -> str:
    return ' class="words"' if isinstance(value, str) else ""


def _table(table: Table, heading: str) -> str:
    numeric = [all(isinstance(row[i], int | float | None) for row in table.rows) for i in range(len(table.columns))]
    kinds = ["number" if is_number else "word" for is_number in numeric]
    head = "".join(f'<th scope="col" class="{kind}">{_e(name)}</th>' for name, kind in zip(table.columns, kinds))
    rows = ""
    for row in table.rows:
        cells = "".join(f'<td class="{kind}">{_e(format_value(value))}</td>' for value, kind in zip(row, kinds))
        rows += f"<tr>{cells}</tr>"
    caption = f'<p class="quiet">{_e(table.caption)}</p>' if table.caption else ""
    return (
        f'<{heading}>{_e(table.title)}</{heading}>{caption}<div class="scroll" tabindex="0" role="region" aria-label="{_e(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _figure(path: Path, caption: str, alt: str) -> str:
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError:
        return f'<p class="warning">The picture {_e(path.name)} is missing.</p>'
    return f'<figure><img alt="{_e(alt or caption)}" src="data:image/png;base64,{data}"><figcaption>{_e(caption)}</figcaption></figure>'


def _details(record: Mapping[str, Any]) -> str:
    def listing(title: str, values: Mapping[str, Any]) -> str:
        rows = "".join(f"<tr><td>{_e(name)}</td><td>{_e(_plain(value))}</td></tr>" for name, value in values.items())
        return f'<details><summary>{title}</summary><div class="scroll"><table><tbody>{rows}</tbody></table></div></details>'

    machine = {name: record[name] for name in ("platform", "backend", "device", "num_devices", "num_processes") if name in record}
    return listing("Configuration", configs.flatten(record.get("config", {}))) + listing(
        "Environment", record.get("versions", {}) | machine
    )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _curves(workdir: Path) -> list[tuple[Path, str]]:
    """Draws figures/curve-METRIC.png for every metric with two rows or more; the loss comes first."""
    by_metric: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in read_rows(workdir / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("run", "step") and isinstance(value, int | float):
                by_metric.setdefault(name, {}).setdefault(str(row.get("run", "train")), []).append((row["step"], float(value)))
    drawn = []
    for metric in sorted(by_metric, key=lambda name: (name != "loss", name)):
        series = {run: points for run, points in by_metric[metric].items() if len(points) > 1}
        if series:
            path = workdir / "figures" / f"curve-{re.sub(r'[^A-Za-z0-9_.-]+', '-', metric)}.png"
            drawn.append((_draw(path, metric, series), f"{metric} over the optimizer steps{_band_note(series)}."))
    return drawn


_SEED = re.compile(r"[-_/. ]?seed[-_=]?\d+")


def _band_note(series: Mapping[str, Any]) -> str:
    return ", mean and range over seeds" if len({_SEED.sub("", run) for run in series}) < len(series) else ""


def _draw(path: Path, metric: str, series: Mapping[str, list[tuple[int, float]]]) -> Path:
    from janax.experiments import plots

    groups: dict[str, list[dict[int, float]]] = {}
    for run, points in series.items():
        groups.setdefault(_SEED.sub("", run) or "train", []).append(dict(points[:: max(1, len(points) // 2000)]))
    lines: dict[str, tuple[list[float], ...]] = {}
    for name, runs in groups.items():
        shared = sorted(set.intersection(*(set(points) for points in runs)))
        columns = [[points[step] for points in runs] for step in shared]
        mean = [sum(column) / len(column) for column in columns]
        band = ([min(column) for column in columns], [max(column) for column in columns]) if len(runs) > 1 else ()
        lines[name] = ([float(step) for step in shared], mean, *band)
    values = [value for _, mean, *_ in lines.values() for value in mean]
    wide = bool(values) and min(values) > 0 and max(values) > 50 * min(values)
    return plots.lines(path, lines, xlabel="optimizer step", ylabel=metric, yscale="log" if wide else "linear")


def _write(path: Path, title: str, body: str) -> Path:
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{_e(title)}</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {(error.strerror or str(error)).lower()}; choose another --output") from error
    return path


def _e(text: Any) -> str:
    return html.escape(str(text), quote=True)


def _join(lines: Iterable[str]) -> str:
    return "".join(line.strip() for line in lines)


_STYLE = _join(
    """
:root{--ink:#1c2024;--quiet:#5b6570;--paper:#ffffff;--line:#dfe3e8;--panel:#f5f7f9;--link:#0b62a8;
--good:#0a6b3d;--good-bg:#e2f4ea;--bad:#a32312;--bad-bg:#fcebe8;--open:#59636e;--open-bg:#eceff2}
@media (prefers-color-scheme:dark){:root{--ink:#e7eaed;--quiet:#9ea9b4;--paper:#15181b;--line:#333a41;--panel:#1e2327;--link:#7cbcf0;
--good:#7fd8a6;--good-bg:#12351f;--bad:#ff9d8c;--bad-bg:#431b14;--open:#b3bdc7;--open-bg:#2a3037}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1.1rem 4rem}
h1,h2,h3{line-height:1.2;text-wrap:balance;overflow-wrap:anywhere}
h1{font-size:1.75rem;margin:.4rem 0 .8rem}
h2{font-size:1.3rem;margin:2.4rem 0 .6rem}
h3{font-size:1.08rem;margin:1.8rem 0 .5rem}
p,ul,ol{max-width:70ch}
a{color:var(--link)}
.lead{font-size:1.06rem}
.quiet{color:var(--quiet);font-size:.92rem;margin:.2rem 0 .7rem}
.warning{border-left:4px solid var(--bad);background:var(--bad-bg);padding:.6rem .9rem;border-radius:0 6px 6px 0}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.7rem 1.4rem;margin:1.2rem 0;padding:.9rem 1.1rem;
background:var(--panel);border-radius:10px}
.facts div{min-width:0}
.facts div:last-child{grid-column:1/-1}
dt{color:var(--quiet);font-size:.8rem;letter-spacing:.03em}
dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-size:.95rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{color:var(--quiet);font-weight:600;font-size:.85rem;border-bottom:2px solid var(--line);white-space:nowrap}
th.number,td.number{text-align:right}
.scroll{overflow-x:auto;max-width:100%}
.scroll table{width:auto}
.claims tbody th{font-weight:400;width:42%}
.claims td,.claims thead th{text-align:left;white-space:nowrap}
.claims td.words{white-space:normal;overflow-wrap:anywhere;min-width:9.5rem;max-width:15rem}
.id{font:600 .78rem/1 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:var(--quiet);margin-right:.35rem;white-space:nowrap}
.note{display:block;color:var(--quiet);font-size:.87rem;margin-top:.15rem}
.verdict{display:inline-block;padding:.08rem .6rem;border-radius:999px;font-weight:600;font-size:.88rem;white-space:nowrap}
.holds{color:var(--good);background:var(--good-bg)}
.fails{color:var(--bad);background:var(--bad-bg)}
.open{color:var(--open);background:var(--open-bg)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.2rem}
figure{margin:0;max-width:40rem}
img{display:block;max-width:100%;height:auto;margin:0 auto;background:#fff;border:1px solid var(--line);border-radius:8px;padding:6px}
figcaption{color:var(--quiet);font-size:.9rem;margin-top:.35rem}
details{margin:1rem 0;border:1px solid var(--line);border-radius:8px;padding:.5rem .9rem}
summary{cursor:pointer;font-weight:600;padding:.25rem 0}
details td{font:.82rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;padding:.25rem .7rem .25rem 0}
nav{background:var(--panel);border-radius:10px;padding:.3rem 1.1rem .6rem}
nav h2{margin:.7rem 0 .2rem;font-size:1rem}
nav li{margin:.35rem 0}
section+section{border-top:3px solid var(--line);margin-top:3rem;padding-top:.5rem}
@media (max-width:42rem){
.claims thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.claims,.claims tbody{display:block}
.claims tr{display:grid;grid-template-columns:1fr 1fr;gap:.1rem .9rem;border:1px solid var(--line);border-radius:10px;
padding:.8rem .9rem;margin:0 0 .9rem}
.claims tbody th{grid-column:1/-1;width:auto;padding:0 0 .5rem;border:0}
.claims td,.claims td.words{display:block;border:0;padding:.15rem 0;text-align:left;white-space:normal;min-width:0;max-width:none}
.claims td::before{content:attr(data-label);display:block;color:var(--quiet);font-size:.78rem;font-weight:400}
.claims td[data-label="ours"]{font-weight:600}
}
@media print{
:root{--ink:#000;--quiet:#444;--paper:#fff;--line:#bbb;--panel:#fff;--link:#000;--good:#000;--good-bg:#fff;--bad:#000;--bad-bg:#fff;
--open:#444;--open-bg:#fff}
body{font-size:10.5pt}
main{max-width:none;padding:0}
.facts,.verdict{border:1px solid #bbb}
figure,tr,.facts{break-inside:avoid}
h1,h2,h3{break-after:avoid}
.scroll{overflow:visible}
section+section{break-before:page;border:0}
}
""".splitlines()
)
