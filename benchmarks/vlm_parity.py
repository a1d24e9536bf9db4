"""PaliGemma and SmolVLM against transformers: the stored numbers of tests/golden and, with torch, new inputs computed here.

    python benchmarks/vlm_parity.py --out results/vlm_parity.json

The small models have random weights and awkward sizes; transformers runs in float64 (tests/golden/make_vlm.py). 'stored' are
the differences from the committed numbers, 'live' those from transformers on other images, prompts and texts. 'controls' are
models that are wrong on purpose. 'sites' are the parameters that each method trains by default at the released sizes.
Exits with 1 if a difference is above its tolerance, a token differs, or a wrong model is not noticed.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import METHODS
from jaxpeft.models import paligemma, smolvlm
from jaxpeft.runtime import host
from jaxpeft.runtime.text import aligned

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
OTHER = 8  # the seed of the new inputs
SEEDS = 30  # of weights that are tried


def differences(kind: str, golden: dict) -> dict:
    """The largest differences from `golden`, transformers' numbers of some inputs."""
    import test_vlm_parity as parity

    model, params, _ = parity.loaded(kind)
    logits, where = golden["logits"], parity.texts(golden)[2]
    value, gradients = parity.loss_and_gradients(kind, golden)
    equal = [np.array_equal(*parity.written_texts(kind, golden, beams)[::2]) for beams in (1, 3)]
    image = parity.image_tokens(model, params, golden["images"])
    return {
        "std of logits": float(logits[where].std()),
        "image tokens": parity.far(image, golden["image_tokens"]),
        "logits": max(
            parity.far(parity.logits_of(model, params, golden, side), logits, where) for side in ("left", "right")
        ),
        "loss / loss": abs(float(value) / float(golden["loss"]) - 1),
        "gradient / largest entry": float(max(parity.gradient_errors(gradients, golden).values())),
        "greedy equal": equal[0],
        "beams of 3 equal": equal[1],
    }


def live(kind: str) -> dict:
    """`differences` on new inputs, and how far transformers is from the stored numbers on theirs."""
    import test_vlm_parity as parity
    from golden import make_vlm as make

    stored = parity.loaded(kind)[2]
    for seed in range(SEEDS):  # make_vlm.py takes the first whose texts tell models apart
        make.SEEDS[kind] = seed
        with make.in_float64():
            theirs = make.build(kind)
            logits = make.scored(theirs, kind, make.inputs(kind), "left")[0].detach().numpy()
        distance = parity.far(logits, stored["logits"], parity.texts(stored)[2])
        if distance <= parity.LOGITS:
            break
    theirs.zero_grad()
    new = make.as_arrays(make.reference(theirs, kind, make.inputs(kind, OTHER)))
    return differences(kind, new) | {"transformers from the stored logits": distance}


def sites() -> dict:
    """Method -> model -> [the towers in which its default trains something, the number of trained parameters]; a method that
    is refused has its message."""
    models = {
        "paligemma": paligemma.PaliGemma.build(paligemma.PaliGemmaConfig()),
        "smolvlm": smolvlm.SmolVLM.build(smolvlm.SmolVLMConfig()),
    }
    found = {}
    for name in METHODS:
        fields = {"leaves": r"decoder/.*norm"} if name == "selective" else {}
        if name == "prompt":
            fields["init_weights"] = "normal"  # there is no vocabulary
        for kind, model in models.items():
            try:
                shapes = jp.adapt.budget.abstract_variables(model, jp.methods.build(name, **fields))
            except (ValueError, TypeError) as error:
                found.setdefault(name, {})[kind] = str(error)
                continue
            on = [leaf for leaf, moves in tree.flatten(jp.trainable(shapes)).items() if moves]
            towers = sorted({leaf.split("/")[1] for leaf in on} - {jp.adapt.sites.SHARED})
            sizes = tree.flatten(shapes)
            found.setdefault(name, {})[kind] = [towers, int(sum(np.prod(sizes[leaf].shape) for leaf in on))]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stored", action="store_true", help="only the stored numbers: no torch")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    import test_vlm_parity as parity

    found = {
        "stored": {kind: differences(kind, parity.loaded(kind)[2]) for kind in parity.KINDS},
        "transformers in float32": {kind: float(parity.loaded(kind)[2]["float32"]) for kind in parity.KINDS},
        "live": {} if args.stored else {kind: live(kind) for kind in parity.KINDS},
        "controls": {},
        "sites": sites(),
    }
    for kind, mistake in parity.MISTAKES:
        found["controls"].setdefault(kind, {})[mistake] = parity.moved(kind, mistake)
    found |= {"machine": host.machine(), "versions": host.versions()}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for part in ("stored", "live", "controls"):
        for kind, one in found[part].items():
            shown = [(key, str(x) if isinstance(x, bool) else f"{x:.1e}") for key, x in one.items()]
            print("\n".join([f"{part}: {kind}", *aligned(shown)]))
    cases = [*found["stored"].values(), *found["live"].values()]
    good = all(one["logits"] <= parity.LOGITS and one["loss / loss"] <= parity.LOSS for one in cases)
    good &= all(one["gradient / largest entry"] <= parity.GRADIENT for one in cases)
    good &= all(one["greedy equal"] and one["beams of 3 equal"] for one in cases)
    good &= all(x > 10 * parity.LOGITS for one in found["controls"].values() for x in one.values())
    good &= all(one["transformers from the stored logits"] <= parity.LOGITS for one in found["live"].values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
