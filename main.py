"""The program in a clone: `python main.py --config=configs/quickstart.py --workdir=DIR` is `jaxpeft run`.

    python main.py --config=configs/folder.py:root=pics,base=Salesforce/blip-image-captioning-base --workdir=runs/mine

tunes a BLIP of the Hugging Face hub on your own pictures; `base=DIR` is one on disk, `base=tiny` the shipped one. The head of
each file in configs/ says what it does and what it takes.
"""

import sys

from jaxpeft import cli

if __name__ == "__main__":
    cli.main(["run", *sys.argv[1:]])
