"""One process of several that run stages one after another: together_driver.py SETTINGS, a JSON object.

{processes, index, port, workdir, stages: [[name of a config, {field: value}], ...]}. An export's files hold at most
SHARD_BYTES, so that there are several. Prints {stage: ids of what this process graded in it}.
"""

import functools
import json
import pathlib
import sys

from r1jax import config as configs
from r1jax import stage_table
from r1jax.checkpoints import hf_export
from r1jax.core import hosts
from r1jax.core.errors import one_line
from r1jax.rewards.pool import RewardPool

HEARTBEAT_S = 20.0
SHARD_BYTES = 20_000


def run(settings: dict) -> dict:
    graded: list[str] = []
    begin = RewardPool.begin

    def noting(pool, requests):
        graded.extend(request.id for request in requests)
        return begin(pool, requests)

    RewardPool.begin = noting
    hf_export.save = functools.partial(hf_export.save, shard_bytes=SHARD_BYTES)
    found = {}
    for name, fields in settings["stages"]:
        config = configs.load(name, [(field, str(value)) for field, value in fields.items()])
        stage_table.check(config, fields)
        graded.clear()
        stage_table.function(config.stage)(config, pathlib.Path(settings["workdir"]))
        found[config.stage] = sorted(set(graded))
    return found


def main(settings: dict) -> None:
    if settings["processes"] > 1:
        hosts.start(f"127.0.0.1:{settings['port']}", settings["processes"], settings["index"], HEARTBEAT_S)
    try:
        found = run(settings)
        hosts.stop()
    except Exception as error:
        hosts.await_verdict(error)
        print(f"error: {one_line(error, 2000)}", file=sys.stderr)
        hosts.fail(error, 1)
        raise
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
