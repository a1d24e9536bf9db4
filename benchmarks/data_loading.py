"""Images per second, decoded, augmented as in BLIP and batched: jaxpeft's loader and a torch DataLoader, in one run.

    python benchmarks/data_loading.py --out results/data_loading.json
    python benchmarks/data_loading.py --parts --out results/data_loading_parts.json    # only the parts

Both read the same JPEG files (640 x 480, like COCO's) from memory, decode them with Pillow, and call the same crop, flip,
resize and RandAugment. So the comparison is between grain's threads in this process, grain's processes, and torch's worker
processes. The parts are also timed alone, on one thread.

Images of evaluation and of tables of frozen stages are only decoded and resized. 'in turn, arrays' is how they were read
before: between batches, in the main thread, through arrays.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import grain
import numpy as np
from absl import app
from PIL import Image

from jaxpeft.data import base, pipeline
from jaxpeft.data.randaugment import randaugment
from jaxpeft.inputs import images
from jaxpeft.runtime import host

N, BATCH = 256, 32


def jpegs(n=N, width=640, height=480):
    """Photograph-like images: smooth shapes and texture, quality 90; of 640 x 480, 70 to 150 KB, like COCO's."""
    files = []
    for i in range(n):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)).resize(
            (width, height), Image.BICUBIC
        )
        noisy = np.asarray(coarse).astype(np.int16) + rng.normal(0, 12, (height, width, 3)).astype(np.int16)
        out = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


class Decoded:
    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return images.decode(self.files[i])


class Kept(Decoded):
    """As data sets of files: images stay Pillow's until they are resized."""

    def opened(self, i):
        return images.opened(self.files[i])


def rate(batches, n_batches, warm=2):
    """Images per second over `n_batches`, after `warm` batches."""
    stream = iter(batches)
    for _ in range(warm):
        next(stream)
    began = time.perf_counter()
    for _ in range(n_batches):
        next(stream)
    return n_batches * BATCH / (time.perf_counter() - began)


def examples_of(files, size, kind=Kept, n=0):
    """Examples of n images, by default of every file once."""
    index = np.arange(n or len(files)) % len(files)
    return base.Examples({"image_index": index}, pipeline.Resized(kind(files), size, cache_bytes=0), [])


def ours(files, size, threads, kind=Kept):
    return pipeline.batches(examples_of(files, size, kind), BATCH, seed=0, augment="blip", threads=threads)


def evaluation(files, size, threads, kind=Kept):
    """Batches of evaluation; 0 threads: made when they are asked for."""
    examples = examples_of(files, size, kind, n=1 << 14)
    if threads:
        return pipeline.one_pass(examples, BATCH, threads=threads)
    return (pipeline.gather(examples, np.arange(i, i + BATCH)) for i in range(0, len(examples), BATCH))


def in_processes(files, size, workers):
    """jaxpeft's batches, made by grain's worker processes."""
    examples = examples_of(files, size)
    order = grain.MapDataset.range(len(files)).seed(0).shuffle().repeat().batch(BATCH)

    def make(indices, rng):
        return pipeline.gather(examples, indices, "blip", rng.integers(2**63, size=len(indices)))["image"]

    made = order.seed(1).random_map(make)
    stream = made.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))


class TorchData:
    """A map-style dataset that does the same work."""

    def __init__(self, files, size):
        self.resized = pipeline.Resized(Kept(files), size, cache_bytes=0)

    def __len__(self):
        return 1 << 20

    def __getitem__(self, i):
        i, seed = i % len(self.resized), i
        return self.resized.augmented(i, "blip", np.random.default_rng(seed))


def torch_batches(files, size, workers):
    import torch

    def stack(pictures):
        return torch.from_numpy(np.stack(pictures))

    return torch.utils.data.DataLoader(
        TorchData(files, size), BATCH, num_workers=workers, collate_fn=stack, shuffle=False,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip


def parts(files, size, rounds=7):
    """CPU milliseconds per image of each part: the least of `rounds`, in turns, averaged over images."""
    files = files[:64]
    kept = [images.opened(file) for file in files]
    arrays = [np.array(one) for one in kept]
    box, square = (40, 30, 560, 440), (size, size)

    def augment(one):
        return images.resize(images.cropped(one, np.random.default_rng(0)), size)

    cropped = [augment(one) for one in kept]

    ways = {
        "decode": (images.opened, files),
        "decode to an array": (images.decode, files),
        "crop, flip, resize": (augment, kept),
        "crop, flip, resize of an array": (augment, arrays),
        "crop, then resize": (lambda x: x.crop(box).resize(square, images.BICUBIC), kept),
        "resize(box=)": (lambda x: x.resize(square, images.BICUBIC, box=box), kept),
        "RandAugment": (lambda x: randaugment(x[1], np.random.default_rng(x[0])), list(enumerate(cropped))),
        "resize only": (lambda x: images.resize(x, size), kept),
        "resize only, of an array": (lambda x: images.resize(x, size), arrays),
    }
    try:
        import simplejpeg

        ways["decode by simplejpeg"] = lambda x: Image.fromarray(simplejpeg.decode_jpeg(x)), files
        ways["decode by simplejpeg to an array"] = simplejpeg.decode_jpeg, files
        same = {
            "simplejpeg has the same pixels": all(
                np.array_equal(simplejpeg.decode_jpeg(file), array) for file, array in zip(files, arrays, strict=True)
            )
        }
    except ImportError:
        print("simplejpeg is not installed: its rows are left out")
        same = {}
    return timed(ways, rounds) | same


def photos(size, rounds=7):
    """`parts` of photos of 12 megapixels, decoded at their size and at less."""
    files, said = jpegs(8, 4000, 3000), {}
    kept = {edge: [images.opened(file, jpeg_edge=edge) for file in files] for edge in (0, 2 * size, size)}
    pixels = {edge: np.stack([images.resize(x, size) for x in some]).astype(int) for edge, some in kept.items()}
    ways = {}
    for edge, some in kept.items():
        name = f"photo, jpeg_edge={edge or None}: "
        ways[name + "decode"] = (lambda x, edge=edge: images.opened(x, jpeg_edge=edge)), files
        ways[name + "resize only"] = (lambda x: images.resize(x, size)), some
        differs = np.abs(pixels[edge] - pixels[0])
        said[name + "size"] = some[0].size
        said[name + "pixels differ by, mean and 99.9 %, of 255"] = [
            round(float(differs.mean()), 2), float(np.quantile(differs, 0.999)),
        ]  # fmt: skip
    try:
        import simplejpeg

        for edge in kept:
            least = {"min_width": edge, "min_height": edge, "min_factor": 1} if edge else {}
            ways[f"photo, jpeg_edge={edge or None}: decode by simplejpeg"] = (
                lambda x, least=least: Image.fromarray(simplejpeg.decode_jpeg(x, **least)), files,
            )  # fmt: skip
    except ImportError:
        pass
    return timed(ways, rounds) | said


def timed(ways, rounds):
    """{way: CPU milliseconds per image}: the least of `rounds`, in turns, averaged over images."""
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for i in range(min(len(inputs) for _, inputs in ways.values())):
            for name, (function, inputs) in ways.items():
                began = time.process_time()
                function(inputs[i])
                times[name].append(time.process_time() - began)
    least = {name: np.reshape(spent, (rounds, -1)).min(axis=0) for name, spent in times.items()}
    return {name: round(1000 * float(spent.mean()), 2) for name, spent in least.items()}


def ways_of(files, cores, size):
    """{way of reading: a function that starts it}"""
    ways = {f"jaxpeft, {n} threads": lambda n=n: ours(files, size, n) for n in sorted({1, 2, cores, 2 * cores})}
    ways["jaxpeft, 1 threads, arrays"] = lambda: ours(files, size, 1, Decoded)
    ways |= {f"evaluation, {n} threads": lambda n=n: evaluation(files, size, n) for n in sorted({1, cores, 2 * cores})}
    ways["evaluation, in turn"] = lambda: evaluation(files, size, 0)
    ways["evaluation, in turn, arrays"] = lambda: evaluation(files, size, 0, Decoded)
    ways |= {f"jaxpeft, {n} grain processes": lambda n=n: in_processes(files, size, n) for n in (1, cores)}
    try:
        import torch

        torch.set_num_threads(1)
        ways |= {f"torch DataLoader, {n} workers": lambda n=n: torch_batches(files, size, n) for n in (0, 1, cores)}
    except ImportError:
        print("torch is not installed: its rows are left out")
    return ways


def main(_):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", action="store_true", help="time only the parts of reading an image")
    args, _ = parser.parse_known_args()
    files, cores = jpegs(64 if args.parts else N), len(os.sched_getaffinity(0))
    ways = {} if args.parts else ways_of(files, cores, args.size)
    found = {name: [] for name in ways}
    for turn in range(args.rounds):  # in turns, so that a slow minute of the machine affects all of them
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(rate(ways[name](), args.batches))
    rates = {
        name: {"median": round(statistics.median(v), 1), "range": [round(min(v), 1), round(max(v), 1)]}
        for name, v in found.items()
    }
    report = {
        "command": "python benchmarks/data_loading.py " + " ".join(sys.argv[1:]),
        "cores": cores,
        "pictures": f"{len(files)} JPEG files of 640 x 480, {sum(map(len, files)) // len(files) // 1000} KB each",
        "size": args.size,
        "batch": BATCH,
        "CPU ms per picture on one thread": parts(files, args.size) | photos(args.size),
        "pictures per second": rates,
        "machine": host.machine(),
        "versions": host.versions(),
    }
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    for name, one in report["pictures per second"].items():
        print(f"{name:<32} {one['median']:>7} pictures/s  ({one['range'][0]} to {one['range'][1]})")
    print(report["CPU ms per picture on one thread"])


if __name__ == "__main__":
    multiprocessing.freeze_support()
    app.run(main, argv=sys.argv[:1])  # grain's workers read their flags from absl
