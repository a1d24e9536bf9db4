"""Export a tuned tree as a directory that HF PEFT loads on the transformers model; the package docstring lists the types."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft import tree
from jaxpeft.adapt import sites
from jaxpeft.interchange.hf_out import export_hf
from jaxpeft.interchange.peft_in import CONFIG, PREFIX, WEIGHTS
from jaxpeft.interchange.tuned import frozen_digest, sha, write
from jaxpeft.methods import (
    IA3,
    OFT,
    DoRA,
    Head,
    LayerNorms,
    LoRA,
    Method,
    NewWords,
    PiSSA,
    Prefix,
    Prompt,
    Scoped,
    VeRA,
)
from jaxpeft.models import convert, hf, loading
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime import files
from jaxpeft.tasks import Task
from jaxpeft.tree import Tree


def export_peft(
    model: VisionLanguageModel, variables: Tree, directory: str | Path, *, base: str = "", revision: str = "",
    with_base: bool = False, card: str = "", task: Task | None = None, beams: int = 1,
) -> Path:  # fmt: skip
    """Write a directory that peft.PeftModel.from_pretrained loads on the transformers model.

    Prompt and Prefix, which only BLIP supports, are loaded on its text decoder, everything else on the model. `base` and
    `revision` identify that model, if known. `with_base` also writes the base, as `base/` in the directory: needed if it is
    not a Hugging Face checkpoint yet, and always done if words were added to it, as their rows then belong to the base.
    `card` is the text of README.md; `task` and `beams` are for the base, as in `export_hf`. Raises ValueError, with the
    reason, for methods without a PEFT type, and for a model that transformers does not have.
    """
    hf.of(model)
    with_base |= bool(model.config.new_words)
    model, whole = loading.joined(model, variables["params"])
    variables = variables | {"params": whole}
    folded = sites.fold(variables)
    many = tuple(one for one in sites.methods_of(folded) if not isinstance(one, NewWords))
    heads = [one for one in many if isinstance(one, Head)]
    rest = [one for one in many if one not in heads]
    kinds = {_type_of(one) for one in rest}
    if len(kinds) != 1:
        raise ValueError(f"a PEFT directory holds one type, got {sorted(kinds)}; use save_tuned, which holds them all")
    (kind,) = kinds
    if heads and kind in ("PROMPT_TUNING", "PREFIX_TUNING", "LN_TUNING"):
        raise ValueError(f"a {kind} directory cannot hold a trained head; use save_tuned")
    acting = sites.expand(folded)
    form = hf.of(model)
    config, arrays = _EXPORT[kind](form, acting, folded, rest)
    if heads:
        config["modules_to_save"] = list(form.head.saved_as)
        arrays |= _head_arrays(form, acting)
    everything = {  # fields that are left out have PEFT's default
        "peft_type": kind,
        "task_type": None,
        "base_model_name_or_path": f"{directory}/base" if with_base else base or None,
        "revision": revision or None,
        "inference_mode": True,
        **config,
    }
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
    facts = {"config": sha(everything), "frozen": frozen_digest(variables, many)}
    beside = {"README.md": lambda path: files.write_text(path, card)} if card else {}
    if with_base:
        beside["base"] = lambda path: export_hf(model, {"params": variables["params"]}, path, task=task, beams=beams)
    metadata = {"format": "pt", "jaxpeft": json.dumps(facts)}
    return write(directory, CONFIG, everything, WEIGHTS, arrays, metadata, beside)


def inner_of(method: Method) -> Method:
    """The method inside a `Scoped`, or the method itself."""
    return method.method if isinstance(method, Scoped) else method


_TYPES: dict[type, str] = {  # by exact class: a subclass computes something else
    LoRA: "LORA",
    PiSSA: "LORA",
    DoRA: "LORA",
    IA3: "IA3",
    LayerNorms: "LN_TUNING",
    VeRA: "VERA",
    OFT: "OFT",
    Prompt: "PROMPT_TUNING",
    Prefix: "PREFIX_TUNING",
}


def _type_of(method: Method) -> str:
    inner = inner_of(method)
    kind = _TYPES.get(type(inner))
    virtual = isinstance(inner, Prompt | Prefix)
    if kind is None or (virtual and inner is not method):
        raise ValueError(f"{method.name} has no PEFT type; use save_tuned")
    if virtual and inner.positions != "shift":
        raise ValueError(f"{inner.name}: PEFT counts its tokens as positions; train with positions='shift' to export")
    return kind


def _head_arrays(form: hf.HuggingFace, acting: Tree) -> dict[str, np.ndarray]:
    """The whole head: PEFT copies its modules, which unties the vocabulary matrix."""
    flat, head = tree.flatten(acting["params"]), form.head
    bound = sites.at(acting.get("peft", {}), sites.Site(head.vocabulary, "linear", ()))
    arrays = convert.written(flat, convert.Table(form.rules(head.tensors)))
    arrays[f"{head.linear}.weight"] = bound[0].params["matrix"] if bound else head.matrix(flat)
    if head.bias:
        arrays[f"{head.linear}.bias"] = flat[head.bias]
    return {f"{PREFIX}{name}": np.asarray(x) for name, x in arrays.items()}


def _bounds(form: hf.HuggingFace, acting: Tree, methods: list[Method]) -> dict[str, dict[int, list]]:
    """HF module name -> {part: [(method, parameters of that layer), ...]} of the linear sites of the methods."""
    found = {}
    for site in sites.sites(form.model):
        for bound in sites.at(acting.get("peft", {}), site):
            if bound.method not in methods:
                continue
            if site.path == form.head.vocabulary and isinstance(bound.method, IA3):
                raise ValueError(f"{bound.method.name}: at {site.path} PEFT also scales the bias; use save_tuned")
            place = form.places[site.path]
            if place.convolution:
                raise ValueError(f"{bound.method.name}: {site.path} is a convolution in transformers; use save_tuned")
            params = {name: np.asarray(x) for name, x in bound.params.items()}
            for i, name in enumerate(place.names()):
                mine = {k: x if site.layers is None else x[i] for k, x in params.items()}
                if mine.pop("on", True):
                    found.setdefault(name, {}).setdefault(place.part, []).append((inner_of(bound.method), mine))
    return found


def _kernels(form: hf.HuggingFace, params: Tree, name: str) -> list[np.ndarray]:
    """The base kernels (in, out) of the parts of an HF module."""
    flat, found = tree.flatten(params), {}
    for path, place in form.places.items():
        if name in place.names():
            x = form.head.matrix(flat).T if path == form.head.vocabulary else np.asarray(flat[f"{path}/kernel"])
            found[place.part] = x if place.layers is None else x[place.names().index(name)]
    return [found[part] for part in sorted(found)]


_Written = tuple[dict, dict[str, np.ndarray]]  # fields of the configuration, tensors


def _export_lora(form: hf.HuggingFace, acting: Tree, folded: Tree, methods: list[Method]) -> _Written:
    inner = [inner_of(one) for one in methods]
    dora = {isinstance(one, DoRA) for one in inner}
    if len(dora) > 1:
        raise ValueError("a PEFT directory has DoRA in all modules or in none; use save_tuned")
    (dora,), first = dora, inner[0]
    same = len({(one.scale, one.rank, one.rank_stabilized) for one in inner}) == 1
    stabilized = same and first.rank_stabilized

    def alpha(scale, rank):
        return scale * (rank**0.5 if stabilized else rank)

    scale = first.scale if same else 1.0
    rank = 2 * first.rank if isinstance(first, PiSSA) else first.rank
    config = {
        "r": rank,
        "lora_alpha": alpha(scale, rank),
        "lora_dropout": first.dropout,
        "use_rslora": stabilized,
        "use_dora": dora,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    arrays, bounds = {}, _bounds(form, acting, methods)
    for name, parts in bounds.items():
        kernels = _kernels(form, acting["params"], name)
        sizes = [kernel.shape[1] for kernel in kernels]
        a_rows, b_columns = [], []
        for part, many in sorted(parts.items()):
            for method, params in many:
                pairs = [(params["a"], params["b"])]
                pairs += [(params["a0"], -params["b0"])] if isinstance(method, PiSSA) else []
                for a, b in pairs:
                    a_rows.append(a.T)
                    column = np.zeros((sum(sizes), b.shape[0]), np.float32)
                    start = sum(sizes[:part])
                    column[start : start + sizes[part]] = b.T * (method.scale / scale)
                    b_columns.append(column)
        arrays[f"{PREFIX}{name}.lora_A.weight"] = np.concatenate(a_rows)
        arrays[f"{PREFIX}{name}.lora_B.weight"] = np.concatenate(b_columns, axis=1)
        if dora:
            magnitudes = [np.sqrt(np.square(kernel).sum(0)) for kernel in kernels]
            for part, ((_, params),) in parts.items():
                magnitudes[part] = params["m"]
            arrays[f"{PREFIX}{name}.lora_magnitude_vector"] = np.concatenate(magnitudes)
        mine = sum(len(a) for a in a_rows)
        if mine != rank:
            config["rank_pattern"][re.escape(name)] = mine
            config["alpha_pattern"][re.escape(name)] = alpha(scale, mine)
    return config | {"target_modules": sorted(bounds)}, arrays


def _export_ia3(form: hf.HuggingFace, acting: Tree, folded: Tree, methods: list[Method]) -> _Written:
    arrays, inputs, bounds = {}, [], _bounds(form, acting, methods)
    for name, parts in bounds.items():
        sizes = [kernel.shape[1] for kernel in _kernels(form, acting["params"], name)]
        thetas = {part: many[0][1] for part, many in parts.items()}
        if any(len(many) > 1 for many in parts.values()) or (
            len(sizes) > 1 and any("l_in" in t for t in thetas.values())
        ):
            raise ValueError(f"ia3: PEFT has one vector for {name}; use save_tuned")
        if "l_in" in next(iter(thetas.values())):
            inputs.append(name)
            arrays[f"{PREFIX}{name}.ia3_l"] = thetas[0]["l_in"][None]
        else:
            l_parts = [thetas[part]["l"] if part in thetas else np.ones(size) for part, size in enumerate(sizes)]
            arrays[f"{PREFIX}{name}.ia3_l"] = np.concatenate(l_parts)[:, None]
    return {"target_modules": sorted(bounds), "feedforward_modules": sorted(inputs)}, arrays


def _export_norms(form: hf.HuggingFace, acting: Tree, folded: Tree, methods: list[Method]) -> _Written:
    flat, arrays, targets = tree.flatten(acting["params"]), {}, set()
    norms = {path for path in form.places if f"{path}/scale" in flat}
    trained = {p for p in norms if any(one.trains(f"params/{p}/scale") for one in methods)}
    rules = [rule for rule in form.table.rules if rule.leaves[0].rpartition("/")[0] in trained]
    for name, x in convert.tensors(flat, convert.Table(rules)):
        module, _, last = name.rpartition(".")
        arrays[f"{PREFIX}{module}.ln_tuning_layers.{last}"] = x
        targets.add(module)
    return {"target_modules": sorted(targets)}, arrays


def _export_vera(form: hf.HuggingFace, acting: Tree, folded: Tree, methods: list[Method]) -> _Written:
    method, arrays, bounds = _only(methods), {}, _unfused(form, acting, acting, methods)
    (shared,) = folded["peft"][sites.SHARED].values()
    for name, params in bounds.items():
        arrays |= {f"{PREFIX}{name}.vera_lambda_b": params["l"], f"{PREFIX}{name}.vera_lambda_d": params["d"]}
    arrays |= {f"base_model.vera_{key.upper()}": np.asarray(shared.params[key]).T for key in ("a", "b")}
    return {"r": method.rank, "d_initial": method.d_initial, "target_modules": sorted(bounds)}, arrays


def _export_oft(form: hf.HuggingFace, acting: Tree, folded: Tree, methods: list[Method]) -> _Written:
    method = _only(methods)
    if isinstance(methods[0], Scoped) and methods[0].layers is not None:
        raise ValueError("oft in some layers only is unsupported; use save_tuned")
    bounds = _unfused(form, acting, folded, methods)
    arrays = {f"{PREFIX}{name}.oft_R.weight": params["q"] for name, params in bounds.items()}
    config = {"r": 0, "oft_block_size": method.block, "use_cayley_neumann": False}
    return config | {"target_modules": sorted(bounds)}, arrays


def _only(methods: list[Method]) -> Any:
    """The one method that there may be."""
    if len(methods) != 1:
        raise ValueError(f"a PEFT directory holds one {methods[0].name}, got {len(methods)}; use save_tuned")
    return inner_of(methods[0])


def _unfused(form: hf.HuggingFace, acting: Tree, holding: Tree, methods: list[Method]) -> dict[str, dict]:
    """HF module name -> parameters in `holding` of the one method, which cannot act on a part of a fused matrix."""
    found = {}
    for name, parts in _bounds(form, holding, methods).items():
        if len(_kernels(form, acting["params"], name)) > 1:
            raise ValueError(
                f"{methods[0].name}: {name} is fused in transformers, and only a part of it is adapted; use save_tuned"
            )
        ((_, found[name]),) = parts[0]
    return found


def _decoder_only(
    form: hf.HuggingFace, variables: Tree, methods: list[Method], kind: str
) -> tuple[Any, dict[str, Any]]:
    method, decoder = _only(methods), form.decoder
    if decoder is None:
        kind = type(form.model).__name__
        raise ValueError(f"{method.name}: in {kind} PEFT's virtual tokens act elsewhere than ours; use save_tuned")
    here = [s for s in sites.sites(form.model) if s.kind == kind and method.selects(s)]
    allowed = {"kv": decoder.attention, "embed": decoder.embed}[kind]
    if [s.path for s in here] != [allowed]:
        raise ValueError(
            f"{method.name}: PEFT supports it at {allowed} only, got {', '.join(s.path for s in here)}; use save_tuned"
        )
    (bound,) = sites.at(variables["peft"], here[0])
    return method, bound.params


def _virtual(form: hf.HuggingFace, method: Method) -> dict:
    decoder = form.decoder
    assert decoder is not None  # `_decoder_only` has checked it
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": method.length,
        "token_dim": decoder.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": decoder.heads,
        "num_layers": decoder.layers,
    }


def _export_prompt(form: hf.HuggingFace, acting: Tree, folded: Tree, methods: list[Method]) -> _Written:
    method, params = _decoder_only(form, acting, methods, "embed")
    return _virtual(form, method), {"prompt_embeddings": np.asarray(params["rows"])}


def _export_prefix(form: hf.HuggingFace, acting: Tree, folded: Tree, methods: list[Method]) -> _Written:
    method, params = _decoder_only(form, acting, methods, "kv")
    both_LCKD = np.stack([np.asarray(params[name]).reshape(*params[name].shape[:2], -1) for name in ("k", "v")], axis=1)
    # per token: K, V of layer 0, K, V of layer 1, ...
    rows = both_LCKD.transpose(2, 0, 1, 3).reshape(method.length, -1)
    return _virtual(form, method), {"prompt_embeddings": rows}


_EXPORT: dict[str, Callable] = {
    "LORA": _export_lora,
    "IA3": _export_ia3,
    "LN_TUNING": _export_norms,
    "VERA": _export_vera,
    "OFT": _export_oft,
    "PROMPT_TUNING": _export_prompt,
    "PREFIX_TUNING": _export_prefix,
}
