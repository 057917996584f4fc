"""Makes tests/golden/ehrlich.npz: instances, sequences and values of Ehrlich functions, computed by pytorch-holo.

Run with torch 2.13.0 and pytorch-holo 0.0.5 (pip install --no-deps): python tests/golden/make_ehrlich.py
The two files with the chain and the motif search are loaded by themselves, since the package around them needs botorch. Half of the sequences are
the chain's, half uniform; in most of them a part of every motif's letters has been planted.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).parent / "ehrlich.npz"
SIZES = ((32, 32, 4, 4, 4), (32, 32, 2, 4, 2), (20, 64, 2, 8, 4), (4, 16, 2, 4, 1))  # v, l, c, k, q; q divides k
EPISTASIS = (0.0, 1.5)


def load(name):
    path = importlib.metadata.distribution("pytorch-holo").locate_file(f"holo/test_functions/elemental/{name}.py")
    spec = importlib.util.spec_from_file_location(name, str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    chain, search = load("_discrete_markov_process"), load("_motif")
    arrays = {"versions": f"torch {torch.__version__}, pytorch-holo {importlib.metadata.version('pytorch-holo')}"}
    for i, (v, l, c, k, q) in enumerate(SIZES):
        generator = torch.Generator().manual_seed(i)
        options = {"softmax_temp": 0.5, "generator": generator, "repeats_always_possible": True}
        transition = chain.sample_sparse_ergodic_transition_matrix(v, int(0.4 * v), **options)
        stationary = chain.dmp_stationary_dist(transition)[:, 0]
        motifs = chain.sample_dmp(stationary, transition, c * k, 1, generator).reshape(c, k)
        shares = torch.rand(c, k - 1, generator=generator)
        spacings = 1 + ((l - c * k) // c * shares / shares.sum(1, keepdim=True)).floor().long()
        tokens = torch.cat([chain.sample_dmp(stationary, transition, l, 60, generator), torch.randint(v, (60, l), generator=generator)])
        for row in tokens[::2]:
            for motif, gaps in zip(motifs, spacings):
                places = torch.cat([torch.zeros(1, dtype=torch.long), gaps.cumsum(0)])
                places = places + torch.randint(l - int(places[-1]), (1,), generator=generator)
                kept = torch.rand(k, generator=generator) < 0.7
                row[places[kept]] = motif[kept]
        searched = [search.motif_search(solution=tokens, motif=m, spacing=s, quantization=q) for m, s in zip(motifs, spacings)]
        quality = torch.stack(searched)
        feasible = chain.dmp_sample_log_likelihood(tokens, torch.ones(v) / v, transition) > -torch.inf
        arrays |= {f"{i}_transition": transition, f"{i}_stationary": stationary, f"{i}_quality": quality.T, f"{i}_quantization": q}
        arrays |= {
            f"{i}_{name}": x.numpy().astype(np.uint8) for name, x in (("motifs", motifs), ("spacings", spacings), ("tokens", tokens))
        }
        for e in EPISTASIS:  # the response of its Ehrlich class, which has no name outside it
            value = ((e * quality * (quality - 1) + 1) * quality).prod(0)
            arrays[f"{i}_value_{e}"] = torch.where(feasible, value, -torch.inf)
    np.savez_compressed(FILE, **{name: np.asarray(x) for name, x in arrays.items()})


if __name__ == "__main__":
    main()
