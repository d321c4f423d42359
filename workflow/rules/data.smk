# Images, the small networks that the pipeline trains on them, and latents.
from pathlib import Path

from snakemake.persistence import FileBackupMixin

# Writes are atomic. Snakemake's copies of update() outputs would fill the disk, and are put back in place, not atomically.
FileBackupMixin.backup_output, FileBackupMixin.restore_output = lambda *_: None, lambda *_: True
import os
import sys

# Jobs find `haste` beside the Python that runs Snakemake, also where nobody activated its environment.
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}"

if plan.checked_images:

    rule images_check:
        output: update(plan.checked_images)
        log: log_of("images-check")
        benchmark: time_of("images-check")
        threads: THREADS
        shell: "haste images -c {CONFIG:q} --check --workers {threads} > {log:q} 2>&1"


rule images:
    input: ancient([plan.checked_images] if plan.checked_images else [])
    output: update(f"{plan.images.folder}/shard-{{shard}}-of-{{shards}}.h5")
    log: log_of("images-{shard}-of-{shards}")
    benchmark: time_of("images-{shard}-of-{shards}")
    threads: THREADS
    shell: "haste images -c {CONFIG:q} --shard $((10#{wildcards.shard})) --workers {threads} > {log:q} 2>&1"


rule images_join:
    input: ancient(plan.images.shard_files), ancient([plan.checked_images] if plan.checked_images else [])
    output: update(plan.images.manifest)
    log: log_of("images-join")
    benchmark: time_of("images-join")
    shell: "haste images -c {CONFIG:q} --join > {log:q} 2>&1"


if plan.autoencoder:

    rule autoencoder:
        input: ancient(plan.images.manifest)
        output: update(plan.autoencoder.manifest)
        log: log_of("autoencoder")
        benchmark: time_of("autoencoder")
        threads: THREADS
        shell: "haste autoencoder -c {CONFIG:q} > {log:q} 2>&1"


rule teacher:
    input: ancient(plan.images.manifest)
    output: update(f"{plan.root}/parts/teacher-{{key}}/part.json")
    log: log_of("teacher-{key}")
    benchmark: time_of("teacher-{key}")
    threads: THREADS
    params: name=lambda wildcards: next(n for n, t in plan.teachers.items() if t and t.key == wildcards.key)
    shell: "haste teacher {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule detector:
    input: ancient(plan.images.manifest)
    output: update(f"{plan.root}/parts/detector-{{key}}/part.json")
    log: log_of("detector-{key}")
    benchmark: time_of("detector-{key}")
    threads: THREADS
    params:
        name=lambda wildcards: next(n for n, d in plan.detectors.items() if d.part and d.part.key == wildcards.key)
    shell: "haste detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


# A finished store needs its encoder no more: one that is made again, for new samples, is no reason to encode again.
ENCODED = Path(plan.latents.manifest).exists()

rule latents:
    input:
        ancient(plan.images.manifest),
        ancient([plan.autoencoder.manifest] if plan.autoencoder and not ENCODED else []),
    output: update(f"{plan.latents.folder}/shard-{{shard}}-of-{{shards}}.h5")
    log: log_of("latents-{shard}-of-{shards}")
    benchmark: time_of("latents-{shard}-of-{shards}")
    threads: THREADS
    shell: "haste latents -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


rule latents_join:
    input: ancient(plan.images.manifest), ancient(plan.latents.shard_files)
    output: update(plan.latents.manifest)
    log: log_of("latents-join")
    benchmark: time_of("latents-join")
    shell: "haste latents -c {CONFIG:q} --join > {log:q} 2>&1"


# Targets of cached teachers: components if requested, then shards, then the manifest.

def teacher_of(made):
    return lambda wildcards: next(name for name, artefact in made.items() if artefact.key == wildcards.key)

def looks(wildcards):
    """The inputs of a teacher's targets: the images, the teacher and its components."""
    name = teacher_of(plan.targets)(wildcards)
    parts = [part for part in (plan.teachers[name], plan.pca.get(name)) if part]
    return [plan.images.manifest, *(part.manifest for part in parts)]


rule pca:
    input:
        ancient(plan.images.manifest),
        ancient(lambda wildcards: [p.manifest for p in [plan.teachers[teacher_of(plan.pca)(wildcards)]] if p]),
    output: update(f"{plan.root}/parts/pca-{{key}}/part.json")
    log: log_of("pca-{key}")
    benchmark: time_of("pca-{key}")
    threads: THREADS
    params: name=teacher_of(plan.pca)
    shell: "haste targets {params.name:q} -c {CONFIG:q} --fit > {log:q} 2>&1"


rule targets:
    input: ancient(looks)
    output: update(f"{plan.root}/stores/targets-{{key}}/shard-{{shard}}-of-{{shards}}.h5")
    log: log_of("targets-{key}-{shard}-of-{shards}")
    benchmark: time_of("targets-{key}-{shard}-of-{shards}")
    threads: THREADS
    params: name=teacher_of(plan.targets)
    shell: "haste targets {params.name:q} -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


rule targets_join:
    input: ancient(plan.images.manifest), ancient(lambda wildcards: plan.targets[teacher_of(plan.targets)(wildcards)].shard_files)
    output: update(f"{plan.root}/stores/targets-{{key}}/manifest.json")
    log: log_of("targets-{key}-join")
    benchmark: time_of("targets-{key}-join")
    params: name=teacher_of(plan.targets)
    shell: "haste targets {params.name:q} -c {CONFIG:q} --join > {log:q} 2>&1"
