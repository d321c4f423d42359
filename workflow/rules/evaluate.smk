# Samples and their features in one job, then their scores. States are ancient() here too: their names identify them.
import re

PARTS = [detector.part.manifest for detector in plan.detectors.values() if detector.part]


def drawn(wildcards):
    return plan.evaluations[wildcards.draw]


def judgement(wildcards):
    """One detector's judgement of a set of samples, by the score's name."""
    path = f"{plan.root}/scores/{wildcards.draw}.{wildcards.key}.json"
    return next(one for one in drawn(wildcards).judgements if one.score == path)


def seen(wildcards):
    """The detector of a folder of features."""
    return next(one for one in plan.detectors.values() if one.looks == wildcards.seen)


def floor_of(wildcards):
    path = f"{plan.root}/scores/floor-{wildcards.key}.json"
    return next(detector for detector in plan.detectors.values() if detector.floor == path)


# All detectors run in one job; those that already have features of the same images are left out.
rule reference:
    input: ancient(plan.images.manifest), ancient(PARTS)
    output: [update(path) for path in plan.references_missing or (plan.references if HERE else [])]
    log: log_of("reference")
    benchmark: time_of("reference")
    threads: THREADS
    shell: "haste reference -c {CONFIG:q} > {log:q} 2>&1"


# There are two ways to the same features, so each set of samples has only one. New samples get features in the same
# job; for existing samples a detector added later runs alone, and nothing is drawn again. What is on disk when
# Snakemake starts decides between them. A job on a node reads these lines again, and once more after a node failure,
# when more is on disk: there nothing is decided.
DRAWN, TO_DRAW = (
    [re.escape(name) for name, one in plan.evaluations.items() if not HERE or one.is_drawn == there]
    for there in (True, False)
)

if TO_DRAW:

    rule sample:
        input:
            ancient(lambda wildcards: plan.drawn_from(drawn(wildcards))),
            ancient(PARTS),
        output:
            samples=update(f"{plan.root}/samples/{{draw}}/shard-{{shard}}-of-{{shards}}.npz"),
            features=[
                update(f"{plan.root}/features/{{draw}}/{detector.looks}/shard-{{shard}}-of-{{shards}}.h5")
                for detector in plan.detectors.values()
            ],
        log: log_of("sample-{draw}-{shard}-of-{shards}")
        benchmark: time_of("sample-{draw}-{shard}-of-{shards}")
        threads: THREADS
        wildcard_constraints: draw="|".join(TO_DRAW)
        shell: "haste sample {wildcards.draw:q} --shard $((10#{wildcards.shard})) -c {CONFIG:q} > {log:q} 2>&1"


if DRAWN:

    rule features:
        input:
            ancient(lambda wildcards: drawn(wildcards).sample_file(int(wildcards.shard))),
            ancient(lambda wildcards: [seen(wildcards).part.manifest] if seen(wildcards).part else []),
        output: update(f"{plan.root}/features/{{draw}}/{{seen}}/shard-{{shard}}-of-{{shards}}.h5")
        log: log_of("features-{draw}-{seen}-{shard}-of-{shards}")
        benchmark: time_of("features-{draw}-{seen}-{shard}-of-{shards}")
        threads: THREADS
        wildcard_constraints: draw="|".join(DRAWN), seen="[^/]+"
        params: name=lambda wildcards: seen(wildcards).name, shard=lambda wildcards: int(wildcards.shard)
        shell:
            "haste features {wildcards.draw:q} --detector {params.name:q} --shard {params.shard} -c {CONFIG:q} "
            "> {log:q} 2>&1"


rule score:
    input:
        ancient(lambda wildcards: judgement(wildcards).detector.reference.manifest),
        ancient(lambda wildcards: judgement(wildcards).features.shard_files),
    output: update(f"{plan.root}/scores/{{draw}}.{{key}}.json")
    log: log_of("score-{draw}.{key}")
    benchmark: time_of("score-{draw}.{key}")
    params: name=lambda wildcards: judgement(wildcards).detector.name
    shell: "haste evaluate {wildcards.draw:q} --detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule floor:
    input: ancient(lambda wildcards: floor_of(wildcards).reference.manifest)
    output: update(f"{plan.root}/scores/floor-{{key}}.json")
    log: log_of("floor-{key}")
    benchmark: time_of("floor-{key}")
    params: name=lambda wildcards: floor_of(wildcards).name
    shell: "haste floor --detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule grid:
    input: ancient(lambda wildcards: drawn(wildcards).sample_files)
    output: update(report(f"{plan.root}/samples/{{draw}}/grid.png", category="Samples", labels={"samples": "{draw}"}))
    log: log_of("grid-{draw}")
    benchmark: time_of("grid-{draw}")
    shell: "haste grid {wildcards.draw:q} -c {CONFIG:q} > {log:q} 2>&1"
