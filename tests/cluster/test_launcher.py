import copy
import re
from pathlib import Path

import yaml

FILE = Path(__file__).parents[2] / "ray_config.yaml"


def test_ray_up_accepts_the_launcher_file():
    from ray.autoscaler._private import util

    config = yaml.safe_load(FILE.read_text())
    prepared = util.prepare_config(copy.deepcopy(config))
    util.validate_config(prepared)
    assert prepared["available_node_types"].keys() == config["available_node_types"].keys()


def test_every_node_starts_ray_with_a_token_and_a_named_agent_port():
    config = yaml.safe_load(FILE.read_text())
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [line for line in config[key] if "ray start" in line]
        assert start.startswith("RAY_AUTH_MODE=token ")
        port = int(re.search(r"--dashboard-agent-listen-port=(\d+)", start)[1])
        assert port < 10002, "outside the ports that Ray gives its workers"


def test_the_cluster_scales_to_zero():
    types = yaml.safe_load(FILE.read_text())["available_node_types"]
    assert all(t["min_workers"] == 0 for name, t in types.items() if name != "head")
