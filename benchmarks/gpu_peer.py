"""The sections of gpu.py for transformers + peft. Run by gpu.py, each in a process of its own; jax is not imported."""

import json
import time

import numpy as np
import peft
import torch
import transformers
from gpu import LENGTH, PROMPT, RANK, failed, median_ms, options, say

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TARGETS = {
    ("blip", "lora"): r".*text_decoder.*\.(query|value)",
    (
        "blip",
        "vit_lora",
    ): r".*text_decoder.*\.(query|value)|.*vision_model.*\.qkv",  # one matrix here: keys are adapted too
    ("smolvlm", "lora"): r".*text_model.*\.(q|v)_proj",
    ("paligemma", "lora"): r".*language_model.*\.(q|v)_proj",
}


def config_of(name: str, s: dict):
    """transformers' configuration of the same sizes. `s`: the fields of ours."""
    vision = {
        "image_size": s["image_size"], "patch_size": s["patch_size"], "hidden_size": s["vision_width"],
        "num_hidden_layers": s["vision_layers"], "num_attention_heads": s["vision_heads"],
        "intermediate_size": s["vision_mlp"], "layer_norm_eps": 1e-6,
    }  # fmt: skip
    text = {
        "hidden_size": s["text_width"], "num_hidden_layers": s["text_layers"], "num_attention_heads": s["text_heads"],
        "intermediate_size": s["text_mlp"], "vocab_size": s["vocab_size"], "max_position_embeddings": s["max_positions"],
    }  # fmt: skip
    if name == "blip":
        ids = {"bos_token_id": s["bos_id"], "eos_token_id": s.get("sep_id", 102), "pad_token_id": 0}
        text |= {"encoder_hidden_size": s["vision_width"], "layer_norm_eps": 1e-12, **ids}
        return transformers.BlipConfig(vision_config=vision, text_config=text)
    text |= {"num_key_value_heads": s["kv_heads"], "head_dim": s["head_size"], "pad_token_id": s["pad_id"]}
    if name == "smolvlm":
        text = transformers.LlamaConfig(**text, tie_word_embeddings=False)
        more = {"image_token_id": s["image_id"], "scale_factor": s["shuffle"], "tie_word_embeddings": False}
        return transformers.SmolVLMConfig(text_config=text, vision_config=vision, **more)
    text = transformers.GemmaConfig(**text)
    more = {"image_token_index": s["vocab_size"] - 1, "projection_dim": s["text_width"], "hidden_size": s["text_width"]}
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, vocab_size=s["vocab_size"], **more)
    config.vision_config.vision_use_head = False
    return config


CLASSES = {
    "blip": "BlipForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
}


def build(name: str, kind: str, size: dict):
    """The model on its device with drawn weights, adapted by peft; frozen weights in bfloat16."""
    torch.manual_seed(0)
    config = config_of(name, size)
    with torch.device(DEVICE):
        model = getattr(transformers, CLASSES[name])(config)
    if kind != "full":
        settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS[name, kind])
        model = peft.get_peft_model(model, settings)
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
    return model.to(DEVICE)


def inputs_of(name: str, size: dict, batch_size: int) -> dict:
    """The arguments of `forward`: as many ids as ours, images in bfloat16."""
    rng, side = np.random.default_rng(0), size["image_size"]
    shape = (batch_size, 3, side, side) if name != "smolvlm" else (batch_size, 1, 3, side, side)
    image = torch.tensor(rng.standard_normal(shape, np.float32)).bfloat16()
    ids = rng.integers(10, min(size["vocab_size"], 30000) - 8, (batch_size, LENGTH))
    labels = ids.copy()
    if name != "blip":
        n_image = (size["image_size"] // size["patch_size"]) ** 2 // size.get("shuffle", 1) ** 2
        image_id = size.get("image_id", size["vocab_size"] - 1)
        prompt = rng.integers(10, 80, (batch_size, PROMPT[name] - (name == "smolvlm")))
        prefix = np.concatenate([np.full((batch_size, n_image), image_id), prompt], axis=1)
        ids = np.concatenate([prefix, ids], axis=1)
        labels = np.concatenate([np.full(prefix.shape, -100), labels], axis=1)
    found = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": image}
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    if name == "paligemma":
        found["token_type_ids"] = (found["labels"] != -100).long()
    return {key: x.to(DEVICE) for key, x in found.items()}


def wait(_) -> None:
    if CUDA:
        torch.cuda.synchronize()


def step_row(args, batch_size: int, compiled: bool) -> dict:
    """The row of one batch size, compiled or not."""
    row = {"batch": batch_size, "compiled": compiled}
    try:
        model = build(args.model, args.kind, args.size).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=CUDA)
        inputs = inputs_of(args.model, args.size, batch_size)
        # a rehearsal traces the program, and leaves out the C++ compiler
        forward = torch.compile(model, backend="aot_eager" if args.tiny else "inductor") if compiled else model

        def call():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = forward(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            return loss

        began = time.perf_counter()
        loss = float(call())
        row |= {"first_s": time.perf_counter() - began, "loss": loss, "trained": sum(p.numel() for p in trained)}
        row |= median_ms(call, args.runs, wait)
        row |= {"pictures_s": 1e3 * batch_size / row["ms"], "attention": model.config._attn_implementation}
        row |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0}
    except Exception as error:
        row |= {"failed": failed(error)}
    return say(row)


def steps(args):
    """Training steps, compiled; where that fails, as they are."""
    rows = []
    for batch_size in args.batches:
        rows.append(step_row(args, batch_size, compiled=True))
        if "failed" in rows[-1]:
            torch._dynamo.reset()
            rows.append(step_row(args, batch_size, compiled=False))
    return {
        "rows": rows,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def generation(args):
    """`generate` in bfloat16, not compiled: LENGTH new tokens, greedy and beam 3."""
    model, rows = build(args.model, "full", args.size).bfloat16().eval(), []
    start = args.size["bos_id"]
    for batch_size in args.batches:
        image = inputs_of(args.model, args.size, batch_size)["pixel_values"]
        # BLIP's generate removes the last token of what it is given
        prompt = torch.tensor([[start, args.size.get("sep_id", 102)]] * batch_size, device=DEVICE)
        for beams in (1, 3):
            length = {"max_length": LENGTH + 1, "min_length": LENGTH + 1}

            def write(image=image, prompt=prompt, beams=beams, length=length):
                with torch.inference_mode():
                    mask = torch.ones_like(prompt)
                    return model.generate(image, prompt.clone(), mask, num_beams=beams, do_sample=False, **length)

            try:
                n_tokens = write().shape[1]
                row = median_ms(write, max(2, args.runs // 4), wait)
                row = {"batch": batch_size, "beams": beams, "tokens": n_tokens} | row
                row |= {"pictures_s": 1e3 * batch_size / row["ms"]}
            except Exception as error:
                row = {"batch": batch_size, "beams": beams, "failed": failed(error)}
            rows.append(say(row))
    return {"rows": rows}


if __name__ == "__main__":
    given = options()
    transformers.logging.set_verbosity_error()
    print("RESULT " + json.dumps({"steps": steps, "generation": generation}[given.section](given)), flush=True)
