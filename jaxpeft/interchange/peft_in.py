"""Import a directory of HF PEFT as a tuned tree on our params; a tensor that is not read is an error."""

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.adapt import sites
from jaxpeft.interchange.tuned import check_base, read, sha
from jaxpeft.methods import IA3, OFT, DoRA, Head, LayerNorms, LoRA, Method, Prefix, Prompt, Scoped, VeRA
from jaxpeft.models import convert, hf
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime import files
from jaxpeft.tree import Tree

PREFIX = "base_model.model."  # PEFT's prefix of the names in transformers
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def import_peft(model: VisionLanguageModel, params: Tree, directory: str | Path) -> tuple[Tree, tuple[Method, ...]]:
    """Load a PEFT directory for the model in transformers on our params of the same base -> (variables, methods).

    Reads LORA (with rslora, dora, rank and alpha patterns, modules_to_save of the head), IA3, LN_TUNING, VERA, OFT (exact
    Cayley transform), PROMPT_TUNING and PREFIX_TUNING of the text decoder. Raises ValueError for anything unsupported or
    inconsistent: other types, unexpected or missing tensors, wrong shapes, a base or configuration that differs from the one
    that the file was written with; and for a model that transformers does not have.
    """
    with files.reading(directory, "is not a valid PEFT directory"):
        return _import_peft(model, params, Path(directory))


def _import_peft(model: VisionLanguageModel, params: Tree, directory: Path) -> tuple[Tree, tuple[Method, ...]]:
    if (directory / "adapter_model.bin").exists() and not (directory / WEIGHTS).exists():
        raise ValueError(
            f"{directory} holds adapter_model.bin, a pickle; save it as {WEIGHTS}: in PyTorch, "
            "PeftModel.from_pretrained(base, directory).save_pretrained(directory)"
        )
    config, arrays, metadata = read(directory, CONFIG, WEIGHTS)
    kind = config.get("peft_type")
    if kind not in _IMPORT:
        raise ValueError(f"{directory / CONFIG}: peft_type {kind!r} is unsupported; choose one of {', '.join(_IMPORT)}")
    facts = json.loads(metadata.get("jaxpeft", "{}"))
    if facts and facts["config"] != sha(config):
        raise ValueError(
            f"{directory / CONFIG} was changed after it was written (its digest differs from that in {WEIGHTS}); restore it"
        )
    _check_fields(config, kind, str(directory / CONFIG))
    arrays = {name.replace(".default.", "."): np.asarray(x, np.float32) for name, x in arrays.items()}
    reader = _Reader(model, arrays, str(directory / WEIGHTS))
    _check_saved_head(reader, params)
    head, params = _take_head(reader, config, params)
    many, own, params = _IMPORT[kind](reader, config, params)
    reader.close()
    many = (*many, *head)
    # as shapes: nothing is allocated before the sizes in the configuration are checked against the tensors
    variables = jax.eval_shape(lambda: sites.attach(model, params, many, jax.random.key(0)))
    many = sites.methods_of(variables)
    if reader.matrix is not None:
        own[f"peft/{reader.form.head.vocabulary}/@linear/0/{Head.name}/matrix"] = reader.matrix
    flat = tree.flatten(variables)
    tree.check_same({n: x for n, x in flat.items() if n.startswith("peft/")}, own, str(directory / WEIGHTS))
    base = {f"params/{name}": x for name, x in tree.flatten(params).items()}
    variables = tree.unflatten(variables, base | {name: jnp.asarray(x, jnp.float32) for name, x in own.items()})
    if facts:
        check_base(variables, many, facts["frozen"], directory)
    return variables, many


# Fields of PEFT's configurations that do not affect what a saved adapter computes: its origin, its modules (the tensors'
# names determine them), its initialisation and training ...
_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "runtime_config",
}  # fmt: skip
# ... and fields of each type that do not affect it either, or that its reader reads
_READ = {
    "LORA": {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
        "eva_config", "megatron_core", "qalora_group_size",
    },
    "IA3": {"feedforward_modules", "init_ia3_weights"},
    "LN_TUNING": set(),
    "VERA": {"r", "d_initial", "vera_dropout", "projection_prng_key", "save_projection", "init_weights"},
    "OFT": {
        "r", "oft_block_size", "module_dropout", "eps", "num_cayley_neumann_terms", "init_weights", "use_cayley_neumann",
    },
    "PROMPT_TUNING": {
        "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules",
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    },
    "PREFIX_TUNING": {
        "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules",
        "encoder_hidden_size", "prefix_projection", "init_weights",
    },
}  # fmt: skip
_NEUTRAL = (None, False, "none", {}, [])
# init_lora_weights that keep the base. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it at initialisation
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


def _check_fields(config: dict, kind: str, source: str) -> None:
    """Raise ValueError for every field that is set but unknown, such as one of a later PEFT."""
    known = _HARMLESS | _READ[kind]
    if unread := sorted(name for name in config if name not in known and config[name] not in _NEUTRAL):
        said = ", ".join(f"{name}={config[name]!r:.80}" for name in unread)
        raise ValueError(f"{source}: {said} is unsupported; it may change what the adapter computes")
    start = config.get("init_lora_weights", True)
    if kind == "LORA" and start not in _KEEPS_BASE:
        raise ValueError(
            f"{source}: init_lora_weights={start!r} changed the base weights at initialisation, and the file does not contain "
            f"them; save it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...) in PEFT"
        )


class _Reader:
    """The tensors of a file by HF module; each can be taken once."""

    def __init__(self, model: VisionLanguageModel, arrays: dict[str, np.ndarray], source: str):
        self.model, self.source, self.form = model, source, hf.of(model)
        rename = self.form.table.rename  # releases of transformers name modules differently
        self.left = {
            PREFIX + rename(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else name: x
            for name, x in arrays.items()
        }
        self.matrix = None  # an untied vocabulary matrix, if any
        self.by_module: dict[str, list] = {}
        for path, place in self.form.places.items():
            for i, name in enumerate(place.names()):
                self.by_module.setdefault(name, []).append((path, i, place))

    def modules(self, suffix) -> list[str]:
        """Modules that have a tensor with this suffix; raises ValueError if the model has no such module."""
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
            raise ValueError(f"{self.source}: {len(self.left)} unexpected tensors: {', '.join(sorted(self.left)[:10])}")


_Found = tuple[tuple[Method, ...], dict[str, np.ndarray], Tree]  # methods, adapter parameters, params


def _check_saved_head(reader: _Reader, params: Tree) -> None:
    """PEFT also saves the base's vocabulary matrix where the head is adapted: it must be ours, and is not read."""
    name, head = f"{PREFIX}{reader.form.head.linear}.base_layer.weight", reader.form.head
    if name in reader.left:
        matrix = np.asarray(head.matrix(tree.flatten(params)), np.float32)
        if not np.array_equal(reader.take(name), matrix):
            raise ValueError(f"{reader.source}: {name} differs from {head.embedding}; the adapter is for another base")


def _take_head(reader: _Reader, config: dict, params: Tree) -> tuple[tuple[Method, ...], Tree]:
    """(methods, params) of modules_to_save, which may be the head; PEFT unties it."""
    saved, head = config.get("modules_to_save") or [], reader.form.head
    if not saved:
        return (), params
    if sorted(saved) != sorted(head.saved_as):
        raise ValueError(
            f"{reader.source}: modules_to_save is {saved}; only {list(head.saved_as)}, the head, is supported"
        )
    tensors = {name: reader.take(PREFIX + name) for name in head.tensors}
    flat = tree.flatten(params) | _leaves(reader, tensors)
    matrix = reader.take(f"{PREFIX}{head.linear}.weight")
    if head.bias and not np.array_equal(reader.take(f"{PREFIX}{head.linear}.bias"), np.asarray(flat[head.bias])):
        raise ValueError(f"{reader.source}: the head has two different vocabulary biases")
    params = tree.unflatten(params, flat, reader.source)
    if np.array_equal(matrix, head.matrix(flat)):
        return (Head(),), params
    reader.matrix = matrix
    return (Head(matrix="untied"),), params


def _leaves(reader: _Reader, tensors: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The leaves that consist of these tensors."""
    table = convert.Table(reader.form.rules(tensors))
    return convert.read(tensors, table, reader.source)


def _group(found: dict[str, dict[int, dict]], make, fill, model):
    """Methods and parameters from {our path: {layer: parameters}}: one method per (arguments of `make`, set of layers). Stacks
    of different depth that have it in all of their layers share one."""
    groups: dict = {}
    depth = {s.path: s.layers for s in sites.sites(model)}
    for path, layers in found.items():
        fields = tuple(sorted(next(iter(layers.values()))["fields"].items()))
        some = None if depth[path] in (None, len(layers)) else tuple(sorted(layers))
        groups.setdefault((fields, some), []).append(path)
    many, own = [], {}
    for (fields, some), paths in groups.items():
        method = make(targets=rf"^({'|'.join(map(re.escape, paths))})$", **dict(fields))
        many.append(Scoped(method=method, layers=some) if some else method)
        for path in paths:
            for name in fill:
                stack = [found[path][i][name] for i in sorted(found[path]) if name in found[path][i]]
                if stack:
                    leaf = f"peft/{path}/@linear/0/{method.name}/{name}"  # the only method on its site
                    own[leaf] = np.stack(stack) if depth[path] is not None else stack[0]
    return tuple(many), own


def _import_lora(reader: _Reader, config: dict, params: Tree) -> _Found:
    dora, found = bool(config.get("use_dora")), {}
    for name in reader.modules("lora_A.weight"):
        a = reader.take(f"{PREFIX}{name}.lora_A.weight")
        b = reader.take(f"{PREFIX}{name}.lora_B.weight")
        if a.ndim != 2 or b.ndim != 2:
            raise ValueError(f"{reader.source}: {name} is a convolution or embedding; LoRA on it is unsupported")
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
    fused = {path for path in found if reader.form.places[path].parts > 1}
    for path in fused:  # each part of a fused matrix keeps the ranks with a non-zero B in any layer
        _widen(found[path].values())
        keep = np.any([np.any(one["b"] != 0, axis=1) for one in found[path].values()], axis=0)
        for one in found[path].values():
            one["a"], one["b"] = one["a"][:, keep], one["b"][keep]
    if not dora:
        found = {path: layers for path, layers in found.items() if all(one["a"].shape[1] for one in layers.values())}
    for layers in found.values():  # stacked layers share one rank and scale; smaller ranks are padded with zeros
        rank, scale = _widen(layers.values()), next(iter(layers.values()))["scale"]
        for one in layers.values():
            one["b"] = one["b"] * (one["scale"] / scale)
            one["fields"] = {"rank": rank, "alpha": scale * rank, "dropout": float(config.get("lora_dropout") or 0.0)}
    if not found:
        raise ValueError(f"{reader.source}: every update is zero")
    return *_group(found, DoRA if dora else LoRA, ("a", "b", "m"), reader.model), params


def _widen(layers: Collection[dict]) -> int:
    """Pad the LoRA matrices of layers with zeros to the largest rank among them, at least 1, which is returned."""
    rank = max(1, *(one["a"].shape[1] for one in layers))
    for one in layers:
        short = ((0, 0), (0, rank - one["a"].shape[1]))
        one["a"], one["b"] = np.pad(one["a"], short), np.pad(one["b"], short[::-1])
    return rank


def _pattern(patterns, name, default):
    """Look up a module in PEFT's rank_pattern or alpha_pattern, regular expressions for the end of its name."""
    for pattern, value in (patterns or {}).items():
        expression = re.compile(pattern)
        if expression.fullmatch(name) or any(expression.fullmatch(name, i + 1) for i, c in enumerate(name) if c == "."):
            return value
    return default


def _import_ia3(reader: _Reader, config: dict, params: Tree) -> _Found:
    inputs, found = config.get("feedforward_modules") or [], {}
    inputs = [inputs] if isinstance(inputs, str) else inputs
    for name in reader.modules("ia3_l"):
        vector = reader.take(f"{PREFIX}{name}.ia3_l")
        parts, start = reader.parts(name, "linear"), 0
        is_input = any(name == one or name.endswith(f".{one}") or re.fullmatch(one, name) for one in inputs)
        size = parts[0][2][0] if is_input else sum(shape[1] for *_, shape in parts)
        if vector.shape != ((1, size) if is_input else (size, 1)) or (is_input and len(parts) > 1):
            raise ValueError(f"{reader.source}: {name}.ia3_l has shape {vector.shape}, which does not match the module")
        if parts[0][0] == reader.form.head.vocabulary and not is_input:
            raise ValueError(
                f"{reader.source}: {name}.ia3_l scales the vocabulary's bias in PEFT but not here; it is unsupported"
            )
        for path, layer, (_, n_out) in parts:
            one = {"l_in": vector[0]} if is_input else {"l": vector[start : start + n_out, 0]}
            found.setdefault(path, {})[layer] = one | {"fields": {"feedforward": "" if is_input else "(?!)"}}
            start += n_out
    for path in [p for p in found if reader.form.places[p].parts > 1]:
        if all(np.all(one["l"] == 1) for one in found[path].values()):
            del found[path]
    return *_group(found, IA3, ("l", "l_in"), reader.model), params


def _import_norms(reader: _Reader, config: dict, params: Tree) -> _Found:
    read = {}
    for name in reader.modules("ln_tuning_layers.weight"):
        for last in ("weight", "bias"):
            if reader.form.rules((f"{name}.{last}",)):
                read[f"{name}.{last}"] = reader.take(f"{PREFIX}{name}.ln_tuning_layers.{last}")
    flat = tree.flatten(params)
    before = convert.written(flat, convert.Table(reader.form.rules(read)))  # some layers may be left out
    leaves = _leaves(reader, before | read)
    where = rf"^({'|'.join(sorted({re.escape(leaf.rpartition('/')[0]) for leaf in leaves}))})/"
    return (LayerNorms(targets=where),), {}, tree.unflatten(params, flat | leaves, reader.source)


def _import_vera(reader: _Reader, config: dict, params: Tree) -> _Found:
    found = {}
    for name in reader.modules("vera_lambda_b"):
        ((path, layer, _), *more) = reader.parts(name, "linear")
        if more:
            raise ValueError(f"{reader.source}: VeRA on the fused {name} is unsupported")
        one = {"l": reader.take(f"{PREFIX}{name}.vera_lambda_b"), "d": reader.take(f"{PREFIX}{name}.vera_lambda_d")}
        found.setdefault(path, {})[layer] = one | {
            "fields": {"rank": config["r"], "d_initial": config.get("d_initial", 0.1)}
        }
    many, own = _group(found, VeRA, ("l", "d"), reader.model)
    if len(many) > 1:
        raise ValueError(f"{reader.source}: VeRA in different layers of different modules is unsupported")
    shared = {key: reader.take(f"base_model.vera_{key.upper()}").T for key in ("a", "b")}
    return many, own | {f"peft/{sites.SHARED}/0/vera/{key}": x for key, x in shared.items()}, params


def _import_oft(reader: _Reader, config: dict, params: Tree) -> _Found:
    if config.get("use_cayley_neumann", True):
        raise ValueError(
            f"{reader.source}: use_cayley_neumann=True, a truncated series of the inverse rotation, is unsupported; train with "
            "use_cayley_neumann=False"
        )
    found = {}
    for name in reader.modules("oft_R.weight"):
        q = reader.take(f"{PREFIX}{name}.oft_R.weight")
        ((path, layer, (n_in, _)), *more) = reader.parts(name, "linear")
        if more:
            raise ValueError(f"{reader.source}: OFT on the fused {name} is unsupported")
        found.setdefault(path, {})[layer] = {"q": q, "fields": {"block": n_in // q.shape[0]}}
    return *_group(found, OFT, ("q",), reader.model), params


def _decoder(reader: _Reader) -> hf.Decoder:
    if reader.form.decoder is None:
        kind = type(reader.model).__name__
        raise ValueError(
            f"{reader.source}: PEFT's virtual tokens for {kind} cannot be read, because they act elsewhere than ours; LoRA can"
        )
    return reader.form.decoder


def _import_prompt(reader: _Reader, config: dict, params: Tree) -> _Found:
    path, rows = _decoder(reader).embed, reader.take("prompt_embeddings")
    method = Prompt(targets=f"^{path}$", length=len(rows), init_weights="normal", positions="shift")
    return (method,), {f"peft/{path}/@embed/0/prompt/rows": rows}, params


def _import_prefix(reader: _Reader, config: dict, params: Tree) -> _Found:
    decoder, rows = _decoder(reader), reader.take("prompt_embeddings")
    both = rows.reshape(len(rows), decoder.layers, 2, decoder.heads, -1).transpose(2, 1, 0, 3, 4)
    method = Prefix(targets=f"^{decoder.attention}$", length=len(rows), positions="shift")
    path = f"peft/{decoder.attention}/@kv/0/prefix"
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
