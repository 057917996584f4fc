"""What the functions for several processes do in two: each process prints what it saw as one line of JSON."""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from janax.experiments import processes, session, training
from janax.experiments.config import MeshConfig, TrainConfig
from janax.experiments.errors import UserError
from janax.jaxlib_ext import sharding


def raised(fn, *args):
    try:
        fn(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def fail(error):
    raise error


def agreements(me):
    return {
        "anyone": [processes.anyone(me == 1), processes.anyone(False)],
        "agreed": [processes.agreed(me == 0), processes.agreed(me == 1)],
        "from_main": processes.from_main(lambda: {"who": me, "text": "é" * 1000})["who"],
        "user": raised(processes.from_main, lambda: fail(UserError("wrong"))),
        "other": raised(processes.from_main, lambda: fail(KeyError("lost"))),
        "together": raised(processes.together, lambda: fail(UserError("only here")) if me == 1 else None),
        "fine": raised(processes.together, lambda: None),
    }


def placement():
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    whole, split = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("data", "model")))
    tree = {"w": np.arange(32.0).reshape(8, 4), "n": np.float32(3.0), "key": jax.random.key(1)}
    placed = sharding.place(tree, {"w": split, "n": whole, "key": whole})
    moved = sharding.place(placed["w"], whole)
    return {
        "w": sharding.fetch({"w": placed["w"]})["w"].tolist() == tree["w"].tolist() == sharding.fetch(moved).tolist(),
        "split": placed["w"].sharding == split and not placed["w"].is_fully_addressable,
        "n": float(placed["n"]),
        "key": sharding.fetch(jax.random.key_data(placed["key"])).tolist() == jax.random.key_data(tree["key"]).tolist(),
        "rows": sharding.local_rows(mesh, 16).tolist(),
        # `model` spans both processes here, so both hold every row
        "all_rows": len(sharding.local_rows(sharding.make_mesh({"model": 8, "data": 1}), 16)),
    }


def batches():
    # The processes' devices take turns along the batch, as they may on a torus.
    devices = np.asarray(jax.devices()).reshape(2, 4).T.reshape(8, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    config = TrainConfig(num_steps=3, batch_size=16)

    def whole(position):
        return {"x": np.random.default_rng(position).normal(size=(16, 3)), "scale": np.float32(2.0)}

    def share(position, rows=slice(None)):
        batch = whole(position)
        return batch | {"x": batch["x"][sharding.local_rows(mesh, 16)][rows]}

    def loss_fn(params, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return batch["scale"] * jnp.mean((batch["x"] @ params - jnp.sum(noise, 1)) ** 2), {}

    def fit(batch_fn):
        return training.fit(loss_fn, lambda key: jnp.ones(3), batch_fn, optax.sgd(0.1), config, mesh=mesh, example_keys=True)

    return {
        "rows": sharding.local_rows(mesh, 16).tolist(),
        "whole": sharding.fetch(fit(whole).params).tolist(),
        "share": sharding.fetch(fit(share).params).tolist(),
        "wrong": raised(fit, lambda position: share(position, slice(5))),
    }


def votes(me):
    """Process 1 is asked to stop after step 40; where does each of them hear it?"""
    vote, heard, asked = processes.Vote(training.make_mesh(MeshConfig())), [], 0
    for step in range(1, 4001):
        time.sleep(0.002)
        if vote(step, me == 1 and step > 40):
            heard.append(step)
            break
        asked = step
    return {"heard": heard, "steps": asked}


def stops(me, workdir):
    """A request in process 1 stops both between the same two items."""
    done = []

    def work():
        with session.open_session("two", TrainConfig(), workdir, signals=False) as run:
            for item in run.track(range(5), "items"):
                done.append(item)
                if me == 1 and item == 2:
                    run.request_stop()

    return {"error": raised(work), "done": done}


def memos(me, workdir):
    calls = []
    with session.open_session("two", TrainConfig(), workdir, signals=False) as run:
        kept = [
            run.memo("everywhere", lambda: calls.append("everywhere") or (me, 2.5)),
            run.memo("alone", lambda: calls.append("alone") or me, alone=True),
            run.memo("alone", lambda: fail(KeyError("computed twice")), alone=True),
        ]
        path = run.figure_path("picture.png")
        path.write_text(str(me))
        return {"values": kept, "calls": calls, "inside": path.is_relative_to(workdir), "there": path.exists()}


if __name__ == "__main__":
    processes.start(lambda message: None)
    me, workdir = processes.index(), Path(sys.argv[1])
    found = {
        "count": processes.count(),
        "agreements": agreements(me),
        "placement": placement(),
        "batches": batches(),
        "votes": votes(me),
        "stops": stops(me, workdir),
        "memos": memos(me, workdir),
        "together": processes.all_are_here(),
    }
    print("\n" + json.dumps(found), flush=True)
