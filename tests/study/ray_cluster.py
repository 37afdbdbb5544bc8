"""Run as a program: a study on a local Ray cluster of two nodes, one of which is killed in the middle."""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

from hf_imgproc_attn.study.driver import Job, Outcome, run_study
from hf_imgproc_attn.study.ledger import Ledger
from hf_imgproc_attn.study.ray_engine import RayTasks
from hf_imgproc_attn.study.study_file import read_study

if __name__ == "__main__":
    study, ledger = read_study(sys.argv[1]), Ledger(sys.argv[2])
    memory = 80 * 2**20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": memory},
    )
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=memory) for _ in range(2)]
    finished: list[str] = []

    class Killing(RayTasks):
        """Kills a node when the first run has ended: its neighbour is in the middle of one."""

        def _outcome(self, ray: object, reference: object, job: Job) -> Outcome:
            outcome = super()._outcome(ray, reference, job)
            finished.append(job.run.name)
            if len(finished) == 1:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
            return outcome

    _, progress = run_study(study, ledger, Killing(study, ledger, cluster.address, 1, 0), say=lambda line: None)
    cluster.shutdown()
    print(json.dumps({"finished": finished, "errors": progress.errors, "left": len(nodes)}))
