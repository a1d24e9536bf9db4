"""The two sides of vlm_large.py's SmolVLM section, each written as its users would write it; see peers.py.

Both start from the same directory: a transformers SmolVLM and inputs.npz. Neither class imports the framework of the other.
"""

import functools

import numpy as np
import reference
from peers import compiled_step

BATCH, LENGTH, RANK, LR = 2, 20, 8, 1e-3
IMAGE, END, PAD = 49190, 49279, 2  # ids of <image> in the released models, of <end_of_utterance>, of padding
N_IMAGE = 64  # image tokens
CACHED = "cached image tokens"


class Torch:
    """A usual training loop with transformers and peft: eager mode, AdamW."""

    def __init__(self, directory, threads: int):
        import torch
        import transformers

        reference.quiet_torch(threads)
        self.inputs = np.load(directory / "inputs.npz")
        self.model = transformers.SmolVLMForConditionalGeneration.from_pretrained(directory)
        self.pixels = torch.tensor(self.inputs["image"]).permute(0, 3, 1, 2)[:, None].contiguous()
        ids = [self._ids(row) for row in self.inputs["prompt"]]
        self.prompt_BQ = torch.tensor(ids)
        self.tokens_BT = torch.cat([self.prompt_BQ, torch.tensor(self.inputs["text"]).long()], dim=1)

    @staticmethod
    def _ids(row) -> list[int]:
        """A prompt with an id per image token."""
        at = row.tolist().index(IMAGE)
        return [*row[:at], *[IMAGE] * N_IMAGE, *row[at + 1 :]]

    def steps(self, others: bool = True) -> dict:
        """{label: one training step -> loss}: '' is the main one and comes first. All share the model."""
        import peft
        import torch

        target = r".*text_model.*\.(q_proj|v_proj)"
        lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=target)
        tuned = peft.get_peft_model(self.model, lora).train()
        for name, p in tuned.named_parameters():
            if "lora_A" in name:
                layer, _, part = name.split(".layers.")[1].split(".")[:3]
                p.data.copy_(torch.tensor(self.inputs[part][int(layer)].T))
        self.trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
        labels_BT = self.tokens_BT.clone()
        labels_BT[:, : self.prompt_BQ.shape[1]] = -100
        texts = {
            "input_ids": self.tokens_BT, "attention_mask": torch.ones_like(self.tokens_BT), "labels": labels_BT,
        }  # fmt: skip

        def step(**images):
            optimizer.zero_grad()
            loss = tuned(**images, **texts).loss
            loss.backward()
            optimizer.step()
            return loss.item()

        ways = {"": lambda: step(pixel_values=self.pixels)}
        if others:
            with torch.no_grad():
                found = self.model.get_image_features(self.pixels)
            cached = getattr(found, "pooler_output", found)
            ways[CACHED] = lambda: step(image_hidden_states=cached)
        return ways

    def writers(self) -> dict:
        """{label: images -> tokens (B, LENGTH)}"""
        self.model.eval()
        inputs = {"pixel_values": self.pixels, "input_ids": self.prompt_BQ}
        options = {"do_sample": False, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
        options |= {"eos_token_id": END, "pad_token_id": PAD}

        def write():
            return self.model.generate(**inputs, **options).numpy()[:, -LENGTH:]

        return {"greedy": write}


class Jax:
    """jaxpeft as in its own loop: the jitted train_step with donated state; image encoding and decoding are jitted too."""

    def __init__(self, directory, threads: int):
        from jaxpeft.models import loading
        from jaxpeft.runtime import malloc

        malloc.keep_freed_memory()  # as in main.py; where both are in one process, torch benefits from it too
        self.inputs, self.seconds = np.load(directory / "inputs.npz"), {}
        self.model, self.params = loading.load(directory)

    def steps(self, others: bool = True) -> dict:
        import jax
        import jax.numpy as jnp
        import ml_collections

        from jaxpeft import methods, tasks, tree
        from jaxpeft.adapt import sites
        from jaxpeft.models import stack
        from jaxpeft.training import loop, optim

        variables = sites.attach(self.model, self.params, methods.LoRA(rank=RANK), jax.random.key(0))
        flat = tree.flatten(variables)
        for name in flat:
            if name.startswith("peft/") and name.endswith("/a"):
                flat[name] = jnp.asarray(self.inputs["q_proj" if "/query/" in name else "v_proj"])
        variables = tree.unflatten(variables, flat)
        tuned, frozen = tree.split(variables, sites.trainable(variables))
        frozen = stack.apart(self.model.config, frozen)
        self.trained = tree.count(tuned)
        settings = {"lr": LR, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "no_decay": "", "b1": 0.9}
        tx = optim.optimizer(ml_collections.ConfigDict(settings | {"b2": 0.999, "clip_norm": 0.0}), tuned, 1000)
        targets_BT = self.inputs["text"]
        texts = {"tokens": np.pad(targets_BT[:, :-1], ((0, 0), (1, 0))), "targets": targets_BT}
        texts |= {"weights": np.ones(targets_BT.shape, np.float32)}
        texts = {name: jnp.asarray(x[:, None]) for name, x in texts.items()} | {
            "prompt": jnp.asarray(self.inputs["prompt"])
        }
        loss = functools.partial(tasks.Captioning().loss, self.model)
        step_fn = functools.partial(loop.train_step, loss=loss, tx=tx, grad_accum=1)

        def stepper(label, batch):
            step, self.seconds[label] = compiled_step(step_fn, tx, tuned, frozen, batch)
            return step

        image_BYXC = jnp.asarray(self.inputs["image"])
        ways = {"": stepper("", texts | {"image": image_BYXC})}
        if others:
            encode = jax.jit(functools.partial(self.model.apply, method="stage"), static_argnums=2)
            tokens_BPD = encode(variables, {"image": image_BYXC}, "image_tokens")
            ways[CACHED] = stepper(CACHED, texts | {"image_tokens": tokens_BPD})
        return ways

    def writers(self) -> dict:
        import jax.numpy as jnp

        from jaxpeft.models import decode, stack
        from jaxpeft.training import evaluate

        variables = stack.apart(self.model.config, {"params": self.params})
        batch = {name: jnp.asarray(self.inputs[name]) for name in ("image", "prompt")}
        search = decode.Search((), (END,), PAD, self.model.config.vocab_size, length=LENGTH, min_length=LENGTH)

        def write():
            context = evaluate.contexts(self.model, variables, batch)
            return np.asarray(decode.greedy(self.model, variables, context, search)[0])

        return {"greedy": write}


PEERS = {"transformers + peft": Torch, "jaxpeft": Jax}
