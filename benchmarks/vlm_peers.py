"""The two sides of vlm_large.py's SmolVLM section, each written as its users would write it; see peers.py.

Both start from the same directory: a transformers SmolVLM and inputs.npz. Neither class imports the framework of the other.
"""

import numpy as np
import peers
import reference
from peers import CACHED, LENGTH

BATCH = 2
IMAGE, END, PAD = 49190, 49279, 2  # ids of <image> in the released models, of <end_of_utterance>, of padding
N_IMAGE = 64  # image tokens


class Torch(peers.Torch):
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

    def start_of(self, name: str) -> np.ndarray:
        layer, _, part = name.split(".layers.")[1].split(".")[:3]
        return self.inputs[part][int(layer)]

    def steps(self, others: bool = True) -> dict:
        import torch

        tuned, optimizer = self.lora(r".*text_model.*\.(q_proj|v_proj)")
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
        self.model.eval()
        inputs = {"pixel_values": self.pixels, "input_ids": self.prompt_BQ}
        options = {"do_sample": False, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
        options |= {"eos_token_id": END, "pad_token_id": PAD}

        def write():
            return self.model.generate(**inputs, **options).numpy()[:, -LENGTH:]

        return {"greedy": write}


class Jax(peers.Jax):
    """jaxpeft as in its own loop."""

    def start_of(self, name: str) -> np.ndarray:
        return self.inputs["q_proj" if "/query/" in name else "v_proj"]

    def texts(self) -> dict:
        targets_BT = self.inputs["text"]
        texts = {"tokens": np.pad(targets_BT[:, :-1], ((0, 0), (1, 0))), "targets": targets_BT}
        texts |= {"weights": np.ones(targets_BT.shape, np.float32)}
        return {name: x[:, None] for name, x in texts.items()} | {"prompt": self.inputs["prompt"]}

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
