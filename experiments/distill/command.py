"""The run behind `janax distill`: models, training, evaluation before and after, the saved student and a short report."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from janax.experiments import config as configs
from janax.experiments import decoders, processes, report, text, training
from janax.experiments import session as sessions
from janax.experiments.distill.config import Config, Options
from janax.experiments.distill.corpus import Batches, prepare
from janax.experiments.distill.objective import Objective, Scores, loss_fn, score_rows
from janax.experiments.errors import UserError
from janax.experiments.metrics import read_rows
from janax.experiments.session import Session
from janax.experiments.statistics import Estimate
from janax.jaxlib_ext import sharding
from janax.models import loading, lora

__all__ = ["run"]

_NAME = "distill"


def run(options: Options, console: Console) -> None:
    """Distils, or goes on distilling; the report goes to `console`, progress to standard error."""
    workdir = options.out / "run"
    with sessions.in_terms_of("--out", options.out, workdir):
        if processes.from_main(lambda: _is_done(options, workdir, console)):
            return
        with sessions.open_session(_NAME, options.config, workdir) as session:
            record = _distill(options, session)
    processes.from_main(lambda: _show(record, options, console))


def _is_done(options: Options, workdir: Path, console: Console) -> bool:
    out = options.out
    if out.is_dir() and not (workdir / "config.json").exists():
        if {entry.name for entry in out.iterdir() if not entry.name.startswith(".")} - {"run"}:
            raise UserError(f"--out {out} is not empty and holds no run of janax distill; choose another directory")
        return False
    sessions.check_workdir(_NAME, options.config, workdir)
    if not sessions.is_finished(workdir):
        return False
    _say(console, f"{out} is finished; its report is {out / 'report.md'}; delete the directory or choose another --out to run again")
    return True


def _say(console: Console, message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def _distill(options: Options, session: Session) -> dict[str, Any]:
    config = options.config
    if not config.data.exists():
        raise UserError(
            f'--data {config.data}: no such file; give a .jsonl file of lines with "text", "prompt" and "completion", or "messages"'
        )
    mesh = training.make_mesh(config.mesh)
    teacher, student = _models(config, session, mesh)
    tokenizer = _tokenizer(config, teacher, student, session)
    numerics: dict[str, Any] = {"dtype": config.dtype, "attention": config.attention}
    net = decoders.network(dataclasses.replace(student.config, remat=config.remat, **numerics), student.params, config.lora)
    stop_tokens = sorted({*student.stop_tokens, tokenizer.eos_token_id} - {None})
    objective = Objective(config, net, dataclasses.replace(teacher.config, **numerics), stop_tokens)
    frozen = {"student": student.params, "teacher": teacher.params}
    corpus = prepare(config, session, tokenizer)
    batches = Batches(config, corpus)
    held_out = text.Rows(*(x[: config.held_out_rows] for x in corpus.held_out))
    score = score_rows(objective, held_out, mesh)
    session.say(f"distill: evaluating the student on {len(held_out.tokens)} held-out rows")
    before = _scores(session, "before", lambda: score(_beginning(config, objective, mesh), frozen))

    def evaluate(state: training.TrainState) -> dict[str, float]:
        found = score(training.ema_or_params(state), frozen)
        count = max(float(np.sum(found.count)), 1.0)
        return {"held_out": float(np.sum(found.divergence)) / count, "held_out_nll": float(np.sum(found.nll)) / count}

    timed = training.TimedBatches(batches, config.train.log_every)
    started = time.perf_counter()
    state = training.fit(
        loss_fn(objective),
        lambda key, frozen: net.init(key, frozen["student"]),
        timed,
        decoders.make_optimizer(config.optimizer, config.lora, num_steps=config.train.num_steps, dtype=config.dtype),
        config.train,
        mesh=mesh,
        rules=net.rules,
        session=session,
        name=_NAME,
        evaluate=evaluate,
        frozen=frozen,
    )
    speed = session.memo("speed", lambda: _speed(timed, batches, time.perf_counter() - started))
    trained = training.ema_or_params(state)
    after = _scores(session, "after", lambda: score(trained, frozen))
    session.say(f"distill: saving to {options.out}")
    _save(options, objective, tokenizer, trained, frozen, session, mesh)
    record = _record(config, session, before, after, speed) | {"example": corpus.example}
    if session.is_main:
        configs.write_json(options.out / "report.json", record)
        (options.out / "report.md").write_text(_markdown(record, options), encoding="utf-8")
    return record


# --- models


def _models(config: Config, session: Session, mesh: Any) -> tuple[loading.Model, loading.Model]:
    session.say(f"distill: loading the teacher, {config.teacher}")
    teacher = decoders.load(config.teacher, mesh, f"--teacher {config.teacher}", dtype=config.dtype)
    if config.student == config.teacher:
        student = teacher  # one copy of the weights serves both
    else:
        session.say(f"distill: loading the student, {config.student}")
        student = decoders.load(config.student, mesh, f"--student {config.student}", dtype=config.dtype)
    for role, model in (("teacher", teacher), ("student", student)):
        shape = model.config
        session.say(f"distill: {role}: {shape.depth} layers, width {shape.width}, {_size(model.params):,} parameters")
        if config.sequence_length > shape.max_length:
            raise UserError(
                f"sequence_length must be at most {shape.max_length}, the longest text of the {role}, got {config.sequence_length}"
            )
    return teacher, student


def _size(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _tokenizer(config: Config, teacher: loading.Model, student: loading.Model, session: Session) -> Any:
    """The one that both models share.

    Raises:
      UserError: if they do not share one.
    """
    theirs, own = teacher.tokenizer, student.tokenizer
    if own is None and theirs is None:
        raise UserError(
            f"neither --teacher {config.teacher} nor --student {config.student} has a tokenizer; put its tokenizer.json beside the weights"
        )
    sizes = teacher.config.vocab_size, student.config.vocab_size
    if own is not None and theirs is not None:
        a, b = theirs.get_vocab(), own.get_vocab()
        same, counts = a == b, (len(a), len(b))
    else:
        same, counts = sizes[0] == sizes[1], sizes
        role, other = ("student", "teacher") if own is None else ("teacher", "student")
        if same:
            session.say(f"distill: the {role} has no tokenizer and takes the {other}'s")
    if not same:
        raise UserError(
            f"--teacher {config.teacher} and --student {config.student} have different vocabularies ({counts[0]:,} and {counts[1]:,} tokens), "
            f"so their predictions cannot be compared token by token; choose a student of the teacher's family, or let the teacher write "
            f"completions (janax generate) and train on them (janax run lm --model.weights {config.student} --text.path FILE.jsonl)"
        )
    tokenizer: Any = theirs if own is None else own
    if len(tokenizer) > min(sizes):
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} tokens, but the models' embeddings have {sizes[0]:,} (teacher) and {sizes[1]:,} (student) "
            f"rows; check that tokenizer and weights belong together"
        )
    return tokenizer


def _beginning(config: Config, objective: Objective, mesh: Any) -> Any:
    """The trained tree before the first step, placed as it trains; fresh adapters change nothing, whatever the key."""
    net, key = objective.net, jax.random.key(config.train.seed)
    where = sharding.shardings(jax.eval_shape(net.init, key, net.frozen), net.rules, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(net.init, out_shardings=where)(key, net.frozen)


def _save(options: Options, objective: Objective, tokenizer: Any, trained: Any, frozen: Any, session: Session, mesh: Any) -> None:
    config, net, out = options.config, objective.net, options.out
    if config.lora.rank:
        adapters = sharding.fetch(trained)
        if session.is_main:
            lora.save_peft(out, net.config, adapters, alpha=config.lora.alpha, base=config.student)
            tokenizer.save_pretrained(out)
        if not config.merge:
            return
        out = out / "merged"
        with jax.set_mesh(mesh):
            trained = jax.jit(net.params_of)(trained, frozen["student"])
    params = jax.tree.map(lambda x: x.astype(net.config.dtype), sharding.fetch(trained))
    if session.is_main:
        loading.save_transformer(out, net.config, params)
        tokenizer.save_pretrained(out)
        configs.write_json(out / "generation_config.json", {"eos_token_id": list(objective.stop_tokens)})


# --- numbers


def _scores(session: Session, name: str, compute: Any) -> Scores:
    return Scores(*(np.asarray(x) for x in session.memo(name, lambda: [x.tolist() for x in compute()])))


def _speed(timed: training.TimedBatches, batches: Batches, seconds: float) -> dict[str, Any]:
    """Token positions per second; in a short run with the compiler's work in it."""
    if not batches.given:
        return {"tokens_per_second": None, "with_compiling": False}
    steps = timed.rate()
    rate = batches.given / seconds if steps is None else steps
    return {"tokens_per_second": rate * batches.positions / batches.given, "with_compiling": steps is None}


def _record(config: Config, session: Session, before: Scores, after: Scores, speed: dict[str, Any]) -> dict[str, Any]:
    losses = []
    logged = [row for row in read_rows(session.workdir / "metrics.jsonl") if row.get("loss") is not None]
    for kind, label in ((0, "loss on the data"), (1, "loss on its own samples"), (None, "training loss")):
        of_kind = [row for row in logged if row.get("on_policy") == kind]
        if of_kind:
            first, last = of_kind[0], of_kind[-1]
            losses.append(
                {"label": label, "first_step": first["step"], "first": first["loss"], "last_step": last["step"], "last": last["loss"]}
            )
    estimates = {
        name: {
            "before": _estimate(before.per_token(field)),
            "after": _estimate(after.per_token(field)),
            "change": _estimate(after.per_token(field, before)),
        }
        for name, field in (("divergence", "divergence"), ("cross_entropy", "nll"))
    }
    return {
        "teacher": config.teacher,
        "student": config.student,
        "divergence_kind": config.divergence,
        "rows": len(after.count),
        "tokens": int(np.sum(after.count)),
        "losses": losses,
        **estimates,
        "teacher_cross_entropy": _estimate(after.per_token("teacher_nll")),
        **speed,
        "seconds": round(session.seconds, 1),
    }


def _estimate(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


# --- report


def _title(record: dict[str, Any]) -> str:
    return f"{record['student']} taught by {record['teacher']}"


def _rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table."""

    def shown(estimate: dict[str, float]) -> str:
        return report.format_interval(estimate["value"], (estimate["low"], estimate["high"]) if record["rows"] > 1 else None)

    measured = [
        [label, *(shown(record[name][when]) for when in ("before", "after", "change"))]
        for label, name in ((f"held-out {record['divergence_kind']}", "divergence"), ("held-out cross-entropy", "cross_entropy"))
    ]
    return ["nats per token", "before", "after", "change"], [
        *measured,
        ["the teacher's cross-entropy", shown(record["teacher_cross_entropy"]), "", ""],
        *(_loss_row(**loss) for loss in record["losses"]),
    ]


def _loss_row(label: str, first_step: int, first: float, last_step: int, last: float) -> list[str]:
    if first_step == last_step:
        return [f"{label}, step {last_step}", "", report.format_value(float(last)), ""]
    return [f"{label}, steps {first_step} and {last_step}", *(report.format_value(float(x)) for x in (first, last, last - first))]


def _remarks(record: dict[str, Any], options: Options) -> list[str]:
    """What is said below the table."""
    out, config = options.out, options.config
    model = out / "merged" if config.lora.rank else out
    rate = record["tokens_per_second"]
    compiling = ", the compiler's work included" if record["with_compiling"] else ""
    speed = "" if rate is None else f"{rate:,.0f} tokens a second in training{compiling}; "
    remarks = [
        f"held out: {record['rows']} rows, {record['tokens']:,} tokens that count; intervals: 95 %, bootstrap over rows",
        f"speed: {speed}{record['seconds']:.0f} s in all",
        f"saved: the adapters in {out}" + (f", the student with them in {model}" if config.merge else "")
        if config.lora.rank
        else f"saved: {out}",
        f"report: {out / 'report.md'}; metrics of every step: {out / 'run' / 'metrics.jsonl'}",
    ]
    if config.merge or not config.lora.rank:
        command = (
            ["generate", "--model", str(model), "--prompt", record["example"]] if record["example"] else ["chat", "--model", str(model)]
        )
        remarks.append(f"try: {shlex.join(['janax', *command])}")
    return remarks


def _markdown(record: dict[str, Any], options: Options) -> str:
    columns, rows = _rows(record)
    lines = [f"# {_title(record)}", "", *("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)), ""]
    return "\n".join([*lines, *(f"- {remark}" for remark in _remarks(record, options)), ""])


def _show(record: dict[str, Any], options: Options, console: Console) -> None:
    columns, rows = _rows(record)
    _say(console, _title(record))
    table = Table(header_style="bold")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for remark in _remarks(record, options):
        _say(console, remark)
