"""Makes positions.npz: reference numbers for jaxpeft/inputs/images.py.  Needs torch and transformers; run from this directory.

Inputs come from formulas (see tests/test_images.py), so that the file holds outputs only.  Positions are made in
float64: torch computes the weights in the dtype of the input, and its float32 is off by 3e-6 for values near 1.
"""

import numpy as np
import torch
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

golden = {}
for old, new in ((14, 24), (24, 30), (8, 5), (2, 7), (5, 5), (1, 3)):
    grid_YXD = (np.arange(old * old * 3) ** 2 % 251 / 128 - 1).reshape(old, old, 3)
    grid_1DYX = torch.from_numpy(grid_YXD).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(grid_1DYX, size=(new, new), mode="bicubic", align_corners=False)
    single = torch.nn.functional.interpolate(grid_1DYX.float(), size=(new, new), mode="bicubic", align_corners=False)
    print(old, new, "torch's own float32 against its float64:", float((single - resized).abs().max()))
    golden[f"grid_{old}_{new}"] = resized[0].permute(1, 2, 0).numpy().reshape(new * new, 3)
for rows, columns, size in ((37, 53, 24), (11, 9, 32)):
    image_YXC = (np.arange(rows * columns * 3) ** 2 % 251).astype(np.uint8).reshape(rows, columns, 3)
    processor = BlipImageProcessorPil(size={"height": size, "width": size})
    pixels = processor(image_YXC, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    golden[f"blip_{rows}_{columns}_{size}"] = pixels[0].transpose(1, 2, 0)
np.savez_compressed("positions.npz", **golden)
