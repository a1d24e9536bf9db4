"""Export a tuned model as a directory that transformers loads as a plain model, without an adapter.

Every method is merged into the weights, exactly or with an error (`merge`). The model defines the content of the files
(`model.hf`, models/hf.py).
"""

import json
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes  # noqa: F401  makes 'bfloat16' a type of numpy
import numpy as np

from jaxpeft.adapt import sites
from jaxpeft.inputs import tokenizer
from jaxpeft.models import hf, loading
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime import files
from jaxpeft.tasks import Task
from jaxpeft.tree import Tree

FILES = ("model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", *tokenizer.FILES,
         "tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "README.md")  # fmt: skip
SHARD = 5_000_000_000  # bytes of one file of weights
DTYPES = ("float32", "bfloat16")


def export_hf(
    model: VisionLanguageModel,
    variables: Tree,
    directory: str | Path,
    card: str = "",
    task: Task | None = None,
    beams: int = 1,
    dtype: str = "float32",
) -> Path:
    """Write weights, configuration, tokenizer and processor files; `card` is the text of README.md.

    With the `task` that was trained, `generate` of transformers has the same prompt and text length as ours; `beams` is the
    number of beams in generation_config.json. Weights are rounded to `dtype` ('float32' or 'bfloat16') and, where they are
    larger than 5 GB, split into several files, as transformers does.

    Raises ValueError for a method that cannot be merged exactly, for a model that transformers does not have, and if the
    directory holds other files. A model without a tokenizer gets no tokenizer files.
    """
    directory = Path(directory)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    hf.of(model)
    params = sites.merge(model, variables) if "peft" in variables else variables["params"]
    model, params = loading.joined(model, params)
    form = hf.of(model)
    settings = form.settings(task, beams)
    contents = {name: json.dumps(value, indent=2, sort_keys=True) + "\n" for name, value in settings.items()}
    contents |= model.tokenizer.files() if model.tokenizer is not None else {}
    contents |= {"README.md": card} if card else {}
    shards = [path.name for path in directory.glob("model-*-of-*.safetensors")]
    with files.whole_directory(directory, (*FILES, *shards, ".model.safetensors")) as new:
        _write_weights(new, ((name, x.astype(dtype)) for name, x in form.tensors(params)))
        for name, content in contents.items():
            files.write_text(new / name, content)
    return directory


def _write_weights(directory: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write model.safetensors or, beyond SHARD bytes, several files and their index; only one file is in memory at a time."""
    parts, part, n_bytes = [], {}, 0

    def write():
        path = directory / f"model-{len(parts) + 1:05}.safetensors"
        files.write_tensors(path, part, {"format": "pt"})
        parts.append((path, list(part), n_bytes))

    for name, x in tensors:
        if part and n_bytes + x.nbytes > SHARD:
            write()
            part, n_bytes = {}, 0
        part[name], n_bytes = x, n_bytes + x.nbytes
    write()
    if len(parts) == 1:
        parts[0][0].rename(directory / "model.safetensors")
        return
    where = {}
    for i, (path, names, _) in enumerate(parts):
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        path.rename(directory / name)
        where |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": sum(size for *_, size in parts)}, "weight_map": where}
    files.write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
