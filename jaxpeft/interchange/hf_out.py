"""Export a tuned model as a directory that transformers loads as a plain model, without an adapter.

Every method is merged into the weights, exactly or with an error (`merge`). The model defines the content of the files
(`model.hf`, models/hf.py).
"""

import json
from pathlib import Path

from jaxpeft.adapt import sites
from jaxpeft.inputs import tokenizer
from jaxpeft.models import hf, loading
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime import files
from jaxpeft.tasks import Task
from jaxpeft.tree import Tree

FILES = ("model.safetensors", "config.json", "generation_config.json", *tokenizer.FILES, "tokenizer_config.json",
         "preprocessor_config.json", "README.md")  # fmt: skip


def export_hf(
    model: VisionLanguageModel,
    variables: Tree,
    directory: str | Path,
    card: str = "",
    task: Task | None = None,
    beams: int = 1,
) -> Path:
    """Write weights, configuration, tokenizer and processor files; `card` is the text of README.md.

    With the `task` that was trained, `generate` of transformers has the same prompt and text length as ours; `beams` is the
    number of beams in generation_config.json.

    Raises ValueError for a method that cannot be merged exactly, for a model that transformers does not have, and if the
    directory holds other files. A model without a tokenizer gets no tokenizer files.
    """
    directory = Path(directory)
    hf.of(model)
    params = sites.merge(model, variables) if "peft" in variables else variables["params"]
    model, params = loading.joined(model, params)
    form = hf.of(model)
    settings = form.settings(task, beams)
    contents = {name: json.dumps(value, indent=2, sort_keys=True) + "\n" for name, value in settings.items()}
    contents |= model.tokenizer.files() if model.tokenizer is not None else {}
    contents |= {"README.md": card} if card else {}
    with files.whole_directory(directory, (*FILES, ".model.safetensors")) as new:
        files.write_tensors(new / "model.safetensors", form.tensors(params), {"format": "pt"})
        for name, content in contents.items():
            files.write_text(new / name, content)
    return directory
