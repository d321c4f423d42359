# Samples and their features in one job, then their scores. States are ancient() here too: their names say what they are.


def drawn(wildcards):
    return plan.evaluations[wildcards.draw]


rule reference:
    input: ancient(plan.images.manifest), ancient(plan.detector.manifest)
    output: plan.reference.manifest
    log: log_of("reference")
    benchmark: time_of("reference")
    threads: THREADS
    shell: "haste reference -c {CONFIG:q} > {log:q} 2>&1"


rule sample:
    input:
        ancient(lambda wildcards: plan.drawn_from(drawn(wildcards))),
        ancient([plan.detector.manifest]),
    output:
        samples=f"{plan.root}/samples/{{draw}}/shard-{{shard}}-of-{{shards}}.npz",
        features=f"{plan.root}/features/{{draw}}/detector-{plan.detector.key}/shard-{{shard}}-of-{{shards}}.h5",
    log: log_of("sample-{draw}-{shard}-of-{shards}")
    benchmark: time_of("sample-{draw}-{shard}-of-{shards}")
    threads: THREADS
    shell: "haste sample {wildcards.draw:q} --shard $((10#{wildcards.shard})) -c {CONFIG:q} > {log:q} 2>&1"


rule score:
    input: plan.reference.manifest, lambda wildcards: drawn(wildcards).features.shard_files
    output: f"{plan.root}/scores/{{draw}}.{{key}}.json"
    log: log_of("score-{draw}.{key}")
    benchmark: time_of("score-{draw}.{key}")
    shell: "haste evaluate {wildcards.draw:q} -c {CONFIG:q} > {log:q} 2>&1"


rule floor:
    input: plan.reference.manifest
    output: plan.floor
    log: log_of("floor")
    benchmark: time_of("floor")
    shell: "haste floor -c {CONFIG:q} > {log:q} 2>&1"
