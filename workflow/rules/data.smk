# Images, the small networks that the pipeline trains on them, and latents.

CHECKED = [plan.checked_images] if plan.checked_images else []
IMAGES = f"{plan.images.folder}/shard-{{shard}}-of-{{shards}}.h5"
LATENTS = f"{plan.latents.folder}/shard-{{shard}}-of-{{shards}}.h5"
TEACHER, DETECTOR, PCA = (f"{plan.root}/parts/{kind}-{{key}}/part.json" for kind in ("teacher", "detector", "pca"))
TARGETS = f"{plan.root}/stores/targets-{{key}}/shard-{{shard}}-of-{{shards}}.h5"
JOINED = f"{plan.root}/stores/targets-{{key}}/manifest.json"

if CHECKED:

    rule images_check:
        output: update(plan.checked_images)
        log: log_of("images-check")
        benchmark: time_of("images-check")
        threads: THREADS
        shell: "haste images -c {CONFIG:q} --check --workers {threads} > {log:q} 2>&1"


rule images:
    input: needed(IMAGES, CHECKED)
    output: update(IMAGES)
    log: log_of("images-{shard}-of-{shards}")
    benchmark: time_of("images-{shard}-of-{shards}")
    threads: THREADS
    shell: "haste images -c {CONFIG:q} --shard $((10#{wildcards.shard})) --workers {threads} > {log:q} 2>&1"


rule images_join:
    input: needed(plan.images.manifest, plan.images.shard_files, CHECKED)
    output: update(plan.images.manifest)
    log: log_of("images-join")
    benchmark: time_of("images-join")
    shell: "haste images -c {CONFIG:q} --join > {log:q} 2>&1"


if plan.autoencoder:

    rule autoencoder:
        input: needed(plan.autoencoder.manifest, plan.images.files)
        output: update(plan.autoencoder.manifest)
        log: log_of("autoencoder")
        benchmark: time_of("autoencoder")
        threads: THREADS
        resources: gpus=1
        shell: "haste autoencoder -c {CONFIG:q} > {log:q} 2>&1"


rule teacher:
    input: needed(TEACHER, plan.images.files)
    output: update(TEACHER)
    log: log_of("teacher-{key}")
    benchmark: time_of("teacher-{key}")
    threads: THREADS
    resources: gpus=1
    params: name=lambda wildcards: next(n for n, t in plan.teachers.items() if t and t.key == wildcards.key)
    shell: "haste teacher {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule detector:
    input: needed(DETECTOR, plan.images.files)
    output: update(DETECTOR)
    log: log_of("detector-{key}")
    benchmark: time_of("detector-{key}")
    threads: THREADS
    resources: gpus=1
    params:
        name=lambda wildcards: next(n for n, d in plan.detectors.items() if d.part and d.part.key == wildcards.key)
    shell: "haste detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule latents:
    input: needed(LATENTS, plan.images.files, plan.autoencoder.files if plan.autoencoder else [])
    output: update(LATENTS)
    log: log_of("latents-{shard}-of-{shards}")
    benchmark: time_of("latents-{shard}-of-{shards}")
    threads: THREADS
    resources: gpus=1
    shell: "haste latents -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


rule latents_join:
    input: needed(plan.latents.manifest, plan.images.files, plan.latents.shard_files)
    output: update(plan.latents.manifest)
    log: log_of("latents-join")
    benchmark: time_of("latents-join")
    shell: "haste latents -c {CONFIG:q} --join > {log:q} 2>&1"


if plan.text:

    TEXT = f"{plan.text.folder}/shard-{{shard}}-of-{{shards}}.h5"

    rule text:
        input: needed(TEXT, plan.images.files)
        output: update(TEXT)
        log: log_of("text-{shard}-of-{shards}")
        benchmark: time_of("text-{shard}-of-{shards}")
        threads: THREADS
        resources: gpus=1
        shell: "haste text -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


    rule text_join:
        input: needed(plan.text.manifest, plan.images.files, plan.text.shard_files)
        output: update(plan.text.manifest)
        log: log_of("text-join")
        benchmark: time_of("text-join")
        shell: "haste text -c {CONFIG:q} --join > {log:q} 2>&1"


# Targets of cached teachers: components if requested, then shards, then the manifest.

def teacher_of(made):
    return lambda wildcards: next(name for name, artefact in made.items() if artefact.key == wildcards.key)

def looks(made, *more):
    """The inputs of what teachers make of images: these, the teacher and more that it uses."""

    def of(wildcards):
        name = teacher_of(made)(wildcards)
        parts = [plan.teachers[name], *(others.get(name) for others in more)]
        return plan.images.files + [path for part in parts if part for path in part.files]

    return of


rule pca:
    input: needed(PCA, looks(plan.pca))
    output: update(PCA)
    log: log_of("pca-{key}")
    benchmark: time_of("pca-{key}")
    threads: THREADS
    resources: gpus=1
    params: name=teacher_of(plan.pca)
    shell: "haste targets {params.name:q} -c {CONFIG:q} --fit > {log:q} 2>&1"


rule targets:
    input: needed(TARGETS, looks(plan.targets, plan.pca))
    output: update(TARGETS)
    log: log_of("targets-{key}-{shard}-of-{shards}")
    benchmark: time_of("targets-{key}-{shard}-of-{shards}")
    threads: THREADS
    resources: gpus=1
    params: name=teacher_of(plan.targets)
    shell: "haste targets {params.name:q} -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


def parts_of(wildcards):
    return plan.targets[teacher_of(plan.targets)(wildcards)].shard_files


rule targets_join:
    input: needed(JOINED, plan.images.files, parts_of)
    output: update(JOINED)
    log: log_of("targets-{key}-join")
    benchmark: time_of("targets-{key}-join")
    params: name=teacher_of(plan.targets)
    shell: "haste targets {params.name:q} -c {CONFIG:q} --join > {log:q} 2>&1"
