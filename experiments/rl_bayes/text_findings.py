"""What was found on real text: a small decoder bent towards a reward, and a published one steered."""

from collections.abc import Mapping
from typing import Any

from janax.experiments.page import Page, estimate_text
from janax.experiments.rl_bayes import pictures
from janax.experiments.rl_bayes import text as texts
from janax.experiments.rl_bayes.verdicts import array, compare
from janax.experiments.statistics import mean_interval

__all__ = ["write", "write_steering"]


def write(page: Page, found: Mapping[str, Any]) -> None:
    """The small decoder: whatever tasks are there."""
    config, prior = page.config.text, found["prior"]
    facts = ", ".join(f"{name} log Z {row['facts']['log_z']:.2f}" for name, row in found["tasks"].items())
    page.notes.append(
        f"Text: a decoder of {prior['parameters']:,} parameters on {prior['pieces']:,} pieces of {config.length} characters of docstrings; "
        f"{prior['held_out']:.3f} nats per held-out character; {facts}. All methods draw {config.num_steps} x {config.batch_size} texts."
    )
    if "constraint" in found["tasks"]:
        _constraint(page, found["tasks"]["constraint"]["methods"])
    if "continuous" in found["tasks"]:
        _continuous(page, found["tasks"]["continuous"])
    if "moment" in found["tasks"]:
        _moment(page, found["tasks"]["moment"])
    columns = (
        "method",
        "mean reward",
        "KL(pi || pi0)",
        "KL(p || pi)",
        "entropy",
        "Self-BLEU-5",
        "Distinct-1",
        "Distinct-2",
        "Distinct-3",
        "unique",
        f"pass@{texts.ATTEMPTS}",
    )
    keys = ("reward", "kl_prior", "fkl", "entropy", "self_bleu", "distinct_1", "distinct_2", "distinct_3", "unique", "pass")
    for task, row in found["tasks"].items():
        about, facts = _about(task, config.word), row["facts"]
        table = [
            (name, *(estimate_text(array(values[key])) if key in values else "" for key in keys)) for name, values in row["methods"].items()
        ]
        table.append(("posterior", f"{facts['reward']:.3g}", f"{facts['kl_prior']:.3g}", "0", f"{facts['entropy']:.3g}", *[""] * 6))
        more = [f"KL(p || pi) from texts of the decoder, {facts['effective']:.0f} effective."]
        if "best-of-N" in row["methods"]:
            best, smc = row["methods"]["best-of-N"], row["methods"]["twisted SMC"]
            more.append(f"Best of N = {best['count']}, bound log N - (N-1)/N = {best['bound']:.3g}.")
            more.append(
                f"Twisted SMC: {smc['particles']} particles, twists from {smc['steps']} batches, log Z {estimate_text(smc['log_z'])}."
            )
        if task == "constraint":
            more.append("The posterior of KL-RL and TB is the soft one, pi0 exp(b / beta).")
        page.table(
            f"Text, {about}: {config.num_seeds} seeds, {config.num_eval} texts each",
            columns,
            table,
            "Nats per text; BLEU and distinct by characters. " + " ".join(more),
        )
        shown = [(name, values["texts"][0][i]) for name, values in row["methods"].items() if "texts" in values for i in range(2)]
        page.table(f"Samples, {about}", ("method", "text"), shown, "First seed.")
        page.picture(
            f"text-{task}.png",
            lambda path, row=row, about=about: pictures.text(path, row, f"Reward: {about}"),
            f"{about.capitalize()}: reward of the samples and their divergence from the decoder along the way, mean over seeds.",
        )


def _about(task: str, word: str) -> str:
    return {"constraint": f"contains “{word}”", "continuous": "share of vowels", "moment": f"share that contains “{word}”"}[task]


def _moment(page: Page, found: Mapping[str, Any]) -> None:
    facts, wanted = found["facts"], page.config.text.moment
    page.claim(
        "11a",
        "Text, distributional constraint: the multiplier from samples is logit(mu) - logit(mu0), error",
        paper="0",
        ours=facts["lambda_error"],
        holds=facts["lambda_error"] < 1e-10,
        note=f"lambda {facts['lambda']:.4f}, float64",
    )
    share = (array(found["methods"]["GDC, baseline"]["reward"]) - facts["prior"]) / (wanted - facts["prior"])
    estimate = mean_interval(share)
    page.claim(
        "11b",
        f"Text, distributional constraint: GDC closes at least 69 % of the gap between the decoder's share and the wanted {wanted:g}",
        paper=".69 (female biographies, 7.4 to 36.7 of 50 %), other scale",
        ours=estimate,
        holds=estimate.low >= 0.69,
        undecided=estimate.low < 0.69 <= estimate.high,
        note=f"the decoder {facts['prior']:.3f}, after {estimate_text(found['methods']['GDC, baseline']['reward'])}",
    )


def _constraint(page: Page, rows: Mapping[str, Any]) -> None:
    word = page.config.text.word
    gdc, plain = rows["GDC, baseline"], rows["RL without KL"]
    for number, key, text, high, low, paper in (
        (
            "9a",
            "reward",
            f"RL without a KL satisfies the constraint (“{word}”) most often: its rate minus GDC's",
            plain,
            gdc,
            "1.0 against .61",
        ),
        ("9b", "kl_prior", "and goes furthest from the decoder: KL(pi || pi0) minus GDC's, nats", plain, gdc, "63 against 4.2"),
        ("9c", "fkl", "and misses most of the posterior: KL(p || pi) minus GDC's, nats", plain, gdc, "above 100 against 2.0"),
        ("9d", "self_bleu", "and repeats itself: Self-BLEU-5 minus GDC's", plain, gdc, ".96 against .855"),
        (
            "9e",
            "distinct_2",
            "GDC's texts vary more within: Distinct-2 minus that of RL without a KL",
            gdc,
            plain,
            "Distinct-1 .89 against < .65",
        ),
        (
            "9f",
            "fkl",
            "A baseline helps GDC: KL(p || pi) without minus with, nats",
            rows["GDC"],
            gdc,
            "better and more stable, arXiv:2206.00761",
        ),
    ):
        a, b = array(high[key]), array(low[key])
        note = f"{estimate_text(a)} against {estimate_text(b)}"
        compare(page, number, f"Text: {text}", a, b, paper=paper + (", other scale" if number != "9f" else ""), note=note)
    compare(
        page,
        "9g",
        "Text: with the KL, RL keeps more of the posterior: KL(p || pi) without minus with, nats",
        plain["fkl"],
        rows["KL-RL"]["fkl"],
        paper="6 against above 100 (PPO), other scale",
        note=f"{estimate_text(plain['fkl'])} against {estimate_text(rows['KL-RL']['fkl'])}",
    )
    compare(
        page,
        "9h",
        "Text: GDC covers the posterior better than PPO with a KL: KL(p || pi) of PPO minus GDC's, nats",
        rows[texts.PPO]["fkl"],
        gdc["fkl"],
        paper="about 6 against 2.0, other scale",
        note=f"{estimate_text(rows[texts.PPO]['fkl'])} against {estimate_text(gdc['fkl'])}",
    )
    smc, best = rows["twisted SMC"], rows["best-of-N"]
    compare(
        page,
        "9i",
        f"Text: twisted SMC steers without training the policy: rate of “{word}” minus the decoder's own",
        smc["reward"],
        rows["decoder"]["reward"],
        paper="the posterior's rate is 1",
        note=f"{estimate_text(smc['reward'])} against {estimate_text(rows['decoder']['reward'])}; "
        f"best-of-{best['count']} {estimate_text(best['reward'])}",
    )


def _continuous(page: Page, found: Mapping[str, Any]) -> None:
    rows, facts = found["methods"], found["facts"]
    plain, fitted = rows["RL without KL"], rows["KL-RL"]
    compare(
        page,
        "10a",
        "Text, continuous reward: RL without a KL loses the entropy that KL-RL keeps, nats per text, difference",
        fitted["entropy"],
        plain["entropy"],
        paper="collapse, arXiv:2205.11275",
        note=f"{estimate_text(fitted['entropy'])} against {estimate_text(plain['entropy'])}, posterior {facts['entropy']:.3g}",
    )
    worth = {
        name: array(row["reward"]) - page.config.text.beta * array(row["kl_prior"])
        for name, row in rows.items()
        if name in ("KL-RL", "best-of-N")
    }
    compare(
        page,
        "10b",
        "Text, continuous reward: KL-RL is worth more than best-of-N with as many texts, E[r] - beta KL(pi || pi0), difference",
        worth["KL-RL"],
        worth["best-of-N"],
        paper="not found",
        note=f"{estimate_text(worth['KL-RL'])} against {estimate_text(worth['best-of-N'])}; at most beta log Z = "
        f"{page.config.text.beta * facts['log_z']:.3g}",
    )


# --- a published model


def write_steering(page: Page, found: Mapping[str, Any]) -> None:
    """The published model."""
    config, ways = page.config.steering, found["ways"]
    smc, masking = ways["SMC"], ways["masking"]
    for number, key, text, paper in (
        (
            "12a",
            "log_z",
            "resampling tightens the lower bound on log Z: SMC's minus that of weights alone, nats",
            "base IS -.30, SMC -.17 (S4)",
        ),
        ("12b", "log_prior", "the posterior's texts are likelier under the model than masked ones: log pi0, difference, nats", "not found"),
    ):
        note = f"{estimate_text(array(smc[key]))} against {estimate_text(array(masking[key]))}"
        compare(page, number, f"Without “{config.letter}”: {text}", smc[key], masking[key], paper=paper, note=note)
    keys = ("allowed", "log_prior", "log_z", "ess", "distinct", "resampled")
    columns = ("way", "share allowed", "log pi0 of a text", "log Z", "effective at the end", "distinct texts", "resamplings")
    page.table(
        f"{config.weights} without the letter “{config.letter}”: {len(config.prompts)} prompts, {config.num_particles} particles, "
        f"{config.max_new_tokens} tokens, {config.num_runs} runs",
        columns,
        [
            (name, *(estimate_text(array(row[key])) if name != "decoder" or key != "log_z" else "0" for key in keys))
            for name, row in ways.items()
        ],
        f"{found['forbidden']:,} of {found['vocabulary']:,} tokens are forbidden. Masking is the proposal of both: its figures are those of its "
        "law, without weights; SMC's are weighted. log Z is the mean over prompts of estimates that are lower bounds in expectation.",
    )
    shown = [(name, prompt, text) for name, texts in found["texts"].items() for prompt, text in zip(config.prompts, texts)]
    page.table(
        f"Samples without “{config.letter}”", ("way", "prompt", "text"), shown, "First run, one particle of each prompt by its weight."
    )
