# Samples and their features in one job, then their scores. States are ancient() here too: their names identify them.
# A job also draws the sets that differ only in guidance; what reads these waits for its outputs (haste/plan/jobs.py).
import re

SCORE, FLOOR = f"{plan.root}/scores/{{draw}}.{{key}}.json", f"{plan.root}/scores/floor-{{key}}.json"
RECONSTRUCTED = f"{plan.root}/scores/reconstructed-{{key}}.json"
SAMPLES = f"{plan.root}/samples/{{draw}}/shard-{{shard}}-of-{{shards}}.npz"
FEATURES = f"{plan.root}/features/{{draw}}/{{seen}}/shard-{{shard}}-of-{{shards}}.h5"
REFERENCE, GRID = f"{plan.root}/features/{{of}}/{{seen}}/manifest.json", f"{plan.root}/samples/{{draw}}/grid.png"


rule reference:
    input: needed("reference", REFERENCE)
    output: update(REFERENCE)
    log: log_of("reference-{of}-{seen}")
    benchmark: time_of("reference-{of}-{seen}")
    threads: THREADS
    resources: devices=1
    params: name=named("reference", REFERENCE)
    shell: "haste reference --detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


# There are two ways to the same features, so each set of samples has only one. New samples get features in the same
# job; for existing samples a detector added later runs alone, or in the job of a set that is drawn, and no sample is
# drawn again. What is on disk when Snakemake starts decides between them, and which job makes it: it is asked once. A
# job on a node reads these lines again, and once more after a node failure, when more is on disk: there nothing is
# decided.
DRAWN, TO_DRAW = (
    [re.escape(name) for name in plan.evaluations if not HERE or (name in plan.jobs.drawn) == there]
    for there in (True, False)
)

if TO_DRAW:
    SEEN = [FEATURES.replace("{seen}", detector.looks) for detector in plan.detectors.values()]

    rule sample:
        input: needed("sample", SAMPLES)
        output:
            samples=update(SAMPLES),
            features=[update(path) for path in SEEN],
        log: log_of("sample-{draw}-{shard}-of-{shards}")
        benchmark: time_of("sample-{draw}-{shard}-of-{shards}")
        threads: THREADS
        resources: devices=1
        wildcard_constraints: draw="|".join(TO_DRAW)
        shell:
            "haste sample {wildcards.draw:q} --shard $((10#{wildcards.shard})) --together -c {CONFIG:q} "
            "> {log:q} 2>&1"


if DRAWN:

    rule features:
        input: needed("features", FEATURES)
        output: update(FEATURES)
        log: log_of("features-{draw}-{seen}-{shard}-of-{shards}")
        benchmark: time_of("features-{draw}-{seen}-{shard}-of-{shards}")
        threads: THREADS
        resources: devices=1
        wildcard_constraints: draw="|".join(DRAWN), seen="[^/]+"
        params: name=named("features", FEATURES), shard=lambda wildcards: int(wildcards.shard)
        shell:
            "haste features {wildcards.draw:q} --detector {params.name:q} --shard {params.shard} -c {CONFIG:q} "
            "> {log:q} 2>&1"


rule score:
    input: needed("score", SCORE)
    output: update(SCORE)
    log: log_of("score-{draw}.{key}")
    benchmark: time_of("score-{draw}.{key}")
    resources: devices=1
    params: name=named("score", SCORE)
    shell: "haste evaluate {wildcards.draw:q} --detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule floor:
    input: needed("floor", FLOOR)
    output: update(FLOOR)
    log: log_of("floor-{key}")
    benchmark: time_of("floor-{key}")
    resources: devices=1
    params: name=named("floor", FLOOR)
    shell: "haste floor --detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule reconstruct:
    input: needed("reconstruct", RECONSTRUCTED)
    output: update(RECONSTRUCTED)
    log: log_of("reconstruct-{key}")
    benchmark: time_of("reconstruct-{key}")
    threads: THREADS
    resources: devices=1
    params: name=named("reconstruct", RECONSTRUCTED)
    shell: "haste reconstruct --detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule grid:
    input: needed("grid", GRID)
    output: update(report(GRID, category="Samples", labels={"samples": "{draw}"}))
    log: log_of("grid-{draw}")
    benchmark: time_of("grid-{draw}")
    shell: "haste grid {wildcards.draw:q} -c {CONFIG:q} > {log:q} 2>&1"
