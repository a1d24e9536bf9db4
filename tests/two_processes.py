"""Processes that make one run together, as a program for the tests: `python two_processes.py WORKDIR BASE PORT ID N SETTINGS`.

SETTINGS is JSON: changes of the config, by dotted key, and what happens to the last process when it comes to log a step:
'_kill_at' (SIGKILL) and '_term_at' (SIGTERM). Its clock stands still, as only the first host's may matter.
"""

import json
import os
import signal
import sys

import jax
from tiny import config_of

from jaxpeft.runtime import host, signals
from jaxpeft.training import loop, results, run

jax.config.update("jax_num_cpu_devices", 2)


def main(workdir, base, port, me, n, settings):
    settings = json.loads(settings)
    kill_at, term_at = settings.pop("_kill_at", 0), settings.pop("_term_at", 0)
    if int(n) > 1:
        assert host.join_others("auto", f"127.0.0.1:{port}", int(n), int(me))
    if int(me) == int(n) - 1:  # the last process: others learn of what happens to it
        write = results.Metrics.write

        def then(self, step, **values):
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == term_at:
                os.kill(os.getpid(), signal.SIGTERM)
            write(self, step, **values)

        results.Metrics.write = then
        if int(n) > 1:
            loop.clock = lambda: 0.0
    loop.PAUSE = 0  # so that checkpoint_seconds alone decides
    try:
        with signals.handled():
            run.run(config_of(base, **settings), workdir)
    except (ValueError, loop.NonFinite, KeyboardInterrupt) as error:
        print(f"{type(error).__name__}: {signals.message(error)}", flush=True)
        sys.exit(signals.exit_code(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
