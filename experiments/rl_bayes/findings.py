"""What was found, beside the literature: claims with verdicts, tables and pictures. No number is made here, only compared."""

from collections.abc import Mapping
from typing import Any

from janax.experiments import report
from janax.experiments.page import Page, estimate_text
from janax.experiments.rl_bayes import exact_findings, text_findings
from janax.experiments.rl_bayes.config import Config
from janax.experiments.rl_bayes.verdicts import compare
from janax.experiments.session import Session

__all__ = ["results"]

# Figure read by eye, arXiv:2012.11635, GPT-2 small, averages over pointwise tasks after 28-30 thousand steps.
_GDC = (
    ("E[phi]", "1.0", ".88", ".72", ".61"),
    ("KL(pi || pi0)", "63", "15", "5", "4.2"),
    ("KL(p || pi)", "> 100", "about 30", "about 6", "2.0"),
    ("Self-BLEU-5, characters", ".96", ".975", ".875", ".855"),
    ("Distinct-1", "< .65", ".87", ".88", ".89"),
)
# arXiv:2404.17546, tables 2 and 3: KL(q || p) / KL(p || q), five seeds.
_TWISTED = (
    ("CTL", "1.11 ± .05 / 1.07 ± .02", ".55 ± .03 / .47 ± .01"),
    ("RL (soft-Q)", "1.52 ± .09 / 1.42 ± .03", ".94 ± .04 / .81 ± .02"),
    ("SIXO", "1.71 ± .06 / 1.98 ± .04", ".73 ± .03 / .59 ± .02"),
    ("FUDGE", "3.24 ± .26 / 2.00 ± .13", "1.01 ± .07 / .77 ± .07"),
)


def results(config: Config, found: Mapping[str, Any], session: Session) -> report.Results:
    """The report of a run: whatever studies are in `found`."""
    page = Page("rl-bayes", config, session)
    for name, write in (
        ("exact", exact_findings.write),
        ("twists", _twists),
        ("text", text_findings.write),
        ("steering", text_findings.write_steering),
    ):
        if name in found:
            write(page, found[name])
    page.table(
        "Published, other scale: word constraints on GPT-2 small (GDC)",
        ("at 28-30 thousand steps", "REINFORCE", "REINFORCE with P(x)", "Ziegler (PPO with a KL)", "GDC"),
        _GDC,
        "Averages over pointwise tasks, read by eye from the figure of arXiv:2012.11635. Only their order can be compared with ours.",
    )
    page.table(
        "Published, other scale: twists of language models, KL(q || p) / KL(p || q), nats",
        ("loss", "toxicity, TinyStories-33M, 20 tokens", "sentiment, GPT2-medium, 10 tokens"),
        _TWISTED,
        "arXiv:2404.17546, tables 2 and 3.",
    )
    return page.results(
        title="RL with KL penalties as Bayesian inference",
        intro=(
            "E[r] - beta KL(pi || pi0) = beta (log Z - KL(pi || p*)): KL-regularised RL fits a policy to the posterior p* = pi0 exp(r / beta) / Z "
            "(arXiv:2205.11275, which has derivations and no experiments). Whatever samples from the same p* can be compared: RL with and without "
            "the KL, f-DPG for other divergences, trajectory balance, best-of-N, twisted SMC.\n\n"
            "[M] marks what was measured for this library's specification before, on another prior and reward; numbers of others stand in tables "
            "of their own, marked as of another scale. On enumerable strings everything but the training from samples is exact; a seed is another "
            "prior with another reward. A comparison holds where the 95 % interval of the paired difference over seeds lies on its side of zero, "
            "and is undecided where the interval contains zero."
        ),
    )


def _twists(page: Page, found: Mapping[str, Any]) -> None:
    rows = found["losses"]
    for number, other in (("8a", "soft-Q"), ("8b", "SIXO"), ("8c", "FUDGE")):
        compare(
            page,
            number,
            f"Contrastive twists cover the posterior best: KL(p || q) of {other} minus that of CTL, nats",
            rows[other]["fkl"],
            rows["CTL"]["fkl"],
            paper={"8a": "+.34", "8b": "+.12", "8c": "+.30"}[number] + " (sentiment, other scale)",
            note=f"{estimate_text(rows[other]['fkl'])} against {estimate_text(rows['CTL']['fkl'])}",
        )
    everything = {**rows, "no twists: the prior": found["prior"]}
    table = [(name, estimate_text(row["rkl"]), estimate_text(row["fkl"])) for name, row in everything.items()]
    config = page.config.twists
    page.table(
        f"Learned twists of width {config.width}, {config.num_steps} steps of {config.batch_size} samples, {config.num_seeds} seeds, exactly",
        ("loss", "KL(q || p)", "KL(p || q)"),
        table,
        "q is the twist-induced proposal without weights. CTL and soft-Q draw from q, FUDGE from the prior, SIXO half and half. "
        "CTL and SIXO do not depend on the level of log psi; soft-Q and FUDGE begin at log psi = 0 and -log 2 and have to learn it.",
    )
