# What all rules use.
import os
import sys

from snakemake.persistence import FileBackupMixin

from haste.cluster import gpus

# Writes are atomic. Snakemake's copies of update() outputs would fill the disk, and are put back in place, not atomically.
FileBackupMixin.backup_output, FileBackupMixin.restore_output = lambda *_: None, lambda *_: True

# Jobs find `haste` beside the Python that runs Snakemake, also where nobody activated its environment.
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}"


ALONE = HERE and workflow.resource_settings.nodes is None  # jobs run on this machine
WITH_GPUS = ALONE and plan.config.runtime.device != "cpu" and bool(gpus.visible())

# CPUs compute faster with large pages of memory, for which glibc asks if it is told to before a process starts.
if ALONE and not WITH_GPUS:
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


# Jobs that compute ask for `devices`, GPUs, which Snakemake counts where it runs them itself: as many as there are, unless
# --resources devices=N says otherwise. On a cluster, and without GPUs, there is no limit. What SLURM's executors know as
# `gpu` and `gpus` they would ask for, beside what the profile says.
if WITH_GPUS:
    os.environ[gpus.SHARING] = "1"
    if "devices" not in workflow.global_resources:
        workflow.register_resource("devices", len(gpus.visible()) * plan.config.runtime.jobs_per_gpu)


def log_of(job): return f"{plan.folder}/logs/{job}.log"


def time_of(job): return f"{plan.folder}/benchmarks/{job}.tsv"


def job(rule, pattern):
    """The job of a rule (haste/plan/jobs.py) with a rule's wildcards in the name of its first file."""
    return lambda wildcards: plan.jobs.of(rule, pattern.format(**dict(wildcards.items())))


def needed(rule, pattern):
    """The inputs of a job: none if its outputs are there."""
    of = job(rule, pattern)
    return ancient(lambda wildcards: of(wildcards).waits_for)


def named(rule, pattern):
    """What a job's command calls what it makes."""
    of = job(rule, pattern)
    return lambda wildcards: of(wildcards).name
