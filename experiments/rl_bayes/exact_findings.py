"""What was found on enumerable strings, beside what theory and earlier measurements say."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from janax.experiments.page import Page, estimate_text
from janax.experiments.rl_bayes import pictures
from janax.experiments.rl_bayes.verdicts import array, below, compare
from janax.experiments.statistics import mean_interval

__all__ = ["write"]

_RL, _KL_RL, _FKL, _JS, _TV, _HELL2 = "RL without KL", "KL-RL", "f-DPG, KL", "f-DPG, JS", "f-DPG, TV", "f-DPG, Hellinger"
# [M]: measured for this library's specification before, with another recurrent prior over 15,625 strings and one world.
_COLLAPSE = {
    _RL: ".001 / 1.07",
    _KL_RL: "5.91 / 369",
    _FKL: "5.96 / 379",
    _JS: "5.93 / 374",
}
_NARROW = {
    _KL_RL: "6.14; -2.591; .609; .706; .420; .1377",
    _TV: "6.37; -2.589; .645; .679; .398; .1369",
    _JS: "6.40; -2.666; .608; .597; .406; .1291",
    _HELL2: "6.40; -2.670; .608; .595; .408; .1294",
    _FKL: "6.62; -2.768; .660; .573; .420; .1323",
    "posterior": "5.94; -2.338",
}
_SAMPLED = {
    "KL": "KL(p || pi) .084",
    "KL, baseline": "KL(p || pi) .047",
    "RKL": "KL(pi || p) .090",
    "RKL, baseline": "KL(pi || p) .052",
    "JS, baseline": "KL(pi || p) .043",
    "VarGrad": "as RKL, baseline, to all printed digits",
    "TB": "KL(pi || p) .066",
}
_BOUNDS = {
    "base, weights only": "4: -.79/+.82; 16: -.30/+.29; 64: -.110/+.104",
    "base, resampling": "4: -.50/+.52; 16: -.17/+.12; 64: -.040/+.037",
    "twist, weights only": "4: -.042/+.046; 16: -.017/+.009; 64: -.002/+.003",
    "twist, resampling": "4: -.098/+.108; 16: -.048/+.026",
}


def write(page: Page, found: Mapping[str, Any]) -> None:
    """Writes whatever parts are there."""
    for name, part in (
        ("statements", _statements),
        ("collapse", _collapse),
        ("tradeoff", _tradeoff),
        ("sampled", _sampled),
        ("sandwich", _sandwich),
        ("frontier", _frontier),
        ("coverage", _coverage),
    ):
        if name in found:
            part(page, found[name])


def _statements(page: Page, found: Mapping[str, float]) -> None:
    texts = {
        "elbo": "J(pi) / beta + KL(pi || p*) = log Z for every policy",
        "gradient": "the gradient of J is -beta times that of KL(pi || p*)",
        "score": "REINFORCE with r + beta (log pi0 - log pi) held constant has that gradient",
        "vargrad": "so has half the variance of log pi - log pi0 - r / beta (log-variance, VarGrad)",
        "slope": "d log Z / d (1 / beta) = E_p*[r]",
        "constraint": "for a hard constraint KL(p || pi0) = -log Z",
        "twists": "drawing token by token with the optimal twists is drawing from p*",
    }
    for i, (name, text) in enumerate(texts.items()):
        title = f"Exactly, {text}: largest error, float64, 10 random policies"
        page.claim(f"1{'abcdefg'[i]}", title, paper="0", ours=found[name], holds=found[name] < 1e-10)


def _collapse(page: Page, found: Mapping[str, Any]) -> None:
    rows, truth = found["objectives"], found["truth"]
    target = array(truth["posterior"]["entropy"])
    text = "RL without a KL ends as a point: entropy of the policy, nats"
    below(
        page,
        "2a",
        text,
        rows[_RL]["entropy"],
        0.05,
        paper=".001 [M]",
        note=f"prior {estimate_text(truth['prior'])}, posterior {estimate_text(target)}",
    )
    compare(
        page,
        "2b",
        "KL-regularised RL keeps its variety: distinct strings in 1000 draws, minus those without a KL",
        rows[_KL_RL]["distinct"],
        rows[_RL]["distinct"],
        paper="369 and 1.07 [M]",
        note=f"{estimate_text(rows[_KL_RL]['distinct'])} against {estimate_text(rows[_RL]['distinct'])}",
    )
    gaps = np.abs(array(rows[_KL_RL]["entropy"]) - target)
    below(page, "2c", "KL-regularised RL ends at the posterior's entropy: |H(pi) - H(p*)|, nats", gaps, 0.1, paper=".03 [M]")
    ends = {name: array(row["rkl"]) for name, row in rows.items() if name != _RL}
    worst = max(ends, key=lambda name: ends[name].mean())
    text = "Whatever the divergence, a policy that can be the posterior ends there: KL(pi || p*) of the worst of five, nats"
    below(page, "2d", text, ends[worst], 0.05, paper="below .05 for all five [M]", note=f"worst: {worst}")
    columns = ("objective", "entropy", "E[r]", "KL(pi || p)", "KL(p || pi)", "largest probability", "distinct of 1000", "[M] H / distinct")
    keys = ("entropy", "reward", "rkl", "fkl", "most", "distinct")
    table = [(name, *(estimate_text(array(row[key])) for key in keys), _COLLAPSE.get(name, "")) for name, row in rows.items()]
    posterior = truth["posterior"]
    table.append(("posterior", *(estimate_text(posterior[key]) for key in keys[:-1]), "", "5.94"))
    page.table(
        f"Exact gradients, policies that start from the prior, {len(target)} worlds", columns, table, "Mean ± 95 % interval over worlds."
    )
    page.picture(
        "collapse.png", lambda path: pictures.collapse(path, found), "Entropy of the policy over exact gradient steps, mean over worlds."
    )


def _tradeoff(page: Page, found: Mapping[str, Any]) -> None:
    config = page.config.exact
    middle = config.betas.index(config.beta)
    rows = {name: {key: array(values)[middle] for key, values in row.items()} for name, row in found["objectives"].items()}
    order = "same order as arXiv:2302.08215 (its numbers: not found)"
    for number, key, text, high, low in (
        ("3a", "entropy", "entropy of JS minus that of reverse KL (KL-RL)", _JS, _KL_RL),
        ("3b", "entropy", "entropy of forward KL minus that of JS", _FKL, _JS),
        ("3c", "reward", "reward of reverse KL (KL-RL) minus that of JS", _KL_RL, _JS),
        ("3d", "reward", "reward of JS minus that of forward KL", _JS, _FKL),
    ):
        compare(page, number, f"Policies too small for the posterior: {text}", rows[high][key], rows[low][key], paper=order)
    for number, name, key, text in (("3e", _FKL, "fkl", "KL(p || pi)"), ("3f", _TV, "tv", "TV"), ("3g", _JS, "jsd", "JSD")):
        rivals = [other for other in rows if other != name]
        best = min(rivals, key=lambda other: rows[other][key].mean())
        title = f"Each divergence is best at itself: {text} of the best other ({best}) minus that of {name}"
        compare(page, number, title, rows[best][key], rows[name][key], paper="each wins its own [M]")
    best = min(rows, key=lambda name: rows[name]["rkl"].mean())
    gaps = rows[_KL_RL]["rkl"] - rows[best]["rkl"]
    if best == _KL_RL:
        page.claim(
            "3h", "KL-RL has the lowest KL(pi || p)", paper="within .01 of the best [M]", ours=mean_interval(rows[best]["rkl"]), holds=True
        )
    else:
        below(page, "3h", f"KL-RL is within .01 nats of the best on KL(pi || p) ({best})", gaps, 0.01, paper="within .01 [M]")
    keys = ("rkl", "fkl", "tv", "jsd", "hell2")
    last = [key for key in keys if max(rows, key=lambda name, key=key: rows[name][key].mean()) == _JS]
    page.claim(
        "3i",
        "JS is worst on none of five divergences",
        paper="never worst [M]",
        ours=f"worst on {len(last)}",
        seeds=config.num_worlds,
        holds=not last,
    )
    columns = ("objective", "entropy", "E[r]", "KL(pi || p)", "KL(p || pi)", "TV", "JSD", "[M] H; E r; KL; KL; TV; JSD")
    keys = ("entropy", "reward", "rkl", "fkl", "tv", "jsd")
    table = [(name, *(estimate_text(row[key]) for key in keys), _NARROW.get(name, "")) for name, row in rows.items()]
    posterior = {key: array(values)[middle] for key, values in found["posterior"].items()}
    table.append(("posterior", *(estimate_text(posterior[key]) for key in keys[:2]), "", "", "", "", _NARROW["posterior"]))
    page.table(f"Recurrent policies of width {config.narrow}, beta {config.beta:g}, {config.num_worlds} worlds", columns, table)
    page.picture(
        "tradeoff.png",
        lambda path: pictures.tradeoff(path, {**found, "betas": list(config.betas)}),
        f"Policies of width {config.narrow} by divergence and weight of the KL, beside the exact posterior; means over worlds.",
    )
    curves = found["qrs"]
    prior, tuned = array(curves["prior"]), array(curves["tuned"])
    matters = np.flatnonzero(prior.mean(axis=0) > 0.02)  # with few accepted, both are exact
    closest = int(matters[np.argmin((prior - tuned).mean(axis=0)[matters])]) if len(matters) else 0
    compare(
        page,
        "4",
        f"Quasi-rejection: the tuned proposal is nearer the posterior than the prior at every acceptance rate; TV at {curves['rates'][closest]:g}, "
        "where the difference is least while the prior's is above .02",
        prior[:, closest],
        tuned[:, closest],
        paper="not found",
        note="rates from " + f"{min(curves['rates']):g} to {max(curves['rates']):g}; the tuned proposal is the small JS policy",
    )
    page.picture("qrs.png", lambda path: pictures.qrs(path, curves), "Quasi-rejection sampling: what accepting more costs, exactly.")


def _sampled(page: Page, found: Mapping[str, Any]) -> None:
    rows = {name: {key: array(values) for key, values in row.items()} for name, row in found.items()}
    for number, name, key, text in (("5a", "KL", "fkl", "KL(p || pi)"), ("5b", "RKL", "rkl", "KL(pi || p)")):
        share = rows[f"{name}, baseline"][key] / rows[name][key]
        title = f"A leave-one-out baseline takes at least 30 % off the residual {text} of {name}: with it over without"
        below(page, number, title, share, 0.7, paper={"5a": ".56 [M]", "5b": ".58 [M]"}[number])
    gap = np.abs(rows["VarGrad"]["rkl"] - rows["RKL, baseline"]["rkl"]) / rows["RKL, baseline"]["rkl"]
    text = "VarGrad is reverse KL with a leave-one-out baseline: relative difference of the residuals"
    below(page, "5c", text, gap, 0.01, paper="0 to all printed digits [M]")
    error = np.abs(rows["KL, baseline"]["log_z_error"])
    below(page, "5d", "The running estimate of log Z ends within .01 of the truth, nats", error, 0.01, paper=".0003 [M]")
    columns = ("objective", "KL(pi || p)", "KL(p || pi)", "log Z estimate minus log Z", "[M]")
    keys = ("rkl", "fkl", "log_z_error")
    config = page.config.exact
    page.table(
        f"From samples: {config.sampled_steps} steps of {config.batch_size}, {config.sampled_seeds} seeds, residuals computed exactly",
        columns,
        [(name, *(estimate_text(row[key]) for key in keys), _SAMPLED.get(name, "")) for name, row in rows.items()],
        "The log Z of TB is learned; that of the others is the running mean of P / pi. VarGrad, RKL and baselines need none.",
    )


def _sandwich(page: Page, found: Mapping[str, Any]) -> None:
    cases = found["cases"]
    for number, proposal, text in (
        ("6a", "base", "Resampling tightens the bounds of the prior as proposal: least gain in the gap over particles, nats"),
        ("6b", "twist", "Resampling does not help the twist-induced proposal: greatest gain in the gap over particles, nats"),
    ):
        plain, moved = cases[f"{proposal}, weights only"], cases[f"{proposal}, resampling"]
        gains = {count: plain[count]["gap"] - moved[count]["gap"] for count in plain}
        pick = min if proposal == "base" else max
        count = pick(gains, key=lambda one: gains[one])
        parts = [row[count][f"{side}_error"] for row in (plain, moved) for side in ("lower", "upper")]
        error = 1.96 * math.sqrt(sum(x * x for x in parts))
        gain = gains[count]
        page.claim(
            number,
            text,
            paper={
                "base": ".25 at 16 particles [M]; figure 3 of arXiv:2404.17546",
                "twist": "-.05 at 16 [M]; figure 3 of arXiv:2404.17546",
            }[proposal],
            ours=gain,
            holds=gain > error if proposal == "base" else gain < error,
            undecided=proposal == "base" and abs(gain) <= error,
            note=f"at {count} particles, 95 % interval ± {error:.3g}, {page.config.exact.num_runs} runs",
        )
    worst = max((abs(row["ratio"] - 1) / row["ratio_error"], name, count) for name, case in cases.items() for count, row in case.items())
    page.claim(
        "6c",
        "The estimate of Z is unbiased for every proposal, with and without resampling: furthest mean of Z_hat / Z from 1, standard errors",
        paper="within 5 % [M]",
        ours=worst[0],
        holds=worst[0] < 4,
        note=f"{worst[1]}, {worst[2]} particles, mean {cases[worst[1]][worst[2]]['ratio']:.3f}",
    )
    inside = all(
        row["lower"] <= 3 * row["lower_error"] and row["upper"] >= -3 * row["upper_error"]
        for case in cases.values()
        for row in case.values()
    )
    page.claim("6d", "The bounds hold log Z between them in every case, within 3 standard errors", paper="Prop. 5.1", ours="", holds=inside)
    counts = list(next(iter(cases.values())))
    table = []
    for name, case in cases.items():
        low, high = found[f"{name.split(',')[0]} exact"]
        table.append(
            (
                name,
                f"{low:.3f} / +{high:.3f}",
                *(f"{case[c]['lower']:.3f} / {case[c]['upper']:+.3f}" for c in counts),
                _BOUNDS.get(name, ""),
            )
        )
    columns = ("proposal", "1 particle, exact", *(f"{count} particles" for count in counts), "[M]")
    page.table(
        f"Bounds minus log Z, nats; twists off by normal(0, {page.config.exact.noise:g}), {page.config.exact.num_runs} runs", columns, table
    )
    page.picture("sandwich.png", lambda path: pictures.sandwich(path, found), "log Z from both sides, with two standard errors.")


def _frontier(page: Page, found: Mapping[str, Any]) -> None:
    gains = array(found["tilt"]) - array(found["reward"])
    page.claim(
        "7a",
        "At equal KL from the prior no policy earns more than the posterior: least gain over best-of-N, all N and worlds",
        paper="at least 0, by theory",
        ours=float(gains.min()),
        seeds=len(gains),
        holds=gains.min() >= -1e-9,
        note=f"largest {gains.max():.3g}; rewards of best-of-N from {array(found['reward']).min():.3g} to {array(found['reward']).max():.3g}",
    )
    over = array(found["bound"])[:, -1] - array(found["binary"])[:, -1]
    estimate = mean_interval(over)
    page.claim(
        "7b",
        f"For a binary reward log N - (N-1)/N is not the KL of best-of-{found['best_of'][-1]}: by how much it is too large, nats",
        paper="never report it as the KL [M]",
        ours=estimate,
        holds=estimate.low > 0.1,
        undecided=estimate.low <= 0.1 < estimate.high,
        note=f"the KL is at most log 1/Z = {estimate_text(-np.log(array(found['success'])))}",
    )
    columns = ("N", "KL(best-of-N || prior)", "log N - (N-1)/N", "E[r], best-of-N", "E[r], posterior at that KL", "KL, binary reward")
    keys = ("kl", "bound", "reward", "tilt", "binary")
    table = [(count, *(estimate_text(array(found[key])[:, i]) for key in keys)) for i, count in enumerate(found["best_of"])]
    page.table(f"Best-of-N beside the posterior, exactly, {len(gains)} worlds", columns, table)
    page.picture(
        "frontier.png", lambda path: pictures.frontier(path, found), "First world: reward at equal KL, and the bound beside the KL."
    )


def _coverage(page: Page, found: Mapping[str, Any]) -> None:
    passes = {name: array(rows) for name, rows in found["passes"].items()}
    attempts, config = found["attempts"], page.config.exact
    order = "alpha-DPG's order, other scale"
    for i, other in enumerate(("f-DPG, KL", "f-DPG, alpha 1/4", "f-DPG, JS")):
        first, last = passes[_RL][:, 0] - passes[other][:, 0], passes[other][:, -1] - passes[_RL][:, -1]
        for number, text, difference in (
            (f"13{'ace'[i]}", f"RL without KL is right at the first attempt more often than {other}: pass@1, difference", first),
            (f"13{'bdf'[i]}", f"{other} solves more problems in {attempts[-1]} attempts: pass@{attempts[-1]} minus that of RL", last),
        ):
            estimate = mean_interval(difference)
            page.claim(number, text, paper=order, ours=estimate, holds=estimate.low > 0, undecided=estimate.low <= 0 <= estimate.high)
    page.table(
        f"pass@k, exactly: {config.num_problems} problems for one policy, {len(passes[_RL])} worlds",
        ("objective", *(f"pass@{k}" for k in attempts), "hardest problem, first world"),
        [
            (name, *(estimate_text(rows[:, i]) for i in range(len(attempts))), f"{min(found['rates'][name]):.2g}")
            for name, rows in passes.items()
        ],
        f"Exact gradients, {config.coverage_steps} steps; the KL-RL policy has beta = {config.coverage_beta:g}. The prior is right at the first "
        "attempt in one of 2 to one of 1,000.",
    )
    page.picture("coverage.png", lambda path: pictures.coverage(path, found), "pass@k over k, mean over worlds.")
