"""A check that exports work in another release of transformers and peft, in two steps, because that needs two environments.

    python benchmarks/releases.py make DIR     in this one: exports the shipped base with a random LoRA, and their logits
    python benchmarks/releases.py check DIR    in the other one: Python with torch, transformers and peft, without jaxpeft

Prints the releases, missing and unexpected keys, and the largest difference of a logit for merged directory and adapter.
"""

import sys
from pathlib import Path

import numpy as np

CLASSES = {"captioning": "BlipForConditionalGeneration", "vqa": "BlipForQuestionAnswering"}


def make(directory: Path):
    import jax

    import jaxpeft as jp
    from jaxpeft.models import vit

    method, rng = jp.LoRA(rank=4), np.random.default_rng(0)
    for task in CLASSES:
        model, params = jp.load("tiny", task=task)
        variables = jp.attach(model, params, method, jax.random.key(0))
        mask = jp.trainable(variables)
        variables = jax.tree.map(lambda x, on: x + np.float32(rng.normal(0, 0.1, x.shape)) * on, variables, mask)
        jp.export_hf(model, variables, directory / f"{task}_merged")
        jp.export_hf(model, {"params": params}, directory / f"{task}_base")
        jp.export_peft(model, variables, directory / f"{task}_adapter")
        batch = {"image": rng.integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)}
        batch["tokens"], batch["prompt"] = rng.integers(7, 70, (3, 1, 6)), rng.integers(7, 70, (3, 5))
        logits = np.asarray(model.apply(variables, batch))[:, 0]
        plain = np.asarray(model.apply({"params": params}, batch))[:, 0]
        short = batch | {"prompt": np.where(np.arange(5) < np.array([[5], [4], [2]]), batch["prompt"], 0)}
        padded = np.asarray(model.apply(variables, short))[:, 0]
        pixels = np.asarray(vit.normalised(batch["image"], model.config)).transpose(0, 3, 1, 2)
        np.savez(directory / f"{task}.npz", pixels=pixels, tokens=batch["tokens"][:, 0], question=batch["prompt"],
                 logits=logits, plain=plain, short=short["prompt"], padded=padded)  # fmt: skip


def check(directory: Path):
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
    for task, name in CLASSES.items():
        kept, kind = np.load(directory / f"{task}.npz"), getattr(transformers, name)
        merged, info = kind.from_pretrained(directory / f"{task}_merged", output_loading_info=True)
        base = kind.from_pretrained(directory / f"{task}_base")
        adapted = peft.PeftModel.from_pretrained(base, directory / f"{task}_adapter")
        print(f"{task}: missing {info['missing_keys']}, unexpected {info['unexpected_keys']}, effect of the adapter "
              f"{np.abs(kept['logits'] - kept['plain']).max():.2g}")  # fmt: skip
        for label, model in (("merged", merged.eval()), ("adapter", adapted.eval().base_model.model)):
            with torch.no_grad():
                states = model.vision_model(torch.from_numpy(kept["pixels"])).last_hidden_state
                if task == "vqa":
                    asked = torch.from_numpy(kept["question"])
                    options = {"encoder_hidden_states": states, "attention_mask": torch.ones_like(asked)}
                    states = model.text_encoder(asked, **options).last_hidden_state
                logits = model.text_decoder(
                    torch.from_numpy(kept["tokens"]), encoder_hidden_states=states
                ).logits.numpy()
            print(f"  {label}: largest difference of a logit {np.abs(logits - kept['logits']).max():.1e}")
            if task == "vqa":  # questions of different lengths: the decoder must ignore their padding
                with torch.no_grad():
                    asked, states = (
                        torch.from_numpy(kept["short"]),
                        model.vision_model(torch.from_numpy(kept["pixels"])),
                    )
                    options = {"encoder_hidden_states": states.last_hidden_state, "attention_mask": (asked != 0).long()}
                    states = model.text_encoder(asked, **options).last_hidden_state
                    options = {"encoder_hidden_states": states, "encoder_attention_mask": (asked != 0).long()}
                    logits = model.text_decoder(torch.from_numpy(kept["tokens"]), **options).logits.numpy()
                print(f"  {label}, padded questions: {np.abs(logits - kept['padded']).max():.1e}")
        processor = transformers.BlipProcessor.from_pretrained(directory / f"{task}_merged")
        print(f"  processor loads: {type(processor).__name__}, {type(processor.tokenizer).__name__}")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
