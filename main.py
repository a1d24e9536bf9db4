"""The program: `python main.py --config=configs/quickstart.py --workdir=DIR`. Everything it does is in `jaxpeft`."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from jaxpeft import host, point, pretrain

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(arg), as file.py or file.py:key=value,..."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where results and checkpoints of this run go; reuse it to resume.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are --config.key=value")
    host.keep_freed_memory()
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save

    try:
        (pretrain if "pretrain" in CONFIG.value else point).run(CONFIG.value, WORKDIR.value)
    except ValueError as error:  # a mistake in config, data or checkpoint: the message is for the user
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
