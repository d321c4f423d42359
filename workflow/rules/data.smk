# Images, the small networks that the pipeline trains on them, and latents.

OTHERS = [one.key for made in plan.image_sets[1:] for one in (made.images, made.latents, made.text) if one]  # of `evaluation`
IMAGES = f"{plan.root}/stores/images-{{key}}/shard-{{shard}}-of-{{shards}}.h5"
LATENTS = f"{plan.root}/stores/latents-{{key}}/shard-{{shard}}-of-{{shards}}.h5"
TEXT = f"{plan.root}/stores/text-{{key}}/shard-{{shard}}-of-{{shards}}.h5"
LISTED, ENCODED, SAID = (f"{plan.root}/stores/{kind}-{{key}}/manifest.json" for kind in ("images", "latents", "text"))
TEACHER, DETECTOR, PCA = (f"{plan.root}/parts/{kind}-{{key}}/part.json" for kind in ("teacher", "detector", "pca"))
TARGETS = f"{plan.root}/stores/targets-{{key}}/shard-{{shard}}-of-{{shards}}.h5"
JOINED = f"{plan.root}/stores/targets-{{key}}/manifest.json"

def of_set(wildcards):
    if plan.flipped and wildcards.key == plan.flipped.key: return "--flipped"
    return "--evaluation" if wildcards.key in OTHERS else ""


rule images_check:
    output: update(f"{plan.root}/stores/images-{{key}}/checked.json")
    log: log_of("images-{key}-check")
    benchmark: time_of("images-{key}-check")
    threads: THREADS
    params: of=of_set
    shell: "haste images {params.of} -c {CONFIG:q} --check --workers {threads} > {log:q} 2>&1"


rule images:
    input: needed("images", IMAGES)
    output: update(IMAGES)
    log: log_of("images-{key}-{shard}-of-{shards}")
    benchmark: time_of("images-{key}-{shard}-of-{shards}")
    threads: THREADS
    params: of=of_set
    shell: "haste images {params.of} -c {CONFIG:q} --shard $((10#{wildcards.shard})) --workers {threads} > {log:q} 2>&1"


rule images_join:
    input: needed("images_join", LISTED)
    output: update(LISTED)
    log: log_of("images-{key}-join")
    benchmark: time_of("images-{key}-join")
    params: of=of_set
    shell: "haste images {params.of} -c {CONFIG:q} --join > {log:q} 2>&1"


if plan.autoencoder:

    rule autoencoder:
        input: needed("autoencoder", plan.autoencoder.manifest)
        output: update(plan.autoencoder.manifest)
        log: log_of("autoencoder")
        benchmark: time_of("autoencoder")
        threads: THREADS
        shell: "haste autoencoder -c {CONFIG:q} > {log:q} 2>&1"


rule teacher:
    input: needed("teacher", TEACHER)
    output: update(TEACHER)
    log: log_of("teacher-{key}")
    benchmark: time_of("teacher-{key}")
    threads: THREADS
    params: name=named("teacher", TEACHER)
    shell: "haste teacher {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule detector:
    input: needed("detector", DETECTOR)
    output: update(DETECTOR)
    log: log_of("detector-{key}")
    benchmark: time_of("detector-{key}")
    threads: THREADS
    params: name=named("detector", DETECTOR)
    shell: "haste detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule latents:
    input: needed("latents", LATENTS)
    output: update(LATENTS)
    log: log_of("latents-{key}-{shard}-of-{shards}")
    benchmark: time_of("latents-{key}-{shard}-of-{shards}")
    threads: THREADS
    resources: devices=1
    params: of=of_set
    shell: "haste latents {params.of} -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


rule latents_join:
    input: needed("latents_join", ENCODED)
    output: update(ENCODED)
    log: log_of("latents-{key}-join")
    benchmark: time_of("latents-{key}-join")
    params: of=of_set
    shell: "haste latents {params.of} -c {CONFIG:q} --join > {log:q} 2>&1"


if plan.text_encoder:

    rule text_encoder:
        input: needed("text_encoder", plan.text_encoder.manifest)
        output: update(plan.text_encoder.manifest)
        log: log_of("text_encoder")
        benchmark: time_of("text_encoder")
        threads: THREADS
        shell: "haste text-encoder -c {CONFIG:q} > {log:q} 2>&1"


rule text:
    input: needed("text", TEXT)
    output: update(TEXT)
    log: log_of("text-{key}-{shard}-of-{shards}")
    benchmark: time_of("text-{key}-{shard}-of-{shards}")
    threads: THREADS
    resources: devices=1
    params: of=of_set
    shell: "haste text {params.of} -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


rule text_join:
    input: needed("text_join", SAID)
    output: update(SAID)
    log: log_of("text-{key}-join")
    benchmark: time_of("text-{key}-join")
    params: of=of_set
    shell: "haste text {params.of} -c {CONFIG:q} --join > {log:q} 2>&1"


# Targets of cached teachers: components if requested, then shards, then the manifest.

rule pca:
    input: needed("pca", PCA)
    output: update(PCA)
    log: log_of("pca-{key}")
    benchmark: time_of("pca-{key}")
    threads: THREADS
    resources: devices=1
    params: name=named("pca", PCA)
    shell: "haste targets {params.name:q} -c {CONFIG:q} --fit > {log:q} 2>&1"


rule targets:
    input: needed("targets", TARGETS)
    output: update(TARGETS)
    log: log_of("targets-{key}-{shard}-of-{shards}")
    benchmark: time_of("targets-{key}-{shard}-of-{shards}")
    threads: THREADS
    resources: devices=1
    params: name=named("targets", TARGETS)
    shell: "haste targets {params.name:q} -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


rule targets_join:
    input: needed("targets_join", JOINED)
    output: update(JOINED)
    log: log_of("targets-{key}-join")
    benchmark: time_of("targets-{key}-join")
    params: name=named("targets_join", JOINED)
    shell: "haste targets {params.name:q} -c {CONFIG:q} --join > {log:q} 2>&1"
