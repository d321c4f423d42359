# Images, the small networks that the pipeline trains on them, and latents.

SETS = {made.key: one for one in plan.image_sets for made in (one.images, one.latents, one.text) if made}
OTHERS = [key for key, one in SETS.items() if one is not plan]  # of `evaluation`
IMAGES = f"{plan.root}/stores/images-{{key}}/shard-{{shard}}-of-{{shards}}.h5"
LATENTS = f"{plan.root}/stores/latents-{{key}}/shard-{{shard}}-of-{{shards}}.h5"
TEXT = f"{plan.root}/stores/text-{{key}}/shard-{{shard}}-of-{{shards}}.h5"
LISTED, ENCODED, SAID = (f"{plan.root}/stores/{kind}-{{key}}/manifest.json" for kind in ("images", "latents", "text"))
TEACHER, DETECTOR, PCA = (f"{plan.root}/parts/{kind}-{{key}}/part.json" for kind in ("teacher", "detector", "pca"))
TARGETS = f"{plan.root}/stores/targets-{{key}}/shard-{{shard}}-of-{{shards}}.h5"
JOINED = f"{plan.root}/stores/targets-{{key}}/manifest.json"

def of_set(wildcards): return "--evaluation" if wildcards.key in OTHERS else ""

def checked(wildcards):
    found = SETS[wildcards.key].checked_images
    return [found] if found else []


rule images_check:
    output: update(f"{plan.root}/stores/images-{{key}}/checked.json")
    log: log_of("images-{key}-check")
    benchmark: time_of("images-{key}-check")
    threads: THREADS
    params: of=of_set
    shell: "haste images {params.of} -c {CONFIG:q} --check --workers {threads} > {log:q} 2>&1"


rule images:
    input: needed(IMAGES, checked)
    output: update(IMAGES)
    log: log_of("images-{key}-{shard}-of-{shards}")
    benchmark: time_of("images-{key}-{shard}-of-{shards}")
    threads: THREADS
    params: of=of_set
    shell: "haste images {params.of} -c {CONFIG:q} --shard $((10#{wildcards.shard})) --workers {threads} > {log:q} 2>&1"


rule images_join:
    input: needed(LISTED, lambda wildcards: SETS[wildcards.key].images.shard_files, checked)
    output: update(LISTED)
    log: log_of("images-{key}-join")
    benchmark: time_of("images-{key}-join")
    params: of=of_set
    shell: "haste images {params.of} -c {CONFIG:q} --join > {log:q} 2>&1"


if plan.autoencoder:

    rule autoencoder:
        input: needed(plan.autoencoder.manifest, plan.images.files)
        output: update(plan.autoencoder.manifest)
        log: log_of("autoencoder")
        benchmark: time_of("autoencoder")
        threads: THREADS
        resources: devices=1
        shell: "haste autoencoder -c {CONFIG:q} > {log:q} 2>&1"


rule teacher:
    input: needed(TEACHER, plan.images.files)
    output: update(TEACHER)
    log: log_of("teacher-{key}")
    benchmark: time_of("teacher-{key}")
    threads: THREADS
    resources: devices=1
    params: name=lambda wildcards: next(n for n, t in plan.teachers.items() if t and t.key == wildcards.key)
    shell: "haste teacher {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule detector:
    input: needed(DETECTOR, plan.images.files)
    output: update(DETECTOR)
    log: log_of("detector-{key}")
    benchmark: time_of("detector-{key}")
    threads: THREADS
    resources: devices=1
    params:
        name=lambda wildcards: next(n for n, d in plan.detectors.items() if d.part and d.part.key == wildcards.key)
    shell: "haste detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


def encoded_from(wildcards):
    return [*SETS[wildcards.key].images.files, *(plan.autoencoder.files if plan.autoencoder else [])]


rule latents:
    input: needed(LATENTS, encoded_from)
    output: update(LATENTS)
    log: log_of("latents-{key}-{shard}-of-{shards}")
    benchmark: time_of("latents-{key}-{shard}-of-{shards}")
    threads: THREADS
    resources: devices=1
    params: of=of_set
    shell: "haste latents {params.of} -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


rule latents_join:
    input: needed(ENCODED, lambda wildcards: [*SETS[wildcards.key].images.files, *SETS[wildcards.key].latents.shard_files])
    output: update(ENCODED)
    log: log_of("latents-{key}-join")
    benchmark: time_of("latents-{key}-join")
    params: of=of_set
    shell: "haste latents {params.of} -c {CONFIG:q} --join > {log:q} 2>&1"


rule text:
    input: needed(TEXT, lambda wildcards: SETS[wildcards.key].images.files)
    output: update(TEXT)
    log: log_of("text-{key}-{shard}-of-{shards}")
    benchmark: time_of("text-{key}-{shard}-of-{shards}")
    threads: THREADS
    resources: devices=1
    params: of=of_set
    shell: "haste text {params.of} -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


rule text_join:
    input: needed(SAID, lambda wildcards: [*SETS[wildcards.key].images.files, *SETS[wildcards.key].text.shard_files])
    output: update(SAID)
    log: log_of("text-{key}-join")
    benchmark: time_of("text-{key}-join")
    params: of=of_set
    shell: "haste text {params.of} -c {CONFIG:q} --join > {log:q} 2>&1"


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
    resources: devices=1
    params: name=teacher_of(plan.pca)
    shell: "haste targets {params.name:q} -c {CONFIG:q} --fit > {log:q} 2>&1"


rule targets:
    input: needed(TARGETS, looks(plan.targets, plan.pca))
    output: update(TARGETS)
    log: log_of("targets-{key}-{shard}-of-{shards}")
    benchmark: time_of("targets-{key}-{shard}-of-{shards}")
    threads: THREADS
    resources: devices=1
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
