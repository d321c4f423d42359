# A state from the previous state. Every edge is ancient(): nothing is ever trained again because a file was touched.
import re

from haste.cluster import check, queue

# Asked before Snakemake looks at the files: a job that ends in between has made its files, or is known to have lived.
LEFT = queue.left(plan) if HERE else {}


def on_cluster(wildcards, resources):
    """With nodes in the profile, training is a cluster job: this rule submits it or attaches to it, and waits."""
    if "nodes" not in resources.keys():
        if workflow.remote_exec:
            raise WorkflowError("The profile gives rule train no nodes: it would train where Snakemake runs.")
        return []
    ours = (name for name in resources.keys() if not name.startswith("_") and name not in SNAKEMAKES_OWN)
    return ["--terminal=3", "--slurm", *(f"{name}={resources[name]}" for name in ours)]


def ask_the_cluster():
    """Check, before the first job, whether there are GPUs for training and it fits into them; and, before anything is
    submitted, whether SLURM would accept it, and whether all of it at once."""
    trained = [job for job in workflow.dag.needrun_jobs() if job.rule.name.startswith("train")]
    made = [State(job.wildcards.trajectory, int(job.wildcards.step)) for job in trained]
    training = [(state, dict(job.resources.items())) for state, job in zip(made, trained)]
    check.check_gpus(plan, training)
    check.check_memory(plan, training)
    if workflow.executor_plugin.name != "slurm":
        return
    from haste.cluster import executor

    jobs = [job for job in workflow.dag.needrun_jobs() if job.rule.name.startswith("train") or not job.is_local]
    check.check_place(plan.root)
    asked = [(job.rule.name, dict(job.resources.items())) for job in jobs]
    for doubt in check.check(asked):
        logger.warning(doubt)
    own = workflow.scheduler._executor
    executor.take_over(own, plan, LEFT, check.too_many(asked, own.max_array_size))


# A job may wait for hours behind others, and meanwhile a cluster job that an earlier Snakemake submitted may finish its
# state. Snakemake removes a job's outputs before it runs the job, unless they are marked update().
# Whether a segment aligns depends on its trajectory: two rules, so that a profile can request different resources.
ALIGNED, PLAIN = ("|".join(map(re.escape, plan.trained(aligned))) or "(?!)" for aligned in (True, False))
SNAKEMAKES_OWN = {"tmpdir", "disk_mb", "disk_mib", "mem_mib", "disk", "mem", "devices"}


STATE = f"{plan.root}/states/{{trajectory}}/step-{{step}}.safetensors"

rule train:
    input: needed("train", STATE)
    output: update(STATE)
    log: log_of("train-{trajectory}-{step}")
    benchmark: time_of("train-{trajectory}-{step}")
    wildcard_constraints: trajectory=ALIGNED
    threads: TRAIN_THREADS
    resources: devices=plan.config.runtime.processes
    priority: 10  # what others wait for goes first
    retries: 0  # the job retries by itself; and a job that a user cancelled must not be resubmitted
    params: cluster=on_cluster
    # messages for the terminal go to descriptor 3, past the log
    shell: "haste train {wildcards.trajectory:q}/{wildcards.step} -c {CONFIG:q} {params.cluster:q} 3>&2 > {log:q} 2>&1"


use rule train as train_plain with:
    wildcard_constraints: trajectory=PLAIN


localrules: train, train_plain
