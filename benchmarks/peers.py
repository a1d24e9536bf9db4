"""The two sides of blip_base.py, each written as its users would write it.

Both start from the same directory: a transformers model and inputs.npz. Neither class imports the framework of the other, so
that the memory of each can be measured alone.
"""

import functools
import time

import numpy as np
import reference

BATCH, LENGTH, RANK, LR = 8, 20, 8, 1e-3
BEAMS = {"greedy": 1, "beam 3": 3}
CACHED = "cached image tokens"


def compiled_step(step_fn, tx, tuned, frozen, batch):
    """(a function that trains one step and returns its loss, seconds to compile it)."""
    import jax
    import jax.numpy as jnp

    from jaxpeft.training import loop

    state = loop.TrainState(jnp.int32(0), *jax.tree.map(jnp.array, (tuned, tx.init(tuned))))
    started = time.perf_counter()
    compiled = jax.jit(step_fn, donate_argnums=0).lower(state, frozen, batch).compile()
    seconds = time.perf_counter() - started

    def step():
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step, seconds


class Torch:
    """A usual training loop with transformers and peft: eager mode, AdamW."""

    def __init__(self, directory, threads: int):
        import torch
        import transformers

        reference.quiet_torch(threads)
        self.inputs = np.load(directory / "inputs.npz")
        self.model = transformers.BlipForConditionalGeneration.from_pretrained(directory)
        self.image_BCYX = torch.tensor(self.inputs["image"]).permute(0, 3, 1, 2).contiguous()
        self.tokens_BT = torch.tensor(self.inputs["tokens"]).long()
        self.prompt_BT = torch.tensor(self.inputs["prompt"]).long()

    def start_of(self, name: str) -> np.ndarray:
        """What LoRA's A of this name begins as, on both sides."""
        layer, part, _, which = name.split(".layer.")[1].split(".")[:4]
        return self.inputs[f"{part} {which}"][int(layer)]

    def lora(self, target: str):
        """(the model with LoRA on the linears that `target` matches, the optimizer of what is trained)"""
        import peft
        import torch

        lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=target)
        tuned = peft.get_peft_model(self.model, lora).train()
        for name, p in tuned.named_parameters():
            if "lora_A" in name:
                p.data.copy_(torch.tensor(self.start_of(name).T))
        trained = [p for p in tuned.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        return tuned, torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)

    def steps(self, others: bool = True) -> dict:
        """{label: one training step -> loss}: '' is the main one and comes first. All share the model."""
        import torch

        tuned, optimizer = self.lora(r".*text_decoder.*\.(query|value)")
        mask_BT = torch.ones_like(self.tokens_BT)
        labels_BT = self.tokens_BT.clone()
        labels_BT[:, : self.prompt_BT.shape[1]] = -100
        inner = tuned.base_model.model
        texts = {"input_ids": self.tokens_BT, "attention_mask": mask_BT, "labels": labels_BT}

        def encode():
            with torch.no_grad():
                return inner.vision_model(self.image_BCYX)[0]

        def step(loss):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        ways = {"": lambda: step(tuned(pixel_values=self.image_BCYX, **texts).loss)}
        if others:
            cached = encode()
            ways["images under no_grad"] = lambda: step(
                inner.text_decoder(encoder_hidden_states=encode(), **texts).loss
            )
            ways[CACHED] = lambda: step(inner.text_decoder(encoder_hidden_states=cached, **texts).loss)
        return ways

    def writers(self) -> dict:
        """{label: images -> tokens (B, LENGTH)}"""
        import torch

        self.model.eval()
        prompt = torch.cat([self.prompt_BT, self.prompt_BT[:, :1]], dim=1)  # generate removes the last token

        def write(beams):
            options = {"num_beams": beams, "do_sample": False, "max_length": LENGTH, "min_length": LENGTH}
            return self.model.generate(self.image_BCYX, prompt.clone(), torch.ones_like(prompt), **options).numpy()

        return {label: functools.partial(write, beams) for label, beams in BEAMS.items()}


class Jax:
    """jaxpeft as in its own loop: the jitted train_step with donated state; image encoding and decoding are jitted too."""

    def __init__(self, directory, threads: int):
        from jaxpeft.models import loading
        from jaxpeft.runtime import malloc

        malloc.keep_freed_memory()  # as in main.py; where both are in one process, torch benefits from it too
        self.inputs, self.seconds = np.load(directory / "inputs.npz"), {}
        self.model, self.params = loading.load(directory)

    def start_of(self, name: str) -> np.ndarray:
        """What LoRA's A of all layers begins as, on both sides."""
        part = "crossattention" if "cross_attention" in name else "attention"
        return self.inputs[f"{part} {'query' if '/query/' in name else 'value'}"]

    def texts(self) -> dict:
        """What a step reads besides the images."""
        tokens_BT = self.inputs["tokens"]
        scored_BT = np.zeros(tokens_BT.shape, np.float32)  # the last position has no target, as in transformers
        scored_BT[:, self.inputs["prompt"].shape[1] - 1 : -1] = 1.0
        texts = {"tokens": tokens_BT, "targets": np.roll(tokens_BT, -1, axis=1), "weights": scored_BT}
        return {name: x[:, None] for name, x in texts.items()}

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
                flat[name] = jnp.asarray(self.start_of(name))
        variables = tree.unflatten(variables, flat)
        tuned, frozen = tree.split(variables, sites.trainable(variables))
        frozen = stack.apart(self.model.config, frozen)
        self.trained = tree.count(tuned)
        settings = {"lr": LR, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "no_decay": "", "b1": 0.9}
        tx = optim.optimizer(ml_collections.ConfigDict(settings | {"b2": 0.999, "clip_norm": 0.0}), tuned, 1000)
        texts = {name: jnp.asarray(x) for name, x in self.texts().items()}
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

        variables, image_BYXC = (
            stack.apart(self.model.config, {"params": self.params}),
            jnp.asarray(self.inputs["image"]),
        )
        c, limits = self.model.config, {"length": LENGTH, "min_length": LENGTH}
        ids = {"start": tuple(self.inputs["prompt"][0].tolist()), "stop": (c.sep_id,), "pad": c.pad_id}

        def write(beams):
            context = evaluate.contexts(self.model, variables, {"image": image_BYXC})
            search = decode.Search(**ids, n_words=c.vocab_size, beams=beams, **limits)
            if beams == 1:
                return np.asarray(decode.greedy(self.model, variables, context, search)[0])
            return np.asarray(decode.beam_search(self.model, variables, context, search)[0][:, 0])

        return {label: functools.partial(write, beams) for label, beams in BEAMS.items()}


PEERS = {"transformers + peft": Torch, "jaxpeft": Jax}
