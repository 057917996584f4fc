"""The run behind `janax design`: read, fit, design forwards and backwards, refine, choose, write."""

import csv
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from janax.algorithms import bib
from janax.experiments import plots, processes, report
from janax.experiments import session as sessions
from janax.experiments.bib import tasks
from janax.experiments.bib.pictures import logos
from janax.experiments.design import proxy as proxies
from janax.experiments.design.config import Config, Options
from janax.experiments.design.proxy import Chosen
from janax.experiments.design.table import Table, read
from janax.experiments.session import Session

__all__ = ["run"]

_NAME = "design"
_CHUNK = 32  # designs at a time
_NEIGHBOURS = 32  # substitutions scored exactly per round of refinement
_ROUNDS = 8
_LEVEL = 0.95


def run(options: Options, console: Console) -> None:
    """Designs, or goes on designing; what was found goes to `console`, progress to standard error."""
    with sessions.in_terms_of("--out", options.out, options.out):
        sessions.check_workdir(_NAME, options.config, options.out)
        if sessions.is_finished(options.out):
            _say(
                console,
                f"{options.out} is finished: {options.out / 'designs.csv'}; delete the directory or choose another --out to run again",
            )
            return
        table = read(options.config)  # before a directory is made
        with sessions.open_session(_NAME, options.config, options.out) as session:
            results = _design(options.config, table, session, options.out)
            report.save_results(options.out, results)

    def show() -> None:
        report.write_report(options.out)
        report.show(results, console)
        for table_ in results.tables:
            _say(console, f"\n{table_.title}")
            for row in table_.rows[:10]:
                _say(console, "  " + "   ".join(str(cell) for cell in row))
        for note in results.notes:
            _say(console, f"- {note}")
        _say(console, f"designs: {options.out / 'designs.csv'}; report: {options.out / 'report.html'}")

    processes.from_main(show)


def _say(console: Console, message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def _design(config: Config, table: Table, session: Session, out: Path) -> report.Results:
    session.say(f"design: {len(table.scores)} sequences of {config.data}")
    chosen = proxies.choose(table, config, session)
    with jax.enable_x64(True):
        proxy = jax.jit(bib.fit_proxy)(chosen.phi, table.scores, rel_ridge=chosen.rel_ridge)
        heads = jax.jit(bib.fit_heads)(jax.random.key(config.seed), chosen.phi, table.scores, rel_ridge=chosen.rel_ridge)
        pool, lengths = _visited(config, table, chosen, proxy, heads, session)
    pool, lengths, distance = _allowed(config, table, pool, lengths)
    with jax.enable_x64(True):
        judged = _judge(config, table, chosen, proxy, pool, lengths)
        order = _choose(config, judged["rank"], pool)
    rows = [
        {
            "rank": i + 1,
            "sequence": sequence,
            **{name: float(judged[name][k]) for name in ("predicted", "low", "high")},
            "distance": int(distance[k]),
            "unusual": bool(judged["unusual"][k]),
        }
        for i, (k, sequence) in enumerate(zip(order, table.texts(pool[order], lengths[order])))
    ]
    if session.is_main:
        _write(out / "designs.csv", rows)
    return _results(config, table, chosen, rows, pool[order], lengths[order], session)


def _visited(
    config: Config, table: Table, chosen: Chosen, proxy: bib.Proxy, heads: bib.Heads, session: Session
) -> tuple[np.ndarray, np.ndarray]:
    """[n l] and [n]: all sequences on the way of as many designs as are wanted (32 at least), after refinement, with copies."""
    v = len(table.letters)
    starts = np.argsort(-table.scores, kind="stable")[: max(config.num, 32)]

    def one(params: Any, key: jax.Array, start: jax.Array, length: jax.Array) -> jax.Array:
        inside = jnp.arange(len(start)) < length
        letters = jnp.where(inside, start, 0)
        objectives = bib.Objectives(
            functools.partial(bib.forward_loss, proxy),
            functools.partial(bib.backward_loss, proxy),
            functools.partial(bib.head_value, heads, reduce="lcb"),
        )

        def features(z: jax.Array) -> jax.Array:
            return chosen.features.apply(params, bib.relax_tokens(z), length)

        def cautious(x: jax.Array) -> jax.Array:
            phi = chosen.features.apply(params, x.astype(jnp.float32), length)
            return bib.lower_confidence_bound(proxy, phi, num_deviations=config.caution)

        z = bib.init_logits(key, letters, num_letters=v).astype(jnp.float32)
        path = bib.design(z, features, objectives, num_steps=config.steps, eta_rule="frozen").path
        late = path[-8:]
        best = late[jnp.argmax(jax.vmap(lambda t: cautious(jax.nn.one_hot(t, v)))(late))]
        search = functools.partial(bib.refine, score_fn=cautious, num_letters=v, num_rounds=_ROUNDS, num_candidates=_NEIGHBOURS)
        near = [search(key, tokens=tokens).path for tokens in (best, letters)]
        return jnp.concatenate([path, *near])

    compiled = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0)))
    keys = jax.random.split(jax.random.key(config.seed + 1), len(starts))
    found = []
    for first in session.track(range(0, len(starts), _CHUNK), "designs"):
        rows = np.resize(starts[first : first + _CHUNK], _CHUNK)  # the last chunk is filled up with copies
        part = compiled(
            chosen.features.params, keys[np.arange(first, first + _CHUNK) % len(starts)], table.tokens[rows], table.lengths[rows]
        )
        found.append((np.asarray(part), table.lengths[rows]))
    pool = np.concatenate([part.reshape(-1, part.shape[-1]) for part, _ in found])
    lengths = np.concatenate([np.repeat(length, part.shape[1]) for part, length in found])
    return pool, lengths


def _allowed(config: Config, table: Table, pool: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct sequences that were not measured and are near enough, with their distance; filled up by mutants of the best if too few."""
    v = len(table.letters)
    rng = np.random.default_rng(config.seed)
    for _ in range(20):
        pool = np.where(np.arange(pool.shape[1])[None] < lengths[:, None], pool, v)
        pool, first = np.unique(pool, axis=0, return_index=True)
        lengths = lengths[first]
        distance = tasks.nearest(pool, table.tokens)
        fine = (distance > 0) & (distance <= (config.max_mutations or pool.shape[1]))
        if fine.sum() >= 4 * config.num or not len(pool):
            break
        # Mutants, by one letter, of what there is.
        rows = rng.integers(0, len(pool), 8 * config.num)
        places = (rng.random(len(rows)) * lengths[rows]).astype(int)
        more = pool[rows]
        more[np.arange(len(rows)), places] = rng.integers(0, v, len(rows))
        pool, lengths = np.concatenate([pool, more]), np.concatenate([lengths, lengths[rows]])
    return pool[fine], lengths[fine], distance[fine]


def _judge(config: Config, table: Table, chosen: Chosen, proxy: bib.Proxy, pool: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Predictions in the user's units with intervals, and what to rank by.

    The interval is the quantile of the leave-one-out errors, each divided by its own s sqrt(1 + phi^T (Phi^T Phi + lambda)^-1 phi), times that of the
    design: wider where features are unusual.
    """
    phi = proxies.compute(chosen.features, pool, lengths, len(table.letters))
    mean, std = float(proxy.scale.mean), float(proxy.scale.std)
    predicted = np.asarray(bib.predict(proxy, phi)) * std + mean
    spread = np.asarray(bib.uncertainty(proxy, phi)) * std
    noise = float(np.sqrt(proxy.variance)) * std
    own = np.asarray(bib.uncertainty(proxy, chosen.phi)) * std
    scaled = np.abs(chosen.residuals) / np.sqrt(noise**2 + own**2)
    half = np.quantile(scaled, _LEVEL) * np.sqrt(noise**2 + spread**2)
    sign = -1.0 if config.minimize else 1.0
    ends = np.sort(sign * np.stack([predicted - half, predicted + half]), axis=0)
    return {
        "predicted": sign * predicted,
        "low": ends[0],
        "high": ends[1],
        "rank": predicted - config.caution * spread,
        "unusual": spread > own.max(),
    }


def _choose(config: Config, rank: np.ndarray, pool: np.ndarray) -> np.ndarray:
    count = min(config.num, len(pool))
    best = np.argsort(-rank, kind="stable")[: max(4000, count)]
    picked = jax.jit(functools.partial(bib.select_diverse, num_designs=count, min_distance=config.min_distance))(rank[best], pool[best])
    return best[np.asarray(picked.index)[np.asarray(picked.valid)]]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        names = list(rows[0]) if rows else ["rank", "sequence", "predicted", "low", "high", "distance", "unusual"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})


def _shown(row: dict[str, Any]) -> tuple[Any, ...]:
    interval = f"{row['low']:.4g} to {row['high']:.4g}"
    return row["rank"], row["sequence"], f"{row['predicted']:.4g}", interval, row["distance"], "yes" if row["unusual"] else ""


def _results(
    config: Config, table: Table, chosen: Chosen, rows: list[dict[str, Any]], designs: np.ndarray, lengths: np.ndarray, session: Session
) -> report.Results:
    sign = -1.0 if config.minimize else 1.0
    best = max(chosen.trials, key=lambda trial: trial.r2)
    measured = float(sign * table.scores.max())
    unusual = sum(row["unusual"] for row in rows)
    median = float(np.median([row["predicted"] for row in rows])) if rows else float("nan")
    trust = "well" if best.spearman > 0.8 else "roughly" if best.spearman > 0.5 else "poorly"
    notes = [
        *table.notes,
        f"Leave-one-out says that the fit ranks sequences like these {trust}: Spearman {best.spearman:.3f}, R2 {best.r2:.3f}. It says nothing of "
        "sequences unlike these.",
        f"Median prediction of the designs {median:.4g}; best measured score {measured:.4g}. Predictions beyond what was measured are extrapolation.",
        f"{unusual} of {len(rows)} designs are unusual: their features are further from the data than any measured sequence's.",
    ]
    if best.spearman < 0.3:
        notes.insert(0, "The fit does not predict scores it has not seen: take these designs for little better than random variants.")
    if len(rows) < config.num:
        notes.append(f"Only {len(rows)} designs of the {config.num} keep the limits: raise --max-mutations or lower --min-distance.")
    figures = []
    path = session.figure_path("fit.png")
    predictions = sign * (table.scores - chosen.residuals)
    figure, grid = plots.axes(width=4.6, height=4.2)
    grid[0, 0].scatter(predictions, sign * table.scores, s=9, alpha=0.5, linewidth=0, color=plots.COLORS[0], label="measured")
    for row in rows:
        grid[0, 0].plot([row["predicted"]], [measured], marker="|", color=plots.COLORS[1], markersize=9)
    grid[0, 0].set(xlabel="leave-one-out prediction", ylabel="score", title="Measured scores; ticks: designs' predictions")
    plots.save(figure, path)
    figures.append(report.Figure(path="figures/fit.png", caption="Leave-one-out predictions, and where the designs are predicted to be."))
    if rows and len(set(lengths.tolist())) == 1 and designs.shape[1] <= 60:
        logo = session.figure_path("logo.png")
        top = table.tokens[np.argsort(-table.scores, kind="stable")[: len(rows)]]
        logos(logo, {"best measured": top, "designs": designs}, table.letters)
        figures.append(report.Figure(path="figures/logo.png", caption="Sequence logos: information by place, in bits."))
    tables = [
        report.Table(
            title="Leave-one-out, by features",
            columns=("features", "numbers", "ridge", "R2", "Spearman"),
            rows=[(t.name, t.width, f"{t.rel_ridge:g}", f"{t.r2:.3f}", f"{t.spearman:.3f}") for t in chosen.trials],
            caption=f"Taken: {best.name}.",
        ),
        report.Table(
            title="The first designs (all are in designs.csv)",
            columns=("rank", "sequence", "predicted", "95 %, if like the data", "letters from the nearest measured", "unusual"),
            rows=[
                (
                    r["rank"],
                    r["sequence"],
                    f"{r['predicted']:.4g}",
                    f"{r['low']:.4g} to {r['high']:.4g}",
                    r["distance"],
                    "yes" if r["unusual"] else "",
                )
                for r in rows[:20]
            ],
            caption="Intervals by leave-one-out errors of the measured sequences, wider where features are unusual.",
        ),
    ]
    return report.Results(
        title="Designs",
        intro=f"{len(table.scores)} measured sequences of {config.data.name}; {len(rows)} designs, all different, none measured, "
        f"{'lower' if config.minimize else 'higher'} is better.",
        figures=figures,
        tables=tables,
        notes=notes,
    )
