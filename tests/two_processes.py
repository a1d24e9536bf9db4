"""Processes that make one run together, as a program for the tests: `python two_processes.py WORKDIR BASE PORT ID N SETTINGS`.

SETTINGS is JSON: changes of the config, by dotted key, and '_kill_at': a step at which process 1 kills itself.
"""

import json
import os
import signal
import sys

import jax
from tiny import config_of

from jaxpeft.runtime import host, signals
from jaxpeft.training import loop, run

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_disable_most_optimizations", True)


def main(workdir, base, port, me, n, settings):
    settings = json.loads(settings)
    kill_at, term_at = settings.pop("_kill_at", 0), settings.pop("_term_at", 0)
    if int(n) > 1:
        assert host.join_others("auto", f"127.0.0.1:{port}", int(n), int(me))
    if int(me) == int(n) - 1:  # the last process: others learn of what happens to it
        settle = loop._Loop._settle

        def then(self, keep=0):
            step = self._pending[0][0] if len(self._pending) > keep else 0
            if step and step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step and step == term_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return settle(self, keep)

        loop._Loop._settle = then
    try:
        with signals.handled():
            run.run(config_of(base, **settings), workdir)
    except (ValueError, loop.NonFinite, KeyboardInterrupt) as error:
        print(f"{type(error).__name__}: {signals.message(error)}", flush=True)
        sys.exit(signals.exit_code(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
