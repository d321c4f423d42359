# Images, the small networks that the pipeline trains on them, and latents.

rule images:
    output: f"{plan.images.folder}/shard-{{shard}}-of-{{shards}}.h5"
    log: log_of("images-{shard}-of-{shards}")
    benchmark: time_of("images-{shard}-of-{shards}")
    shell: "haste images -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


rule images_join:
    input: ancient(plan.images.shard_files)
    output: plan.images.manifest
    log: log_of("images-join")
    benchmark: time_of("images-join")
    shell: "haste images -c {CONFIG:q} --join > {log:q} 2>&1"


if plan.autoencoder:

    rule autoencoder:
        input: ancient(plan.images.manifest)
        output: plan.autoencoder.manifest
        log: log_of("autoencoder")
        benchmark: time_of("autoencoder")
        threads: THREADS
        shell: "haste autoencoder -c {CONFIG:q} > {log:q} 2>&1"


rule teacher:
    input: ancient(plan.images.manifest)
    output: f"{plan.root}/parts/teacher-{{key}}/part.json"
    log: log_of("teacher-{key}")
    benchmark: time_of("teacher-{key}")
    threads: THREADS
    params: name=lambda wildcards: next(n for n, t in plan.teachers.items() if t and t.key == wildcards.key)
    shell: "haste teacher {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule detector:
    input: ancient(plan.images.manifest)
    output: plan.detector.manifest
    log: log_of("detector")
    benchmark: time_of("detector")
    threads: THREADS
    shell: "haste detector -c {CONFIG:q} > {log:q} 2>&1"


rule latents:
    input:
        ancient(plan.images.manifest),
        ancient([plan.autoencoder.manifest] if plan.autoencoder else []),
    output: f"{plan.latents.folder}/shard-{{shard}}-of-{{shards}}.h5"
    log: log_of("latents-{shard}-of-{shards}")
    benchmark: time_of("latents-{shard}-of-{shards}")
    threads: THREADS
    shell: "haste latents -c {CONFIG:q} --shard $((10#{wildcards.shard})) > {log:q} 2>&1"


rule latents_join:
    input: ancient(plan.images.manifest), ancient(plan.latents.shard_files)
    output: plan.latents.manifest
    log: log_of("latents-join")
    benchmark: time_of("latents-join")
    shell: "haste latents -c {CONFIG:q} --join > {log:q} 2>&1"
