"""Tuned trees in and out: Hugging Face PEFT directories, and our own for what PEFT has no type for.

    export_peft(model, variables, methods, directory)     what peft.PeftModel.from_pretrained loads on transformers' BLIP
    import_peft(model, params, directory)                 -> (variables, methods)
    save_tuned(model, variables, methods, directory)      any method: tuned.safetensors and manifest.json
    load_tuned(model, params, directory)                  -> (variables, methods)

PEFT checks little: a missing key is a warning, an extra one and a wrong alpha are silent. Here everything is checked:
names and shapes both ways, the digest of the frozen base, and a digest of the configuration that is kept in the
metadata of the weights file. Files from PEFT itself carry no digests; their names and shapes are checked.

What has a PEFT type: LoRA, rsLoRA, LoRA+ and PiSSA (as LORA), DoRA, IA3, LayerNorms, VeRA, OFT on the full model (load
with task_type None, which is what is written), a tuned head beside the first three (modules_to_save: cls), and Prompt
and Prefix with positions='shift' on model.text_decoder. The ViT's query, key and value are one matrix there: LoRA and
DoRA become one update with block-placed B, IA3 one vector; VeRA and OFT cannot act on a part of it and are refused.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxpeft import methods as registry
from jaxpeft import results, sites, tree
from jaxpeft.methods import (
    IA3,
    OFT,
    DoRA,
    Gated,
    Head,
    LayerNorms,
    LoRA,
    Method,
    PiSSA,
    Prefix,
    Prompt,
    Scoped,
    VeRA,
)
from jaxpeft.models import blip_port
from jaxpeft.tree import Tree

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MANIFEST, TUNED = "manifest.json", "tuned.safetensors"
HEAD = "text_decoder.cls.predictions."
HEAD_KEYS = {  # under HEAD -> our leaf, transposed?
    "transform.dense.weight": ("head/dense/kernel", True),
    "transform.dense.bias": ("head/dense/bias", False),
    "transform.LayerNorm.weight": ("head/norm/scale", False),
    "transform.LayerNorm.bias": ("head/norm/bias", False),
    "bias": ("head/bias", False),
}
Methods = Method | Iterable[Method]


# ------------------------------------------------------------------------------------------------ methods as JSON


def to_json(method: Method) -> dict:
    """A method as JSON: its name and fields; 'scoped' and 'gated' hold the method inside."""
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    if isinstance(method, Scoped | Gated):
        fields["method"] = to_json(method.method)
    return {"name": type(method).__name__} | fields


def from_json(value: dict) -> Method:
    """The inverse of `to_json`. Raises ValueError for an unknown name or field."""
    known = {one.__name__: one for one in vars(registry).values() if isinstance(one, type) and issubclass(one, Method)}
    fields = dict(value)
    cls = known.get(fields.pop("name", None))
    if cls is None:
        raise ValueError(f"unknown method {value.get('name')!r} in a manifest; known: {', '.join(sorted(known))}")
    unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} in a manifest has unknown fields {sorted(unknown)}")
    if isinstance(fields.get("method"), dict):
        fields["method"] = from_json(fields["method"])
    return cls(**fields)


def frozen_digest(variables: Tree, methods: Methods) -> str:
    """The digest of the base leaves that the methods leave alone: what a tuned tree must be put on again."""
    many = sites.as_methods(methods)
    flat = tree.flatten(variables["params"])
    return tree.digest({n: x for n, x in flat.items() if not any(one.trains(f"params/{n}") for one in many)})


def _sha(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ our own format


def save_tuned(model, variables: Tree, methods: Methods, directory) -> Path:
    """Write what tuning made: own leaves (a prefix's MLP folded into its prefix) and trained base leaves, float32.

    Refuses to write into a directory that holds something else.
    """
    variables, many = sites.fold(variables), tuple(one.folded() for one in sites.as_methods(methods))
    mask = tree.flatten(sites.trainable(many, variables))
    flat = {name: x for name, x in tree.flatten(variables).items() if mask[name] or name.startswith("peft/")}
    arrays = {name: np.ascontiguousarray(jax.device_get(x), np.float32) for name, x in flat.items()}
    manifest = {
        "format": "jaxpeft tuned tree, 1",
        "methods": [to_json(one) for one in many],
        "frozen_digest": frozen_digest(variables, many),
        "targets": [
            {"path": s.path, "kind": s.kind, "shape": s.shape, "layers": s.layers, "method": one.name}
            for one in many
            for s in sites.sites(model)
            if one.selects(s)
        ],
        "leaves": {name: tree.digest({"": x}) for name, x in arrays.items()},
        "versions": results.versions(),
    }
    metadata = {"jaxpeft": _sha([manifest[key] for key in ("methods", "frozen_digest", "leaves")])}
    return _write(directory, MANIFEST, manifest, TUNED, arrays, metadata)


def load_tuned(model, params: Tree, directory) -> tuple[Tree, tuple[Method, ...]]:
    """(variables, methods) of what `save_tuned` wrote, on the base it was tuned on; bit for bit what was saved.

    Raises ValueError when the base is another one, when a leaf is missing, extra, misshaped or damaged, and when the
    manifest is not the one that was written.
    """
    directory = Path(directory)
    manifest, arrays, metadata = _read(directory, MANIFEST, TUNED)
    said = _sha([manifest.get(key) for key in ("methods", "frozen_digest", "leaves")])
    if metadata.get("jaxpeft") != said:
        raise ValueError(
            f"{directory / MANIFEST} was changed after it was written ({TUNED} knows another one); restore it"
        )
    many = tuple(from_json(one) for one in manifest["methods"])
    variables = jax.eval_shape(lambda: sites.attach(model, params, many, jax.random.key(0)))
    mask = tree.flatten(sites.trainable(many, variables))
    flat = {name: x for name, x in tree.flatten(variables).items() if mask[name] or name.startswith("peft/")}
    tree.check_same(flat, arrays, str(directory / TUNED))
    bad = [name for name, x in arrays.items() if tree.digest({"": x}) != manifest["leaves"].get(name)]
    if bad:
        raise ValueError(f"{directory / TUNED}: {len(bad)} leaves are not what was saved: {', '.join(bad[:5])}")
    base = {f"params/{name}": x for name, x in tree.flatten(params).items()}
    variables = tree.unflatten(variables, base | {name: jnp.asarray(x) for name, x in arrays.items()})
    _check_base(variables, many, manifest["frozen_digest"], directory)
    return variables, many


def _check_base(variables, methods, digest, directory) -> None:
    here = frozen_digest(variables, methods)
    if digest != here:
        raise ValueError(f"{directory} was tuned on another base: its frozen part has digest {digest}, this one {here}")


def _write(directory, config_name, config, weights_name, arrays, metadata) -> Path:
    directory = Path(directory)
    if directory.exists() and {p.name for p in directory.iterdir()} - {config_name, weights_name}:
        raise ValueError(f"{directory} holds other files; choose a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{weights_name}"
    save_file(arrays, temporary, metadata)
    temporary.rename(directory / weights_name)
    results.write_text(directory / config_name, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return directory


def _read(directory: Path, config_name: str, weights_name: str):
    for name in (config_name, weights_name):
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing")
    try:
        config = json.loads((directory / config_name).read_text())
        with safetensors.safe_open(directory / weights_name, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no iterator
            metadata = file.metadata() or {}
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{directory}: {config_name} or {weights_name} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{directory / config_name} is not a JSON object")
    return config, arrays, metadata


# ------------------------------------------------------------------------------------------------ names over there


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one of our linears or norms is in transformers' model: module name ('{}' for the layer), part of a fusion."""

    module: str
    part: int
    parts: int
    layers: int | None

    def names(self) -> list[str]:
        return [self.module] if self.layers is None else [self.module.format(i) for i in range(self.layers)]


def places(config) -> dict[str, Place]:
    """Our module path -> Place, for every module with a weight."""
    found = {}
    for row in blip_port.table(config):
        if row.reference.endswith(".weight") and not row.leaves[0].endswith(("embed/word", "embed/position")):
            for part, leaf in enumerate(row.leaves):
                path = leaf.rsplit("/", 1)[0]
                found[path] = Place(row.reference.removesuffix(".weight"), part, len(row.leaves), row.layers or None)
    return found


def _inner(method: Method) -> Method:
    return method.method if isinstance(method, Scoped) else method


# ------------------------------------------------------------------------------------------------ export


def export_peft(model, variables: Tree, methods: Methods, directory) -> Path:
    """Write a directory that peft.PeftModel.from_pretrained loads on transformers' BLIP (see the head of this file).

    Prompt and Prefix are loaded on `model.text_decoder`, everything else on the model. Raises ValueError, with the
    reason, for what has no PEFT type.
    """
    many = tuple(one.folded() for one in sites.as_methods(methods))
    folded = sites.fold(variables)
    heads = [one for one in many if isinstance(one, Head)]
    rest = [one for one in many if one not in heads]
    kinds = {_type_of(one) for one in rest}
    if len(kinds) != 1:
        raise ValueError(f"one PEFT directory holds one type; these are {sorted(kinds)}: save_tuned holds them all")
    (kind,) = kinds
    if heads and kind in ("PROMPT_TUNING", "PREFIX_TUNING", "LN_TUNING"):
        raise ValueError(f"a {kind} directory cannot hold a tuned head; use save_tuned")
    acting = sites.expand(folded)
    config, arrays = _EXPORT[kind](model, acting, folded, rest)
    if heads:
        config["modules_to_save"] = ["cls"]
        arrays |= _head_arrays(acting)
    everything = {
        "peft_type": kind,
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": None,
        **config,
    }
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
    facts = {"config": _sha(everything), "frozen": frozen_digest(variables, many)}
    return _write(directory, CONFIG, everything, WEIGHTS, arrays, {"format": "pt", "jaxpeft": json.dumps(facts)})


_TYPES: dict[type, str] = {  # by the class itself: a subclass computes something else
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
    inner = _inner(method)
    kind = _TYPES.get(type(inner))
    virtual = isinstance(inner, Prompt | Prefix)
    if kind is None or (virtual and inner is not method):
        raise ValueError(f"{method.name} has no PEFT type; save_tuned keeps it exactly")
    if virtual and inner.positions != "shift":
        raise ValueError(f"{inner.name}: PEFT counts its tokens as positions; tune with positions='shift' to export")
    return kind


def _head_arrays(acting) -> dict:
    """The head whole: PEFT wraps the module `cls`, whose copy of the vocabulary matrix is then its own."""
    flat = tree.flatten(acting["params"]["text_decoder"])
    bound = sites.at(acting.get("peft", {}), sites.Site("text_decoder/head/vocabulary", "linear", ()))
    matrix = bound[0].theta["matrix"] if bound else flat["embed/word"]
    arrays = {key: flat[leaf].T if turn else flat[leaf] for key, (leaf, turn) in HEAD_KEYS.items()}
    arrays |= {"decoder.weight": matrix, "decoder.bias": flat["head/bias"]}
    return {PREFIX + HEAD + key: np.asarray(x) for key, x in arrays.items()}


def _bounds(model, acting, methods) -> dict[str, dict[int, list]]:
    """HF module name -> {part: [(method, leaves of that layer), ...]} of the linear sites that the methods bind."""
    where, found = places(model.config), {}
    for site in sites.sites(model):
        for bound in sites.at(acting.get("peft", {}), site):
            if bound.method not in methods:
                continue
            if site.path not in where:
                raise ValueError(f"{bound.method.name}: {site.path} is tied and has no module of its own over there")
            place = where[site.path]
            if place.parts == 1 and place.module.endswith("patch_embedding"):
                raise ValueError(f"{bound.method.name}: {site.path} is a convolution over there; use save_tuned")
            theta = {name: np.asarray(x) for name, x in bound.theta.items()}
            for i, name in enumerate(place.names()):
                mine = {k: x if site.layers is None else x[i] for k, x in theta.items()}
                if mine.pop("on", True):
                    found.setdefault(name, {}).setdefault(place.part, []).append((_inner(bound.method), mine))
    return found


def _whole(model, params, name, leaf) -> list[np.ndarray]:
    """The base's kernel (in, out) or bias of every part of an HF module."""
    flat, found = tree.flatten(params), {}
    for path, place in places(model.config).items():
        if name in place.names():
            x = np.asarray(flat[f"{path}/{leaf}"])
            found[place.part] = x if place.layers is None else x[place.names().index(name)]
    return [found[part] for part in sorted(found)]


def _export_lora(model, acting, folded, methods):
    inner = [_inner(one) for one in methods]
    dora = {isinstance(one, DoRA) for one in inner}
    if len(dora) > 1:
        raise ValueError("one PEFT directory is DoRA in all modules or in none; use save_tuned")
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
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    arrays, targets = {}, []
    for name, parts in _bounds(model, acting, methods).items():
        kernels = _whole(model, acting["params"], name, "kernel")
        sizes = [kernel.shape[1] for kernel in kernels]
        a_rows, b_columns = [], []
        for part, many in sorted(parts.items()):
            for method, theta in many:
                pairs = [(theta["a"], theta["b"])]
                pairs += [(theta["a0"], -theta["b0"])] if isinstance(method, PiSSA) else []
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
            for part, ((_, theta),) in parts.items():
                magnitudes[part] = theta["m"]
            arrays[f"{PREFIX}{name}.lora_magnitude_vector"] = np.concatenate(magnitudes)
        mine = sum(len(a) for a in a_rows)
        if mine != rank:
            config["rank_pattern"][re.escape(name)] = mine
            config["alpha_pattern"][re.escape(name)] = alpha(scale, mine)
        targets.append(name)
    return config | {"target_modules": sorted(targets)}, arrays


def _export_ia3(model, acting, folded, methods):
    arrays, targets, inputs = {}, [], []
    for name, parts in _bounds(model, acting, methods).items():
        sizes = [kernel.shape[1] for kernel in _whole(model, acting["params"], name, "kernel")]
        thetas = {part: many[0][1] for part, many in parts.items()}
        if any(len(many) > 1 for many in parts.values()) or (
            len(sizes) > 1 and any("l_in" in t for t in thetas.values())
        ):
            raise ValueError(f"ia3: {name} takes one vector over there; use save_tuned")
        if "l_in" in next(iter(thetas.values())):
            inputs.append(name)
            arrays[f"{PREFIX}{name}.ia3_l"] = thetas[0]["l_in"][None]
        else:
            l_parts = [thetas[part]["l"] if part in thetas else np.ones(size) for part, size in enumerate(sizes)]
            arrays[f"{PREFIX}{name}.ia3_l"] = np.concatenate(l_parts)[:, None]
        targets.append(name)
    config = {"target_modules": sorted(targets), "feedforward_modules": sorted(inputs)}
    return config | {"fan_in_fan_out": False, "init_ia3_weights": True}, arrays


def _export_norms(model, acting, folded, methods):
    flat, arrays, targets = tree.flatten(acting["params"]), {}, []
    for path, place in places(model.config).items():
        if f"{path}/scale" in flat and any(one.trains(f"params/{path}/scale") for one in methods):
            for i, name in enumerate(place.names()):
                for ours, theirs in (("scale", "weight"), ("bias", "bias")):
                    x = np.asarray(flat[f"{path}/{ours}"])
                    arrays[f"{PREFIX}{name}.ln_tuning_layers.{theirs}"] = x if place.layers is None else x[i]
                targets.append(name)
    return {"target_modules": sorted(targets)}, arrays


def _export_vera(model, acting, folded, methods):
    (method,) = _only(methods)
    arrays, targets = {}, []
    (shared,) = folded["peft"][sites.SHARED].values()
    for name, parts in _bounds(model, acting, methods).items():
        if len(_whole(model, acting["params"], name, "kernel")) > 1:
            raise ValueError(f"vera: {name} is a fused matrix over there and ours acts on a part of it; use save_tuned")
        theta = parts[0][0][1]
        arrays |= {f"{PREFIX}{name}.vera_lambda_b": theta["l"], f"{PREFIX}{name}.vera_lambda_d": theta["d"]}
        targets.append(name)
    arrays |= {f"base_model.vera_{key.upper()}": np.asarray(shared.theta[key]).T for key in ("a", "b")}
    config = {"r": method.rank, "d_initial": method.d_initial, "projection_prng_key": 0, "save_projection": True}
    return config | {
        "vera_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(targets),
    }, arrays


def _export_oft(model, acting, folded, methods):
    (method,) = _only(methods)
    if isinstance(methods[0], Scoped) and methods[0].layers is not None:
        raise ValueError("oft in some layers only: use save_tuned")
    arrays, targets = {}, []
    for name, parts in _bounds(model, folded, methods).items():
        if len(_whole(model, acting["params"], name, "kernel")) > 1:
            raise ValueError(
                f"oft: {name} is a fused matrix over there and ours turns the input of a part; use save_tuned"
            )
        arrays[f"{PREFIX}{name}.oft_R.weight"] = parts[0][0][1]["q"]
        targets.append(name)
    config = {"r": 0, "oft_block_size": method.block, "coft": False, "eps": 6e-5, "block_share": False, "bias": "none"}
    config |= {
        "module_dropout": 0.0,
        "use_cayley_neumann": False,
        "num_cayley_neumann_terms": 5,
        "fan_in_fan_out": False,
    }
    return config | {"init_weights": True, "target_modules": sorted(targets)}, arrays


def _only(methods):
    if len(methods) != 1:
        raise ValueError(f"one PEFT directory holds one {methods[0].name}; use save_tuned")
    return [_inner(methods[0])]


def _decoder_only(model, variables, methods, kind) -> list:
    (method,) = _only(methods)
    here = [s for s in sites.sites(model) if s.kind == kind and method.selects(s)]
    allowed = {"kv": "text_decoder/blocks/self_attention", "embed": "text_decoder"}[kind]
    if [s.path for s in here] != [allowed]:
        raise ValueError(
            f"{method.name}: PEFT has it at {allowed} only, not at {', '.join(s.path for s in here)}; use save_tuned"
        )
    (bound,) = sites.at(variables["peft"], here[0])
    return [method, bound.theta]


def _virtual(model, method) -> dict:
    c = model.config
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": method.length,
        "token_dim": c.text_width,
        "num_transformer_submodules": 1,
        "num_attention_heads": c.text_heads,
        "num_layers": c.text_layers,
    }


def _export_prompt(model, acting, folded, methods):
    method, theta = _decoder_only(model, acting, methods, "embed")
    init = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    return _virtual(model, method) | init, {"prompt_embeddings": np.asarray(theta["rows"])}


def _export_prefix(model, acting, folded, methods):
    method, theta = _decoder_only(model, acting, methods, "kv")
    both_LCKD = np.stack([np.asarray(theta[name]).reshape(*theta[name].shape[:2], -1) for name in ("k", "v")], axis=1)
    rows = both_LCKD.transpose(2, 0, 1, 3).reshape(
        method.length, -1
    )  # per token: K, V of layer 0, K, V of layer 1, ...
    return _virtual(model, method) | {"prefix_projection": False, "encoder_hidden_size": None}, {
        "prompt_embeddings": rows
    }


_EXPORT: dict[str, Callable] = {
    "LORA": _export_lora,
    "IA3": _export_ia3,
    "LN_TUNING": _export_norms,
    "VERA": _export_vera,
    "OFT": _export_oft,
    "PROMPT_TUNING": _export_prompt,
    "PREFIX_TUNING": _export_prefix,
}


# ------------------------------------------------------------------------------------------------ import


def import_peft(model, params: Tree, directory) -> tuple[Tree, tuple[Method, ...]]:
    """(variables, methods) of a PEFT directory for transformers' BLIP, on our params of the same base.

    Reads LORA (with rslora, dora, rank and alpha patterns, modules_to_save cls), IA3, LN_TUNING, VERA, OFT (exact Cayley
    transform), PROMPT_TUNING and PREFIX_TUNING of the text decoder. Raises ValueError for anything that it would have to
    leave out: other types, unread or missing tensors, shapes, a base or an alpha that the file was not written with.
    """
    directory = Path(directory)
    config, arrays, metadata = _read(directory, CONFIG, WEIGHTS)
    kind = config.get("peft_type")
    if kind not in _IMPORT:
        raise ValueError(f"{directory / CONFIG}: peft_type {kind!r} is not read; known: {', '.join(_IMPORT)}")
    facts = json.loads(metadata.get("jaxpeft", "{}"))
    if facts and facts["config"] != _sha(config):
        raise ValueError(
            f"{directory / CONFIG} was changed after it was written ({WEIGHTS} knows another one); restore it"
        )
    arrays = {name.replace(".default.", "."): np.asarray(x, np.float32) for name, x in arrays.items()}
    reader = _Reader(model, arrays, str(directory / WEIGHTS))
    head, params = _take_head(reader, config, params)
    many, own, params = _IMPORT[kind](reader, config, params)
    reader.close()
    many = (*many, *head)
    variables = sites.attach(model, params, many, jax.random.key(0))
    if reader.matrix is not None:
        own["peft/text_decoder/head/vocabulary/@linear/0/head/matrix"] = reader.matrix
    flat = tree.flatten(variables)
    tree.check_same({n: x for n, x in flat.items() if n.startswith("peft/")}, own, str(directory / WEIGHTS))
    variables = tree.unflatten(variables, dict(flat) | {name: jnp.asarray(x, jnp.float32) for name, x in own.items()})
    if facts:
        _check_base(variables, many, facts["frozen"], directory)
    return variables, many


class _Reader:
    """Tensors of a file, each taken once, by HF module."""

    def __init__(self, model, arrays, source):
        self.model, self.source, self.left = model, source, dict(arrays)
        self.matrix = None  # an untied vocabulary matrix, if there is one
        self.where = places(model.config)
        self.by_module: dict[str, list] = {}
        for path, place in self.where.items():
            for i, name in enumerate(place.names()):
                self.by_module.setdefault(name, []).append((path, i, place))

    def modules(self, suffix) -> list[str]:
        """Modules that have a tensor with this suffix; raises where BLIP has no such module."""
        end = f".{suffix}"
        found = [
            k.removeprefix(PREFIX).removesuffix(end) for k in self.left if k.startswith(PREFIX) and k.endswith(end)
        ]
        unknown = [name for name in found if name not in self.by_module]
        if unknown or not found:
            what = f"modules that this model does not have: {', '.join(unknown[:10])}" if unknown else f"no {suffix}"
            raise ValueError(f"{self.source}: {what}")
        return found

    def take(self, name) -> np.ndarray:
        """A tensor by its full name."""
        if name not in self.left:
            raise ValueError(f"{self.source}: {name} is missing")
        return self.left.pop(name)

    def parts(self, name, leaf) -> list[tuple[str, int, tuple[int, ...]]]:
        """(our path, layer, shape of its kernel) of every part of a module, in order."""
        shapes = {s.path: s.shape for s in sites.sites(self.model) if s.kind == leaf}
        parts = sorted(self.by_module[name], key=lambda one: one[2].part)
        return [(path, i, shapes[path]) for path, i, _ in parts]

    def close(self):
        if self.left:
            raise ValueError(
                f"{self.source}: {len(self.left)} tensors are not read: {', '.join(sorted(self.left)[:10])}"
            )


def _take_head(reader, config, params):
    """(methods, params) of modules_to_save: the head, which PEFT unties."""
    saved = config.get("modules_to_save") or []
    if not saved:
        return (), params
    if list(saved) != ["cls"]:
        raise ValueError(f"{reader.source}: modules_to_save {saved} is not read; only ['cls'], the head, is")
    flat = dict(tree.flatten(params))
    for key, (leaf, turn) in HEAD_KEYS.items():
        x = reader.take(PREFIX + HEAD + key)
        flat[f"text_decoder/{leaf}"] = jnp.asarray(x.T if turn else x)
    matrix = reader.take(PREFIX + HEAD + "decoder.weight")
    if not np.array_equal(reader.take(PREFIX + HEAD + "decoder.bias"), np.asarray(flat["text_decoder/head/bias"])):
        raise ValueError(f"{reader.source}: the head has two different vocabulary biases")
    params = tree.unflatten(params, flat, reader.source)
    if np.array_equal(matrix, np.asarray(flat["text_decoder/embed/word"])):
        return (Head(),), params
    reader.matrix = matrix
    return (Head(matrix="untied"),), params


def _group(found: dict[str, dict[int, dict]], make, fill, model):
    """Methods and leaves from {our path: {layer: leaves}}: one method per (arguments of `make`, set of layers)."""
    groups: dict = {}
    for path, layers in found.items():
        fields = tuple(sorted(next(iter(layers.values()))["fields"].items()))
        groups.setdefault((fields, tuple(sorted(layers))), []).append(path)
    many, own = [], {}
    depth = {s.path: s.layers for s in sites.sites(model)}
    for (fields, layers), paths in groups.items():
        method = make(where=rf"^({'|'.join(map(re.escape, paths))})$", **dict(fields))
        some = depth[paths[0]] is not None and len(layers) < depth[paths[0]]
        many.append(Scoped(method=method, layers=layers) if some else method)
        for path in paths:
            for name in fill:
                stack = [found[path][i][name] for i in layers if name in found[path][i]]
                if stack:
                    leaf = f"peft/{path}/@linear/0/{method.name}/{name}"  # the only method on its site
                    own[leaf] = np.stack(stack) if depth[path] is not None else stack[0]
    return tuple(many), own


def _import_lora(reader, config, params):
    for key in ("use_qalora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters"):
        if config.get(key):
            raise ValueError(f"{reader.source}: {key} is not read")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{reader.source}: bias={config['bias']!r} is not read")
    dora, found = bool(config.get("use_dora")), {}
    for name in reader.modules("lora_A.weight"):
        a = reader.take(f"{PREFIX}{name}.lora_A.weight")
        b = reader.take(f"{PREFIX}{name}.lora_B.weight")
        if a.ndim != 2 or b.ndim != 2:
            raise ValueError(f"{reader.source}: {name} is a convolution or embedding; LoRA on it is not read")
        m = reader.take(f"{PREFIX}{name}.lora_magnitude_vector") if dora else None
        rank = _pattern(config.get("rank_pattern"), name, config.get("r", 8))
        alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        parts, start = reader.parts(name, "linear"), 0
        wanted = (rank, parts[0][2][0]), (sum(shape[1] for *_, shape in parts), rank)
        if (a.shape, b.shape) != wanted:
            raise ValueError(
                f"{reader.source}: {name} has A {a.shape} and B {b.shape}, expected {wanted[0]} and {wanted[1]}"
            )
        for path, layer, (_, n_out) in parts:
            mine = {"a": a.T, "b": b[start : start + n_out].T, "scale": scale}
            if dora:
                mine["m"] = m[start : start + n_out]
            found.setdefault(path, {})[layer] = mine
            start += n_out
    fused = {path for path in found if reader.where[path].parts > 1}
    for path in fused:  # of a fused matrix each part keeps the ranks that reach it in some layer
        keep = np.any([np.any(one["b"] != 0, axis=1) for one in found[path].values()], axis=0)
        for one in found[path].values():
            one["a"], one["b"] = one["a"][:, keep], one["b"][keep]
    if not dora:
        found = {path: layers for path, layers in found.items() if all(one["a"].shape[1] for one in layers.values())}
    for layers in found.values():  # layers are stacked: one rank and scale each, smaller ranks filled up with zeros
        rank = max(1, *(one["a"].shape[1] for one in layers.values()))
        scale = next(iter(layers.values()))["scale"]
        for one in layers.values():
            short = ((0, 0), (0, rank - one["a"].shape[1]))
            one["a"], one["b"] = np.pad(one["a"], short), np.pad(one["b"] * (one["scale"] / scale), short[::-1])
            one["fields"] = {"rank": rank, "alpha": scale * rank, "dropout": float(config.get("lora_dropout") or 0.0)}
    if not found:
        raise ValueError(f"{reader.source}: every update is zero")
    return *_group(found, DoRA if dora else LoRA, ("a", "b", "m"), reader.model), params


def _pattern(patterns, name, default):
    """PEFT's rank_pattern and alpha_pattern: regular expressions that end the module name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def _import_ia3(reader, config, params):
    inputs, found = config.get("feedforward_modules") or [], {}
    inputs = [inputs] if isinstance(inputs, str) else inputs
    for name in reader.modules("ia3_l"):
        vector = reader.take(f"{PREFIX}{name}.ia3_l")
        parts, start = reader.parts(name, "linear"), 0
        is_input = any(name == one or name.endswith(f".{one}") or re.fullmatch(one, name) for one in inputs)
        size = parts[0][2][0] if is_input else sum(shape[1] for *_, shape in parts)
        if vector.shape != ((1, size) if is_input else (size, 1)) or (is_input and len(parts) > 1):
            raise ValueError(f"{reader.source}: {name}.ia3_l has shape {vector.shape}, which does not fit")
        for path, layer, (_, n_out) in parts:
            one = {"l_in": vector[0]} if is_input else {"l": vector[start : start + n_out, 0]}
            found.setdefault(path, {})[layer] = one | {"fields": {"feedforward": "" if is_input else "(?!)"}}
            start += n_out
    for path in [p for p in found if reader.where[p].parts > 1]:
        if all(np.all(one["l"] == 1) for one in found[path].values()):
            del found[path]
    return *_group(found, IA3, ("l", "l_in"), reader.model), params


def _import_norms(reader, config, params):
    flat, paths = dict(tree.flatten(params)), {}
    for name in reader.modules("ln_tuning_layers.weight"):
        (path, layer, place) = reader.by_module[name][0]
        for ours, theirs in (("scale", "weight"), ("bias", "bias")):
            x = jnp.asarray(reader.take(f"{PREFIX}{name}.ln_tuning_layers.{theirs}"))
            leaf = f"{path}/{ours}"
            flat[leaf] = x if place.layers is None else flat[leaf].at[layer].set(x)
        paths.setdefault(path, set()).add(layer)
    where = rf"^({'|'.join(map(re.escape, paths))})/"
    return (LayerNorms(where=where),), {}, tree.unflatten(params, flat, reader.source)


def _import_vera(reader, config, params):
    found = {}
    for name in reader.modules("vera_lambda_b"):
        ((path, layer, _), *more) = reader.parts(name, "linear")
        if more:
            raise ValueError(f"{reader.source}: VeRA on the fused {name} is not read")
        one = {"l": reader.take(f"{PREFIX}{name}.vera_lambda_b"), "d": reader.take(f"{PREFIX}{name}.vera_lambda_d")}
        found.setdefault(path, {})[layer] = one | {
            "fields": {"rank": config["r"], "d_initial": config.get("d_initial", 0.1)}
        }
    many, own = _group(found, VeRA, ("l", "d"), reader.model)
    if len(many) > 1:
        raise ValueError(f"{reader.source}: VeRA in different layers of different modules is not read")
    shared = {key: reader.take(f"base_model.vera_{key.upper()}").T for key in ("a", "b")}
    return many, own | {f"peft/{sites.SHARED}/0/vera/{key}": x for key, x in shared.items()}, params


def _import_oft(reader, config, params):
    if config.get("use_cayley_neumann", True):
        raise ValueError(
            f"{reader.source}: use_cayley_neumann=True is a truncated series of the inverse rotation, which is not read; "
            "train with use_cayley_neumann=False"
        )
    for key in ("coft", "block_share"):
        if config.get(key):
            raise ValueError(f"{reader.source}: {key} is not read")
    found = {}
    for name in reader.modules("oft_R.weight"):
        q = reader.take(f"{PREFIX}{name}.oft_R.weight")
        ((path, layer, (n_in, _)), *more) = reader.parts(name, "linear")
        if more:
            raise ValueError(f"{reader.source}: OFT on the fused {name} is not read")
        found.setdefault(path, {})[layer] = {"q": q, "fields": {"block": n_in // q.shape[0]}}
    return *_group(found, OFT, ("q",), reader.model), params


def _import_prompt(reader, config, params):
    rows = reader.take("prompt_embeddings")
    method = Prompt(where=r"^text_decoder$", length=len(rows), start="normal", positions="shift")
    return (method,), {"peft/text_decoder/@embed/0/prompt/rows": rows}, params


def _import_prefix(reader, config, params):
    c, rows = reader.model.config, reader.take("prompt_embeddings")
    both = rows.reshape(len(rows), c.text_layers, 2, c.text_heads, -1).transpose(2, 1, 0, 3, 4)
    method = Prefix(where=r"^text_decoder/blocks/self_attention$", length=len(rows), positions="shift")
    path = "peft/text_decoder/blocks/self_attention/@kv/0/prefix"
    return (method,), {f"{path}/k": both[0], f"{path}/v": both[1]}, params


_IMPORT: dict[str, Callable] = {
    "LORA": _import_lora,
    "IA3": _import_ia3,
    "LN_TUNING": _import_norms,
    "VERA": _import_vera,
    "OFT": _import_oft,
    "PROMPT_TUNING": _import_prompt,
    "PREFIX_TUNING": _import_prefix,
}
